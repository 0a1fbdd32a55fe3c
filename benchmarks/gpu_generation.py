"""How fast a generation is on a GPU, against pure inference and against what the chip can do.

    python benchmarks/gpu_generation.py                         # everything that is not measured yet
    python benchmarks/gpu_generation.py --list                  # what there is to measure, and what is done
    python benchmarks/gpu_generation.py --only target --seconds 500

One linear layer of width d in bfloat16, one row of input for each member, antithetic pairs; and a 3 x 256 MLP of
65,536 members in float32. A case is measured method by method, times are medians between CUDA events with the cache
emptied in between. Writes JSON, a Markdown table and plots to docs/benchmarks/ after every case, the most interesting
first; the next run goes on where one stopped, on the same GPU with the same software. Needs CUDA.
"""

import argparse
import functools
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from gpu_cases import MLP_MEMBERS, MLP_ROWS, MLP_WIDTH, Case, all_cases
from gpu_report import FILES, summary, table, write
from torch import nn
from torch.nn.functional import linear
from torch_generation import machine, score
from workloads import mlp

from eggroll import prng
from eggroll.torch import EGGROLLTrainer
from eggroll_torch import kernels

Found = TypeVar("Found")
SCALE = 0.01
MLP_CHUNK = 8192
REPEATS = 21
CUDA_GRAPH = {"mode": "reduce-overhead"}
"""What the forward passes are compiled with, so that the host hands a GPU all of one at once."""
FULL_RANK_SHARE = 0.4
"""Of the free memory, for the noise of the full-rank population; as much again is for its weights."""


def main() -> int:
    options = _parser().parse_args()
    cases = {case.name: case for case in all_cases()}
    chosen = [name for name in (*cases, "mlp") if options.only is None or options.only in name]
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured and nothing written.", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    started = time.monotonic()
    report = previous(options.out, device)
    if options.list:
        print("\n".join(f"{'done' if name in report['cases'] else '    '} {name}" for name in chosen))
        return 0
    if options.fresh:
        for name in ("ceilings", *chosen):
            report.pop(name, None)
            report["cases"].pop(name, None)
    if "ceilings" not in report:
        report["ceilings"] = ceilings(device)
    for name in chosen:
        if name in report["cases"]:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"{options.seconds} seconds are over; run again for the rest, which begins with {name!r}")
            break
        report["cases"][name] = measure_mlp(device) if name == "mlp" else measure(cases[name], device)
        print(name, summary(report["cases"][name]), flush=True)
        write(report, options.out)
    print(table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmark of the kernels and of a generation on a GPU.")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in their name, such as 'target' or 'd=1024 '")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this time")
    parser.add_argument("--fresh", action="store_true", help="measure what is chosen anew")
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "benchmarks")
    return parser


def previous(out: Path, device: torch.device) -> dict:
    """The report so far. What another GPU or other software measured is not mixed with it."""
    here = {**machine(device), "triton": kernels.status(device).triton, "kernels": kernels.status(device).reason}
    path = out / f"{FILES}.json"
    if path.exists():
        report = json.loads(path.read_text())
        if report["machine"] == here:
            return report
        print(f"{path} was measured on another machine, {report['machine']}: starting anew", file=sys.stderr)
    return {"machine": here, "cases": {}}


