"""Fitness as users hand it in: checked, and brought to one form before it is shaped."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eggroll import EggrollConfig
from eggroll.fitness import shape_fitness

__all__ = ["Nonfinite", "as_finite", "as_fitness", "member_fitness", "shaped_weights"]

Nonfinite = Literal["raise", "worst"]


def as_fitness(fitness: Any, members: int) -> Tensor:
    """The fitness of some members as float64 on the CPU.

    Args:
        fitness: a floating-point tensor or array of shape ``(members,)``, or a sequence of as many floats.

    Raises:
        TypeError: not numbers, or not floating point.
        ValueError: another shape.
    """
    scores = _as_float64(fitness, members)
    if tuple(scores.shape) == (members,):
        return scores
    if scores.ndim == 1:
        raise ValueError(f"`fitness` has {len(scores)} values but the population has {members} members")
    raise ValueError(
        f"`fitness` must have the shape ({members},), one value for each member, got {tuple(scores.shape)}"
    )


def as_finite(scores: Tensor, nonfinite: Nonfinite) -> Tensor:
    """The fitness of all members, finite.

    Args:
        scores: see `as_fitness`.
        nonfinite: ``"raise"``, or ``"worst"`` to score NaN and infinity as the worst finite fitness.

    Raises:
        ValueError: a member's fitness is not finite (or none is, with ``"worst"``).
    """
    if _all_finite(scores):
        return scores
    bad = ~torch.isfinite(scores)
    indices = bad.nonzero().squeeze(1).tolist()
    if nonfinite == "raise":
        raise ValueError(
            f"`fitness` must be finite, but it is not for {_some(indices)}: "
            "`nonfinite='worst'` scores such members as the worst finite one"
        )
    if bad.all():
        raise ValueError("`fitness` must be finite for at least one member, got none")
    return torch.where(bad, scores[~bad].min(), scores)


def member_fitness(fitness_fn: Callable[[nn.Module], Any], model: nn.Module) -> float:
    """What `fitness_fn` says of a model, as a float."""
    value = fitness_fn(model)
    try:
        return _number(value)
    except (TypeError, ValueError, RuntimeError):
        shape = getattr(value, "shape", None)
        seen = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else repr(value)
        raise TypeError(f"`fitness_fn` must return one number, got {seen}") from None


def shaped_weights(fitness: Tensor, config: EggrollConfig) -> Tensor:
    """The weight of each member, float32: shaped in float64, so that backends and chunkings agree."""
    # A copy where a callable may work in place.
    weights = shape_fitness(fitness.clone() if callable(config.fitness_shaping) else fitness, config)
    if not isinstance(weights, Tensor):
        raise TypeError(f"`fitness_shaping` must return a tensor, got {type(weights).__name__}")
    weights = weights.to(torch.float32)
    if not _all_finite(weights):
        raise ValueError("`fitness_shaping` must return weights that are finite in float32, got NaN or infinity")
    return weights


def _all_finite(numbers: Tensor) -> bool:
    """In two operations, where `torch.isfinite` alone takes five; the largest of numbers that hold NaN is NaN."""
    return math.isfinite(numbers.abs().max())


def _as_float64(fitness: Any, members: int) -> Tensor:
    if isinstance(fitness, Tensor):
        if not fitness.is_floating_point():
            raise TypeError(f"`fitness` must be floating point, got {fitness.dtype}")
        return fitness.detach().to("cpu", torch.float64)
    if isinstance(fitness, np.ndarray):
        if not np.issubdtype(fitness.dtype, np.floating):
            raise TypeError(f"`fitness` must be floating point, got {fitness.dtype}")
        return torch.from_numpy(fitness.astype(np.float64))
    if isinstance(fitness, list | tuple):
        try:
            return torch.tensor([_number(value) for value in fitness], dtype=torch.float64, device="cpu")
        except (TypeError, ValueError):
            raise TypeError(f"`fitness` must be {members} numbers, got {fitness!r:.80}") from None
    raise TypeError(f"`fitness` must be a tensor, an array or a list of {members} numbers, got {fitness!r:.80}")


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):  # which float() would parse
        raise TypeError
    return float(value)


def _some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:10]))
    word = "member" if len(indices) == 1 else "members"
    return f"{word} {shown}" + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")
