"""How long the host takes around the arithmetic: medians of the thread's CPU time in microseconds, as tables.

    python benchmarks/host_time.py

First a generation on a GPU, which has to wait for the host, or works through what it was handed before: linear
layers that are too narrow for the arithmetic to count, on the CPU, which is taken to have the kernels. Triton
launches them on a GPU that does nothing, so what the driver takes for a launch, 2 to 4 for a layer, is to be added;
the rest of a GPU's operations is launched about as fast as a CPU's are called.

Then calls in a row, as in a game of hundreds of steps: policies 8-64-64-4 on the CPU, an observation each, beside the
same products with the weights of all members in memory, which is next to nothing but arithmetic.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from unittest.mock import patch

import torch
from idle_gpu import idle_gpu
from torch import nn
from torch_generation import machine

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import kernels

WIDTH, MEMBERS = 8, 1024
LAYERS = (1, 17)
GENERATIONS = 200
POLICY, PLAYERS, STEPS = (8, 64, 64, 4), (64, 512), 500


def main() -> None:
    torch.set_num_threads(1)
    info = machine(torch.device("cpu"))
    print(f"torch {info['torch']}, Python {info['python']}\n")
    print(
        "| layers | forward pass | ask | forward pass | tell | generation | a layer |\n|---|---|---|---|---|---|---|"
    )
    for name, compile in (("as it is", False), ("recorded", {"backend": "eager"})):
        with kernels_that_do_nothing():
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
        start = time.thread_time()
        products() if compile is None else population(x, per_member=True)
        times.append(time.thread_time() - start)
    return 1e6 * statistics.median(times[20:])


@contextlib.contextmanager
def kernels_that_do_nothing() -> Iterator[None]:
    """The CPU as a device that has the kernels, to look at it from outside."""
    there = kernels.Status(True, "for a benchmark", None, None)
    with patch.object(kernels, "status", lambda device=None, rng="threefry": there), idle_gpu():
        yield


def generation(layers: int, compile: bool | dict) -> list[float]:
    """Microseconds of `ask`, of the forward pass and of `tell`."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    x = torch.zeros(MEMBERS, 1, WIDTH)
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
        start = time.thread_time()
        population = trainer.ask()
        asked = time.thread_time()
        population(x, per_member=True)
        passed = time.thread_time()
        trainer.tell(fitness)
        times.append((asked - start, passed - asked, time.thread_time() - passed))
    return [1e6 * statistics.median(part) for part in zip(*times[5:], strict=True)]


if __name__ == "__main__":
    main()