def ceilings(device: torch.device) -> dict[str, float]:
    """What the chip does at best: a large bfloat16 product in TFLOP/s, a large copy in GB/s, read and written."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "TFLOP/s": 2e-9 * size**3 / milliseconds(lambda: torch.mm(a, b), device)[0],
        "GB/s": 2e-6 * source.numel() / milliseconds(lambda: target.copy_(source), device)[0],
    }


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> tuple[float, int]:
    """The median time of a run, and the bytes that it takes beyond what is there before."""
    for _ in range(4):  # compiles, tries configurations, records and captures
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    peak = torch.cuda.max_memory_allocated(device) - before
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any level-two cache
    times = []
    for _ in range(repeats):
        cache.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), peak


def timed(
    runs: dict[str, Callable[[], Callable[[], object]]], what: str, device: torch.device, repeats: int = REPEATS
) -> dict[str, tuple[float, int]]:
    """What `milliseconds` finds, by name. What cannot be prepared or run is left out, with a word why.

    Args:
        runs: by name what prepares a run.
        what: is measured, for the word.
    """
    found = {}
    for name, prepare in runs.items():
        one = tried(lambda prepare=prepare: milliseconds(prepare(), device, repeats), f"{what}: {name}")
        if one is not None:
            found[name] = one
    return found


def tried(measurement: Callable[[], Found], what: str) -> Found | None:
    """What is measured, in memory that is free; with a word why, None where that fails: the rest is still wanted."""
    free()
    try:
        return measurement()
    except torch.AcceleratorError:
        raise  # nothing runs on this device any more
    except Exception as error:
        print(f"{what} is left out: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def free() -> None:
    """Gives back the memory of earlier runs: CUDA graphs and what points at itself keep theirs till then."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def busy(run: Callable[[], object]) -> float:
    """Milliseconds that the GPU itself works for a run: what would be left if the host were infinitely fast."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    time = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3
    if time == 0:
        raise RuntimeError("the profiler does not see the GPU")
    return time


@torch.no_grad()
def measure(case: Case, device: torch.device) -> dict:
    """Every method on one layer: median milliseconds and bytes taken."""
    torch.manual_seed(0)
    free()
    model = nn.Linear(case.width, case.width, bias=False, device=device, dtype=torch.bfloat16)
    rows = torch.randn(case.members, case.width, device=device, dtype=torch.bfloat16)
    x = rows[:1] if case.shared else rows.unsqueeze(1)
    runs = methods(case, model, rows, x)
    found = timed(runs, case.name, device)
    if "generation" in found:
        working = tried(lambda: busy(warm(runs["generation"]())), f"{case.name}: generation, GPU busy")
        if working is not None:
            found["generation, GPU busy"] = working, found["generation"][1]
    full = tried(lambda: full_rank(case, model, x, device), f"{case.name}: full-rank ES")
    return {
        "width": case.width,
        "members": case.members,
        "rank": case.rank,
        "shared": case.shared,
        "milliseconds": {name: time for name, (time, _) in found.items()},
        "bytes": {name: size for name, (_, size) in found.items()},
        "full-rank ES": full and {"members": full[0], "milliseconds of all": full[1]},
    }


def warm(run: Callable[[], object]) -> Callable[[], object]:
    """A run that is not the first."""
    run()
    return run


def methods(
    case: Case, model: nn.Linear, rows: torch.Tensor, x: torch.Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What prepares what is timed, by name; `rows` are those of the plain model."""
    weight, device = model.weight, rows.device
    signs = torch.ones(case.members, device=device)
    signs[1::2] = -1
    draws = torch.arange(case.members // 2, dtype=torch.int32, device=device)
    terms = torch.randn(2, case.members // 2 * case.rank, case.width, device=device, dtype=torch.bfloat16)

    def trainer(compile: bool | dict = False) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model.parameters(),
            model=model,
            population_fitness_fn=lambda population: length(population(x, per_member=not case.shared)),
            population_size=case.members,
            rank=case.rank,
            antithetic=True,
            learning_rate=1e-6,
            seed=0,
            fused=True,
            snapshots=False,
            compile=compile,
            strict=True,
        )

    chosen: dict[str, Callable[[], Callable[[], object]]] = {
        "pure inference": lambda: lambda: linear(rows, weight),
        "two products": lambda: lambda: (linear(rows, weight), torch.mm(terms[0].mT, terms[1])),
        "generation": lambda: trainer().step,
        "generation, CUDA graph": lambda: trainer(CUDA_GRAPH).step,
    }
    if kernels.usable(rows):
        from eggroll_torch.kernels.linear import linear_of_members, linear_of_members_drawn
        from eggroll_torch.kernels.noise import draw_factors, fold_in
        from eggroll_torch.kernels.update import add_low_rank_sum_

        key = torch.from_numpy(prng.key(0).view("int32")).to(device).view(1, 2)
        keys = fold_in(key, draws)[:, 0]
        A, B = draw_factors(keys, None, case.rank, case.width, case.width, "float32", "threefry", torch.bfloat16)
        coefficients = torch.linspace(-1, 1, len(draws), device=device)
        total = torch.zeros_like(weight)

        def on_the_fly(fused: bool | None = None, rng: str = "threefry") -> torch.Tensor:
            keys = fold_in(key, draws)[:, 0]
            return linear_of_members_drawn(x, weight, None, keys, case.rank, signs, SCALE, rng=rng, fused=fused)

        def update(fused: bool) -> None:
            add_low_rank_sum_(total, coefficients, A, B, torch.bfloat16, 1e-6, fused=fused)

        chosen["forward, drawn"] = lambda: on_the_fly
        chosen["forward, Philox"] = lambda: lambda: on_the_fly(rng="philox")
        if not case.shared:
            # Which one "forward, drawn" is depends on the width alone.
            chosen["forward, one kernel"] = lambda: lambda: on_the_fly(fused=True)
            chosen["forward, library"] = lambda: lambda: on_the_fly(fused=False)
            # The same sum, with factors that are in memory.
            chosen["update, one kernel"] = lambda: lambda: update(fused=True)
            chosen["update, library"] = lambda: lambda: update(fused=False)
        chosen["forward, stored"] = lambda: lambda: linear_of_members(x, weight, None, A, B, signs, SCALE)
    return chosen


def length(outputs: torch.Tensor) -> torch.Tensor:
    """A score that reads the outputs once: what is timed is not how a user scores."""
    return -torch.linalg.vector_norm(outputs.flatten(1), dim=1, dtype=torch.float32)


def full_rank(case: Case, model: nn.Linear, x: torch.Tensor, device: torch.device) -> tuple[int, float]:
    """A generation of full-rank evolution strategies: the largest population that fits, and its time, scaled up."""
    weight = model.weight
    free()
    fits = int(FULL_RANK_SHARE * torch.cuda.mem_get_info(device)[0] / (weight.numel() * weight.element_size()))
    members = max(2, min(case.members, fits) // 2 * 2)

    def generation(members: int) -> torch.Tensor:
        inputs = x.expand(members, 1, -1) if case.shared else x[:members]
        noise = torch.randn(members, *weight.shape, device=device, dtype=weight.dtype)
        outputs = torch.bmm(inputs, torch.add(weight, noise, alpha=SCALE).mT)
        return torch.mv(noise.view(members, -1).mT, score(outputs))

    while True:
        try:
            time, _ = milliseconds(functools.partial(generation, members), device, repeats=3)
        except torch.OutOfMemoryError:
            if members == 2:
                raise
            members = max(2, members // 4 * 2)
            torch.cuda.empty_cache()
        else:
            torch.cuda.empty_cache()
            return members, time * case.members / members


@torch.no_grad()
def measure_mlp(device: torch.device) -> dict:
    """A generation of the small MLP with very many members, here and in EvoX, float32 on the tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # the way that Inductor of PyTorch 2.9 and 2.10 knows, too
    try:
        return _measure_mlp(device)
    finally:
        torch.set_float32_matmul_precision(before)


def _measure_mlp(device: torch.device) -> dict:
    torch.manual_seed(0)
    free()
    widths = (MLP_WIDTH,) * 4
    model, x = mlp(*widths).to(device), torch.randn(MLP_ROWS, MLP_WIDTH, device=device)
    target = torch.randint(MLP_WIDTH, (MLP_ROWS,), device=device)
    loss = nn.CrossEntropyLoss()

    def fitness(population):
        return torch.cat([-torch.vmap(loss, (0, None))(part(x), target) for part in population.chunks(MLP_CHUNK)])

    def trainer(compile: bool | dict = False) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model.parameters(),
            model=model,
            population_fitness_fn=fitness,
            population_size=MLP_MEMBERS,
            antithetic=True,
            chunk_size=MLP_CHUNK,
            learning_rate=1e-6,
            seed=0,
            compile=compile,
            strict=True,
        )

    rows = torch.randn(MLP_CHUNK * MLP_ROWS, MLP_WIDTH, device=device)
    runs: dict[str, Callable[[], Callable[[], object]]] = {
        "pure inference": lambda: lambda: [model(rows) for _ in range(MLP_MEMBERS // MLP_CHUNK)],
        "generation": lambda: trainer().step,
        "generation, CUDA graph": lambda: trainer(CUDA_GRAPH).step,
        "EvoX": lambda: evox_step(x, target),
    }
    found = timed(runs, "mlp", device, 5)
    return {
        "members": MLP_MEMBERS,
        "milliseconds": {name: time for name, (time, _) in found.items()},
        "bytes": {name: size for name, (_, size) in found.items()},
    }


def evox_step(x: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    """A generation of the same population in EvoX, set up as in the CPU benchmark."""
    import torch_peers

    torch_peers.MEMBERS, torch_peers.ROWS = MLP_MEMBERS, len(x)
    with x.device:
        step = torch_peers.evox_lora(mlp(*(MLP_WIDTH,) * 4), x, target)

    def on_the_device() -> object:
        with x.device:
            return step()

    return on_the_device


if __name__ == "__main__":
    sys.exit(main())
