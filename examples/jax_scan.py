"""A hundred generations as one compiled program: `lax.scan` over `population_apply` and `eggroll(...)`.

    python examples/jax_scan.py

Fits a step function, whose score has no gradient, with a plain-function MLP and an optax chain.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from eggroll import EggrollConfig
from eggroll.jax import eggroll, population_apply


def init(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(key, (before, after)) / jnp.sqrt(before), "bias": jnp.zeros(after)}
        for key, before, after in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def forward(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def fitness(params, x, y):
    """Minus the error after rounding to halves: piecewise constant, so its gradient is zero almost everywhere."""
    return -jnp.mean(jnp.abs(jnp.round(2 * forward(params, x)[:, 0]) / 2 - y))


def main(generations: int = 100) -> tuple[float, float]:
    config = EggrollConfig(population_size=512, sigma=0.2, rank=2)
    key = jax.random.key(0)
    x = jnp.linspace(-2, 2, 128)[:, None]
    y = jnp.where(jnp.abs(x[:, 0]) < 1, 1.0, -0.5)

    evaluate = population_apply(fitness, config)
    optimizer = eggroll(optax.cosine_decay_schedule(0.5, generations), config, key)

    @jax.jit
    def run(params):
        def generation(carry, number):
            params, state = carry
            scores = evaluate(params, key, number, x, y)
            updates, state = optimizer.update(params, state, params, fitness=scores)
            return (optax.apply_updates(params, updates), state), scores.mean()

        (params, _), history = jax.lax.scan(generation, (params, optimizer.init(params)), jnp.arange(generations))
        return params, history

    start = init(jax.random.key(1), (1, 32, 32, 1))
    params, history = run(start)
    before, after = float(fitness(start, x, y)), float(fitness(params, x, y))
    print(f"fitness {before:.3f} before, {after:.3f} after {generations} generations")
    print(f"mean over members: {history[0]:.3f} in the first, {history[-1]:.3f} in the last")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=100, help="default: %(default)s")
    main(parser.parse_args().generations)
