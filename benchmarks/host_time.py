"""How long the host takes for a generation on another device: what a GPU has to wait for, or work through meanwhile.

    python benchmarks/host_time.py

Linear layers of 8192 features on the meta device, which computes shapes and nothing else, with the kernels'
operations in place of what would launch them; on one thread. The meta device works out shapes in Python: a GPU's own
operations are launched faster, Triton's kernels slower. Medians, in microseconds, printed as a Markdown table.
"""

import statistics
import time

import torch
from torch import nn
from torch_generation import machine

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import kernels

WIDTH, MEMBERS = 8192, 1024
LAYERS = (1, 17)
GENERATIONS = 200
DEVICE = torch.device("meta")


def main() -> None:
    torch.set_num_threads(1)
    present = kernels.Status(True, "for a benchmark", None, None)
    kernels.status = lambda device=None, rng="threefry": present  # type: ignore[assignment]
    info = machine(torch.device("cpu"))
    print(f"torch {info['torch']}, Python {info['python']}\n")
    print(
        "| layers | forward pass | ask | forward pass | tell | generation | a layer |\n|---|---|---|---|---|---|---|"
    )
    for name, compile in (("as it is", False), ("recorded", {"backend": "eager"})):
        few, many = (generation(layers, compile) for layers in LAYERS)
        for layers, parts in zip(LAYERS, (few, many), strict=True):
            for_a_layer = (sum(many) - sum(few)) / (LAYERS[1] - LAYERS[0])
            cells = [layers, name, *(f"{part:.0f}" for part in (*parts, sum(parts), for_a_layer))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def generation(layers: int, compile: bool | dict) -> list[float]:
    """Microseconds of `ask`, of the forward pass and of `tell`."""
    with DEVICE:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
        x = torch.empty(MEMBERS, 1, WIDTH, dtype=torch.bfloat16)
    trainer = EGGROLLTrainer(
        model.parameters(),
        model=model,
        population_size=MEMBERS,
        antithetic=True,
        seed=0,
        fused=True,
        snapshots=False,
        compile=compile,
        strict=True,
    )
    fitness = torch.linspace(-1, 1, MEMBERS)
    times = []
    for _ in range(GENERATIONS + 5):
        start = time.perf_counter()
        population = trainer.ask()
        asked = time.perf_counter()
        population(x, per_member=True)
        passed = time.perf_counter()
        trainer.tell(fitness)
        times.append((asked - start, passed - asked, time.perf_counter() - passed))
    return [1e6 * statistics.median(part) for part in zip(*times[5:], strict=True)]


if __name__ == "__main__":
    main()
