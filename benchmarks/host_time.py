"""How long the host takes around the arithmetic, on one thread: medians in microseconds, as Markdown tables.

    python benchmarks/host_time.py

First a generation on another device, what a GPU has to wait for, or work through meanwhile: linear layers of 8192
features on the meta device, which computes shapes and nothing else, with the kernels' operations in place of what
would launch them. The meta device works out shapes in Python: a GPU's own operations are launched faster, Triton's
kernels slower.

Then calls in a row, as in a game of hundreds of steps: policies 8-64-64-4 on the CPU, an observation each, beside the
same products with the weights of all members in memory, which is next to nothing but arithmetic.
"""

import itertools
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
POLICY, PLAYERS, STEPS = (8, 64, 64, 4), (64, 512), 500
DEVICE = torch.device("meta")


def main() -> None:
    torch.set_num_threads(1)
    present, absent = (kernels.Status(there, "for a benchmark", None, None) for there in (True, False))
    kernels.status = lambda device, rng="threefry": present if torch.device(device) == DEVICE else absent
    info = machine(torch.device("cpu"))
    print(f"torch {info['torch']}, Python {info['python']}\n")
    print(
        "| layers | forward pass | ask | forward pass | tell | generation | a layer |\n|---|---|---|---|---|---|---|"
    )
    for name, compile in (("as it is", False), ("recorded", {"backend": "eager"})):
        few, many = (generation(layers, compile) for layers in LAYERS)
        for layers, parts in zip(LAYERS, (few, many), strict=True):
            for_a_layer = (sum(many) - sum(few)) / (LAYERS[1] - LAYERS[0])
            row(layers, name, *parts, sum(parts), for_a_layer)
    print("\n| members | as it is | recorded | compiled | weights in memory |\n|---|---|---|---|---|")
    for members in PLAYERS:
        row(members, *(steps_of_game(members, compile) for compile in (False, {"backend": "eager"}, True, None)))


def row(*cells: str | float) -> None:
    print(
        "| " + " | ".join(f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |",
        flush=True,
    )


def steps_of_game(members: int, compile: bool | dict | None) -> float:
    """Microseconds of a step of as many policies; with None of the products alone."""
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(POLICY):
        layers += [nn.Linear(in_features, out_features), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    x = torch.randn(members, POLICY[0])
    trainer = EGGROLLTrainer(
        model.parameters(), model=model, population_size=members, antithetic=True, seed=0, compile=compile or False
    )
    population = trainer.ask()
    states = [population.state_dict(index) for index in range(members)]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def products() -> torch.Tensor:
        activations = x.unsqueeze(1)
        for place, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                weight, bias = weights[f"{place}.weight"], weights[f"{place}.bias"]
                activations = torch.baddbmm(bias.unsqueeze(1), activations, weight.mT)
            else:
                activations = layer(activations)
        return activations

    times = []
    for _ in range(STEPS + 20):
        start = time.perf_counter()
        products() if compile is None else population(x, per_member=True)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[20:])


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
