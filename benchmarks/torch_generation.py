"""How fast a generation is in PyTorch, against pure inference and against other ways to get it.

    python benchmarks/torch_generation.py            # all workloads, about ten minutes on 2 cores
    python benchmarks/torch_generation.py --only W1 W2 --repeats 3

Every workload runs in one process; methods take turns, so a noisy machine disturbs them alike, and what counts are
the ratios to the pure batched inference of the same run. Writes JSON, a Markdown table and plots to docs/benchmarks/.
Members one at a time and full-rank evolution strategies (`VanillaESTrainer`, with noise of the same generator) are
timed on a share of the population and scaled up; the table says so.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from processor import processor
from torch import nn
from workloads import WORKLOADS, Workload, mlp

from eggroll.torch import EGGROLLTrainer, Population, VanillaESTrainer
from eggroll_torch.memory import PeakMemory

SCALING = [2**power for power in range(8, 17)]
SCALING_CHUNK = 256
"""Members at a time in the scaling run (W7)."""
WIDTH, WIDE_MEMBERS, WIDE_ROWS = 4096, 16, 4
"""Of the run whose weights are larger than all else (W8)."""


def main() -> None:
    options = _parser().parse_args()
    if options.scaling_worker is not None:
        print(json.dumps(scaling_point(options.scaling_worker)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [w for w in WORKLOADS if not options.only or w.name in options.only]
    results = [measure(workload, device, options.repeats) for workload in chosen]
    scaling = [] if options.only and "W7" not in options.only else measure_scaling()
    wide = {} if options.only and "W8" not in options.only else measure_wide(device, options.repeats)
    report = {
        "machine": machine(device),
        "workloads": results,
        "scaling": {"chunk_size": SCALING_CHUNK, "points": scaling},
        "wide": wide,
        "peers": peers(options.peers) if options.peers else [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "torch_generation.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "torch_generation.md").write_text(table(report))
    plots(report, options.out)
    print(table(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmark of the PyTorch population engine.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workloads to run, such as W1 W7")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each method (default 7)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "benchmarks")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the environment that has the peers")
    parser.add_argument("--scaling-worker", type=int, help=argparse.SUPPRESS)
    return parser


def measure(workload: Workload, device: torch.device, repeats: int) -> dict:
    """Median milliseconds of every method on one workload, timed in turns."""
    torch.manual_seed(0)
    model = workload.model().to(device)
    x, flat = workload.inputs(device), workload.flat_inputs(device)

    def new_trainer(compile: bool | dict = False) -> EGGROLLTrainer:
        return EGGROLLTrainer(
            model.parameters(),
            model=model,
            population_fitness_fn=lambda population: score(population(x, per_member=workload.per_member)),
            population_size=workload.members,
            rank=workload.rank,
            antithetic=True,
            chunk_size="auto",
            learning_rate=1e-6,
            seed=0,
            compile=compile,
        )

    population = new_trainer().ask()  # of a generation that stays open: its noise is drawn once, unless it is large

    def forward() -> None:
        population(x, per_member=workload.per_member)

    recorded, compiled = new_trainer({"backend": "eager"}), new_trainer(True)
    for other in (recorded, compiled):
        other.step()  # as it is: the next one is recorded
    with torch.no_grad():
        methods: dict[str, Callable[[], object]] = {
            "pure inference": lambda: model(flat),
            "forward": forward,
            "generation": new_trainer().step,
            "recorded generation": recorded.step,
            "compiled generation": compiled.step,
            "compiled inference": functools.partial(torch.compile(model), flat),
        }
        times = in_turns(methods, repeats, device)
        for name, share, run in slow_methods(workload, model, x, population):
            times[name] = [seconds / share for seconds in in_turns({name: run}, 1, device)[name]]
    print(workload.name, {name: f"{1e3 * statistics.median(t):.1f} ms" for name, t in times.items()}, flush=True)
    return {
        "name": workload.name,
        "title": workload.title,
        "members": workload.members,
        "rank": workload.rank,
        "chunk_size": population.chunk_size(x, per_member=workload.per_member),
        "milliseconds": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "all_milliseconds": {name: [1e3 * seconds for seconds in t] for name, t in times.items()},
    }


def slow_methods(workload: Workload, model: nn.Module, x: torch.Tensor, population: Population):
    """The other ways: name, the share of the population that is timed, and what runs it."""
    loop = max(2, min(workload.members, 32))

    def one_at_a_time() -> None:
        for index in range(loop):
            with population.member(index):
                model(x[index] if workload.per_member else x)

    full = max(2, min(workload.members, 64))
    full_rank = VanillaESTrainer(
        model.parameters(),
        model=model,
        population_fitness_fn=lambda population: score(
            population(x[:full] if workload.per_member else x, per_member=workload.per_member)
        ),
        population_size=full,
        chunk_size=min(full, 16),
        learning_rate=1e-6,
        seed=0,
    )
    full_rank.step()

    yield "one member at a time", loop / workload.members, one_at_a_time
    yield "full-rank ES", full / workload.members, full_rank.step


def score(outputs: torch.Tensor) -> torch.Tensor:
    return -outputs.flatten(1).square().mean(dim=1)


def in_turns(methods: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run; the methods alternate, after one run of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, run in methods.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat or repeats == 1:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_scaling() -> list[dict]:
    """W7: time and peak memory over the population at a fixed chunk size, each in a process of its own."""
    points = []
    for members in SCALING:
        command = [sys.executable, __file__, "--scaling-worker", str(members)]
        points.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print("W7", points[-1], flush=True)
    return points


def scaling_point(members: int) -> dict:
    """One population of a small MLP, scored part by part: seconds of a generation and peak memory of the process."""
    torch.manual_seed(0)
    model, x = mlp(64, 128, 128, 10), torch.randn(16, 64)

    def fitness(population: Population) -> torch.Tensor:
        scores = torch.empty(len(population))
        for part in population.chunks(SCALING_CHUNK):
            scores[part.members.start : part.members.stop] = score(part(x))
        return scores

    trainer = EGGROLLTrainer(
        model.parameters(),
        model=model,
        population_fitness_fn=fitness,
        population_size=members,
        antithetic=True,
        chunk_size=SCALING_CHUNK,
        learning_rate=1e-6,
        seed=0,
    )
    trainer.step()
    start = time.perf_counter()
    trainer.step()
    seconds = time.perf_counter() - start
    return {
        "members": members,
        "microseconds_per_member": 1e6 * seconds / members,
        "peak_megabytes": peak_megabytes(),
    }


def measure_wide(device: torch.device, repeats: int) -> dict:
    """W8: weights that are larger than all else, by default and with what spares them.

    Memory is the most that is alive at once beyond the weights themselves, in multiples of these.
    """
    torch.manual_seed(0)
    x = torch.randn(WIDE_ROWS, WIDTH, device=device)
    trainers, memory = {}, {}
    for name, sparing in (("default", {}), ("fused, no snapshots", {"fused": True, "snapshots": False})):
        torch.manual_seed(0)
        model = mlp(WIDTH, WIDTH, WIDTH).to(device)
        with PeakMemory() as peak:
            trainer = EGGROLLTrainer(
                model.parameters(),
                model=model,
                population_fitness_fn=lambda population: score(population(x)),
                population_size=WIDE_MEMBERS,
                antithetic=True,
                learning_rate=1e-6,
                seed=0,
                **sparing,
            )
            trainer.step()
            trainer.step()
        memory[name] = peak.peak / sum(p.numel() * p.element_size() for p in model.parameters())
        trainers[name] = trainer.step
    times = in_turns(trainers, repeats, device)
    found = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    print("W8", found, memory, flush=True)
    return {"milliseconds": found, "memory of weights": memory}


def peak_megabytes() -> float:
    """The most memory that this process has held, from Linux: `ru_maxrss` would include the process it came from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peers(python: str) -> list[dict]:
    """What `torch_peers.py` measures of other libraries, in the environment of `python`."""
    script = Path(__file__).with_name("torch_peers.py")
    done = subprocess.run([python, str(script)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: torch.device) -> dict:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    info = report["machine"]
    lines = [
        f"Device: {info['device']}, {info['threads']} threads, torch {info['torch']}, Python {info['python']}. "
        "Milliseconds, medians; forward passes with noise that was drawn before; the ratio is that of pure inference "
        "to a whole generation, more is better.",
        "",
        "| | members | rank | pure inference | forward | generation | ratio | one at a time * | full-rank ES * |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["workloads"]:
        t = row["milliseconds"]
        ratio = t["pure inference"] / t["generation"]
        lines.append(
            f"| {row['name']} {row['title']} | {row['members']} | {row['rank']} | {t['pure inference']:.0f} "
            f"| {t['forward']:.0f} | {t['generation']:.0f} | {ratio:.2f} "
            f"| {t['one member at a time']:.0f} | {t['full-rank ES']:.0f} |"
        )
    lines += ["", "\\* timed on a share of the population and scaled up; forward passes only for one at a time.", ""]
    if report["workloads"]:
        lines += [
            'Generations with `compile`: recorded (`{"backend": "eager"}`), and compiled by Inductor (`True`); '
            "the ratios are again those of pure inference as it is to a generation.",
            "",
            "| | compiled inference | generation | ratio | recorded | ratio | compiled | ratio |",
            "|---|---|---|---|---|---|---|---|",
            *map(compiled_row, report["workloads"]),
            "",
        ]
    for peer in report["peers"]:
        ours = next((row for row in report["workloads"] if row["name"] == peer["workload"]), None)
        if ours is None:
            continue
        times = peer["milliseconds"] / ours["milliseconds"]["generation"]
        lines.append(f"- {peer['library']} {peer['version']} on {peer['workload']}: {peer['milliseconds']:.0f} ms, ")
        lines[-1] += f"{times:.1f} times a generation here"
    points = report["scaling"]["points"]
    if points:
        lines += [
            "",
            f"W7: MLP 64-128-128-10, 16 shared inputs, {report['scaling']['chunk_size']} members at a time.",
            "",
            "| members | microseconds per member | peak memory of the process, MB |",
            "|---|---|---|",
            *(f"| {p['members']} | {p['microseconds_per_member']:.1f} | {p['peak_megabytes']:.0f} |" for p in points),
        ]
    if report["wide"]:
        t, memory = report["wide"]["milliseconds"], report["wide"]["memory of weights"]
        lines += [
            "",
            f"W8: two layers of {WIDTH} x {WIDTH}, {WIDE_MEMBERS} members, {WIDE_ROWS} shared inputs: "
            "weights larger than all else.",
            "",
            "| | generation | memory beyond the weights, of the weights |",
            "|---|---|---|",
            *(f"| {name} | {t[name]:.0f} | {memory[name]:.2f} |" for name in t),
        ]
    return "\n".join(lines) + "\n"


def compiled_row(row: dict) -> str:
    t = row["milliseconds"]
    cells = [f"{t['compiled inference']:.0f}"]
    for method in ("generation", "recorded generation", "compiled generation"):
        cells += [f"{t[method]:.0f}", f"{t['pure inference'] / t[method]:.2f}"]
    return f"| {row['name']} | " + " | ".join(cells) + " |"


def plots(report: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if report["workloads"]:
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        names = [row["name"] for row in report["workloads"]]
        places = range(len(names))
        axes.axhline(1, color="black", linewidth=0.8)
        for offset, method in ((-0.28, "forward"), (0, "generation"), (0.28, "compiled generation")):
            ratios = [
                row["milliseconds"]["pure inference"] / row["milliseconds"][method] for row in report["workloads"]
            ]
            bars = axes.bar([place + offset for place in places], ratios, 0.27, label=method)
            labels = axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
            for label in labels:  # which the line at 1 would cross
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set_xticks(list(places), names)
        axes.set_ylabel("speed relative to pure batched inference")
        axes.set_title(f"EGGROLL against inference, {report['machine']['device']}")
        axes.legend()
        figure.savefig(out / "torch_generation.png", dpi=150)
        plt.close(figure)
    if report["scaling"]["points"]:
        points = report["scaling"]["points"]
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        members = [p["members"] for p in points]
        left.plot(members, [p["microseconds_per_member"] for p in points], marker="o")
        left.set_ylabel("microseconds per member")
        right.plot(members, [p["peak_megabytes"] for p in points], marker="o", color="tab:orange")
        right.set_ylabel("peak memory of the process, MB")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            axes.set_xlabel("members in the population")
            axes.grid(alpha=0.3)
        figure.suptitle(f"A generation in chunks of {report['scaling']['chunk_size']} members")
        figure.savefig(out / "torch_scaling.png", dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main()
