"""How many draws to evaluate at a time where the caller does not say."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

from eggroll import EggrollConfig
from eggroll.config import as_int

from .layout import Plan

__all__ = ["BatchSize", "check_batch_size", "draws_to_evaluate", "draws_to_sum", "largest_value"]

BatchSize = int | Literal["auto"] | None

# Bytes that the largest value of a batch of members may take. On a CPU it and its neighbours then stay in the caches:
# of batches between 2 members and all of them, those of 2 to 8 MiB were fastest for each model of
# `benchmarks/jax_generation.py`. Elsewhere larger is better as long as there is room.
_CACHED, _IN_MEMORY = 4 << 20, 1 << 30
# Bytes of noise that are held at a time for the update.
_NOISE = 16 << 20


def check_batch_size(batch_size: BatchSize) -> None:
    """Raises a TypeError or ValueError unless it is a positive int, ``"auto"`` or None."""
    if isinstance(batch_size, str) and batch_size != "auto":
        raise ValueError(f"`batch_size` must be a positive int, 'auto' or None, got {batch_size!r}")
    if batch_size not in ("auto", None):
        as_int("batch_size", batch_size, 1)


def draws_to_evaluate(batch_size: BatchSize, config: EggrollConfig, largest: int) -> int | None:
    """How many draws' members to evaluate at a time; None for all of them.

    Args:
        batch_size: the caller's wish, in members.
        largest: bytes of the largest value in the evaluation of one member.
    """
    room = _CACHED if jax.default_backend() == "cpu" else _IN_MEMORY
    return _draws(batch_size, config, room // max(largest * _members_of_a_draw(config), 1))


def draws_to_sum(batch_size: BatchSize, config: EggrollConfig, chosen: Plan) -> int | None:
    """How many draws' noise to hold at a time for the update; None for that of all."""
    return _draws(batch_size, config, _NOISE // max(4 * sum(leaf.numbers(config.rank) for leaf in chosen.leaves), 1))


def _draws(batch_size: BatchSize, config: EggrollConfig, fit: int) -> int | None:
    if batch_size is None:
        return None
    if batch_size != "auto":
        return -(-batch_size // _members_of_a_draw(config))
    if fit >= config.draws:
        return None
    fit = max(fit, 1)
    # A rest would be compiled apart: rather a few draws less, if that leaves none.
    return next((few for few in range(fit, fit // 2, -1) if config.draws % few == 0), fit)


def _members_of_a_draw(config: EggrollConfig) -> int:
    return config.population_size // config.draws


def largest_value(closed: ClosedJaxpr, parameters: int) -> int:
    """Bytes of the largest value that depends on more than parameters.

    What is made of parameters alone, such as a transposed matrix, is shared by the members.

    Args:
        parameters: how many of the first inputs are parameters.
    """
    return _largest(closed.jaxpr, [place >= parameters for place in range(len(closed.jaxpr.invars))])


def _largest(jaxpr: Jaxpr, own: Sequence[bool]) -> int:
    """`largest_value`; `own` says of each input whether it is more than parameters, as constants are."""
    mine = {variable for variable, is_mine in zip(jaxpr.invars, own, strict=True) if is_mine} | {*jaxpr.constvars}
    largest = 0
    for equation in jaxpr.eqns:
        inputs = [not isinstance(variable, Constant) and variable in mine for variable in equation.invars]
        if not any(inputs):
            continue
        mine.update(equation.outvars)
        largest = max(largest, *(_bytes(variable.aval) for variable in equation.outvars), 0)
        for inner in _jaxprs(tuple(equation.params.values())):
            # The branches of a condition do not get its first input; loops rearrange theirs.
            matching = inputs[-len(inner.invars) :] if len(inputs) - len(inner.invars) in (0, 1) else None
            largest = max(largest, _largest(inner, matching or [True] * len(inner.invars)))
    return largest


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [jaxpr for entry in value for jaxpr in _jaxprs(entry)] if isinstance(value, tuple) else []


def _bytes(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return 0 if shape is None or dtype is None else int(np.prod(shape)) * dtype.itemsize
