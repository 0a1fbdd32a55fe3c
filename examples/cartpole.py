"""A policy learns to balance a pole from the length of its games alone, every member in an environment of its own.

    python examples/cartpole.py

CartPole of Gymnasium, a game of at most 500 steps. A step of all games is one call of the population, so that a
generation costs about as much as a single policy that plays as many games at a time.
"""

import argparse
import time

import gymnasium
import numpy as np
import torch
from torch import nn

from eggroll.torch import EGGROLLTrainer

MEMBERS, LONGEST = 64, 500


def play(policies, environments, seed: int) -> torch.Tensor:
    """How many steps each game lasts, float32, one for every environment.

    Args:
        policies: from observations, shape ``(environments, 4)``, to scores of the two actions, ``(environments, 2)``.
        environments: a vector environment of Gymnasium.
        seed: of their starts.
    """
    observations, _ = environments.reset(seed=seed)
    playing = np.ones(environments.num_envs, bool)
    steps = np.zeros(environments.num_envs, np.float32)
    while playing.any():
        actions = policies(torch.from_numpy(observations)).argmax(-1)
        observations, _, fell, over, _ = environments.step(actions.numpy())
        steps += playing
        playing &= ~(fell | over)  # a game that is over starts again, and counts no more
    return torch.from_numpy(steps)


def main(generations: int = 30, seed: int = 0, verbose: bool = True) -> float:
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the products are small
    environments = gymnasium.make_vec("CartPole-v1", num_envs=MEMBERS, vectorization_mode="vector_entry_point")
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    def fitness(population):
        return play(lambda x: population(x, per_member=True), environments, seed=1000 * seed + trainer.generation)

    trainer = EGGROLLTrainer(
        policy.parameters(),
        model=policy,
        population_fitness_fn=fitness,
        population_size=MEMBERS,
        learning_rate=0.1,
        sigma=0.2,
        antithetic=True,
        optimizer=torch.optim.Adam,
        seed=seed,
        compile={"backend": "eager"},  # hundreds of calls of one kind, each a few microseconds of arithmetic
    )
    start = time.perf_counter()
    trainer.train(generations, verbose)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        steps = play(policy, environments, seed=2**31 - 1).mean().item()
    print(
        f"{steps:.0f} of {LONGEST} steps in games from new starts, after {generations} generations in {seconds:.1f} s"
    )
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and starts (default: %(default)s)")
    options = parser.parse_args()
    main(options.generations, options.seed)
