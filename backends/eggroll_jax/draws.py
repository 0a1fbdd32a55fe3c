"""The noise of a model: which key every parameter gets, and all of a draw's numbers at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from eggroll import EggrollConfig
from eggroll.perturbation import draw_epoch, factors_of, low_rank_draws, noise_precision

from .arguments import integer
from .keys import Draws, fold_in, key_words, split
from .layout import Leaf, Plan
from .noise import normals

__all__ = ["draw", "draw_keys", "generation_keys"]

Array = jax.Array


def generation_keys(chosen: Plan, key: Any, generation: Any, config: EggrollConfig) -> Array:
    """The keys of a generation: uint32, shape ``(layers, 2)``, each layer of each parameter in turn.

    Args:
        key: the run's key, as the user passed it.
        generation: a non-negative integer, possibly traced.
    """
    epoch = draw_epoch(integer("generation", generation), config)
    of_parameter = split(key_words(key), chosen.parameters)
    keys = []
    for leaf in chosen.leaves:
        if leaf.layers:
            own = of_parameter[leaf.index]
            for length in leaf.stack_shape:
                own = split(own, length)
            keys.append(own.reshape(-1, 2))
    return fold_in(jnp.concatenate(keys), epoch)


def draw_keys(keys: Array, draws: Array) -> Array:
    """The keys of some draws, shape ``(n, layers, 2)``, from those of the generation and indices, shape ``(n,)``."""
    return fold_in(keys, draws[:, None])


def draw(chosen: Plan, keys: Array, config: EggrollConfig) -> list[Any]:
    """The noise of draws, unscaled float32.

    Args:
        keys: uint32, shape ``(..., layers, 2)``, of any number of draws.

    Returns:
        For each leaf its factors, shapes ``(..., *stack, rows, rank)`` and ``(..., *stack, columns, rank)``; or its
        dense noise, shape ``(..., *leaf.shape)``; or None if it is frozen.
    """
    lead = keys.shape[:-2]
    places: dict[Any, list[int]] = {}
    start = [0]
    for place, leaf in enumerate(chosen.leaves):
        start.append(start[-1] + leaf.layers)
        if leaf.layers:
            places.setdefault(noise_precision(config, str(jnp.dtype(leaf.dtype))), []).append(place)
    noise: list[Any] = [None] * len(chosen.leaves)
    for precision, group in places.items():
        wanted = [(place, own) for place in group for own in _draws(chosen.leaves[place], config)]
        own_keys = jnp.concatenate([keys[..., start[place] : start[place + 1], :] for place, _ in wanted], axis=-2)
        drawn = iter(normals(own_keys, [own for _, own in wanted], precision, config.rng))
        for place in group:
            leaf = chosen.leaves[place]
            noise[place] = _shaped(leaf, [next(drawn) for _ in _draws(leaf, config)], lead)
    return noise


def _draws(leaf: Leaf, config: EggrollConfig) -> list[Draws]:
    """What a leaf takes from the keys of its layers."""
    if leaf.kind == "low_rank":
        own = low_rank_draws(leaf.layer_shape, config.rank, config.rng)
        return [Draws(leaf.layers, *draw) for draw in own]
    return [Draws(leaf.layers, (math.prod(leaf.layer_shape),))]


def _shaped(leaf: Leaf, drawn: list[Array], lead: tuple[int, ...]) -> Any:
    if leaf.kind == "dense":
        return drawn[0].reshape(*lead, *leaf.shape)
    _, columns = leaf.layer_shape
    by_layer = [part.reshape(*lead, *leaf.stack_shape, *part.shape[-2:]) for part in drawn]
    return tuple(factors_of(by_layer, columns))
