"""Fitness shaping: from the scores of a generation to the weights of its members. Higher fitness is better.

Every shaping takes the scores of all members and returns as many weights, in the dtype of the scores. Scores that
are all equal give zero weights, never NaN.
"""

import math
from collections.abc import Callable
from typing import Any

import array_api_compat

from .config import EggrollConfig

__all__ = ["baseline", "centered_rank", "group_zscore", "shape_fitness", "sign", "zscore"]

Array = Any


def shape_fitness(fitness: Array, config: EggrollConfig) -> Array:
    """The weight of each member, by `config.fitness_shaping`.

    Args:
        fitness: floating point, shape ``(population_size,)``.

    Returns:
        The dtype of `fitness`, shape ``(population_size,)``.

    Raises:
        TypeError: the fitness is not floating point.
        ValueError: the fitness, or what a callable made of it, does not have one value for each member.

    Example:
        >>> import numpy as np
        >>> config = EggrollConfig(population_size=4, fitness_shaping="centered_rank")
        >>> shape_fitness(np.asarray([1.0, 3.0, 2.0, 2.0]), config)
        array([-0.5,  0.5,  0. ,  0. ])
    """
    xp = array_api_compat.array_namespace(fitness)
    members = config.population_size
    if not xp.isdtype(fitness.dtype, "real floating"):
        raise TypeError(f"`fitness` must be floating point, got {fitness.dtype}")
    if fitness.ndim != 1 or fitness.shape[0] != members:
        raise ValueError(
            f"`fitness` must have the shape ({members},), one value for each member, got {tuple(fitness.shape)}"
        )
    if callable(config.fitness_shaping):
        weights = config.fitness_shaping(fitness)
        shape = getattr(weights, "shape", None)
        if shape is None or tuple(shape) != (members,):
            seen = type(weights).__name__ if shape is None else f"the shape {tuple(shape)}"
            raise ValueError(f"`fitness_shaping` must return a weight for each of the {members} members, got {seen}")
        return weights
    return _SHAPINGS[config.fitness_shaping](fitness, config)


def zscore(fitness: Array, group_size: int) -> Array:
    """``(f - mean) / sqrt(var + 1e-5)``: the mean of each group, the population variance of all (HyperscaleES).

    Args:
        fitness: floating point, shape ``(n,)``.
        group_size: consecutive members that share a mean.
    """
    xp = array_api_compat.array_namespace(fitness)
    differences, scale = _differences(xp, xp.reshape(fitness, (1, -1)), least=1.0)
    groups = xp.reshape(differences, (-1, group_size))
    # Relative to the group's own first score once more: so a group of equal scores is exactly zero too.
    groups = groups - groups[:, :1]
    centered = groups - xp.mean(groups, axis=1, keepdims=True)
    # Divided before it is squared: the square of a large scale overflows.
    epsilon = (0.125 * math.sqrt(1e-5) / scale) ** 2
    return xp.reshape(centered / xp.sqrt(xp.var(differences) + epsilon), (-1,))


def group_zscore(fitness: Array, group_size: int) -> Array:
    """``(f - mean) / std`` with mean and population standard deviation of each group (eggroll-trainer).

    A group whose scores are all equal gets zero weights.
    """
    xp = array_api_compat.array_namespace(fitness)
    groups = xp.reshape(fitness, (-1, group_size))
    differences, _ = _differences(xp, groups, least=0.0)
    centered = differences - xp.mean(differences, axis=1, keepdims=True)
    std = xp.std(differences, axis=1, keepdims=True)
    return xp.reshape(centered / xp.where(std == 0, xp.ones_like(std), std), (-1,))


def centered_rank(fitness: Array) -> Array:
    """Ranks mapped to [-0.5, 0.5], ties averaged (Salimans et al., arXiv 1703.03864, section 2.1)."""
    xp = array_api_compat.array_namespace(fitness)
    n = fitness.shape[0]
    ordered = xp.sort(fitness)
    # The members of a tie occupy the sorted places [below, not_above): their rank is the middle of it.
    below = xp.searchsorted(ordered, fitness, side="left")
    not_above = xp.searchsorted(ordered, fitness, side="right")
    rank = xp.astype(below + not_above - 1, fitness.dtype) / 2
    return rank / max(n - 1, 1) - 0.5


def sign(fitness: Array) -> Array:
    """``sign(f+ - f-)`` to the first of each antithetic pair, its negative to the second (arXiv 2511.16652)."""
    xp = array_api_compat.array_namespace(fitness)
    pairs = xp.reshape(fitness, (-1, 2))
    other = xp.flip(pairs, axis=1)
    # Compared, not subtracted: a difference overflows.
    weights = xp.astype(pairs > other, fitness.dtype) - xp.astype(pairs < other, fitness.dtype)
    return xp.reshape(weights, (-1,))


def baseline(scores: Array) -> Array:
    """Scores against an unperturbed member, averaged over questions (HyperscaleES, EggRollBS).

    ``(s - s[:, 0]) / (std(s, axis=1) + 1e-8)`` with columns 0 and 1, which are not perturbed, set to 0.

    Args:
        scores: floating point, shape ``(questions, group_size)``.

    Returns:
        One weight for each place in a group, shape ``(group_size,)``.
    """
    xp = array_api_compat.array_namespace(scores)
    differences, scale = _differences(xp, scores, least=1.0)
    advantage = differences / (xp.std(differences, axis=1, keepdims=True) + 0.125e-8 / scale)
    perturbed = xp.arange(scores.shape[1], device=array_api_compat.device(scores)) >= 2
    return xp.mean(xp.where(perturbed, advantage, xp.zeros_like(advantage)), axis=0)


def _differences(xp: Any, scores: Array, least: float) -> tuple[Array, Array]:
    """The differences of each row of scores to its first, over ``8 * scale``, and `scale`, shape ``(rows, 1)``.

    A mean of equal numbers rounds, a difference of equal numbers is exactly zero. The scale is the largest of the
    differences' eighths where that exceeds `least`, else 1: so the differences lie in [-1, 1] where they could
    overflow. Eighths, because then neither they nor the reciprocal of their scale, with which a compiler may
    replace the division, leave the range of normal numbers.
    """
    eighths = scores / 8
    differences = eighths - eighths[:, :1]
    largest = xp.max(xp.abs(differences), axis=1, keepdims=True)
    scale = xp.where(largest > least, largest, xp.ones_like(largest))
    return differences / scale, scale


def _tiled_baseline(fitness: Array, config: EggrollConfig) -> Array:
    xp = array_api_compat.array_namespace(fitness)
    weights = baseline(xp.reshape(fitness, (-1, config.group)))
    return xp.tile(weights, (config.population_size // config.group,))


_SHAPINGS: dict[str, Callable[[Array, EggrollConfig], Array]] = {
    "zscore": lambda fitness, config: zscore(fitness, config.group),
    "group_zscore": lambda fitness, config: group_zscore(fitness, config.group),
    "centered_rank": lambda fitness, config: centered_rank(fitness),
    "sign": lambda fitness, config: sign(fitness),
    "baseline": _tiled_baseline,
    "raw": lambda fitness, config: fitness,
}
