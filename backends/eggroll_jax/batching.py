"""How many draws to evaluate at a time where the caller does not say."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

from eggroll import EggrollConfig

from .jaxprs import jaxprs_in
from .layout import Plan
from .tracing import Traced

__all__ = ["BatchSize", "draws_to_evaluate", "draws_to_sum", "largest_value"]

Input = Literal["shared", "factored", "own"]
"""What all members share; a matrix whose noise stays in factors; or a value of which each member has another."""
BatchSize = int | Literal["auto"] | None

# Bytes that the largest value of a batch of members may take. On a CPU it and its neighbours then stay in the caches:
# of batches between 2 members and all of them, those of 2 to 8 MiB were fastest for each model of
# `benchmarks/jax_generation.py`. Elsewhere larger is better as long as there is room.
_CACHED, _IN_MEMORY = 4 << 20, 1 << 30
# Bytes of noise that are held at a time.
_NOISE = 32 << 20


def draws_to_evaluate(batch_size: BatchSize, config: EggrollConfig, chosen: Plan, traced: Traced) -> int | None:
    """How many draws' members to evaluate at a time; None for all of them.

    Args:
        batch_size: the caller's wish, in members.
        traced: the function of one member.
    """
    if batch_size != "auto":
        return _draws(batch_size, config, 0)
    kinds: dict[str, Input] = {"low_rank": "factored", "dense": "own", "frozen": "shared"}
    inputs: list[Input] = [kinds[leaf.kind] for leaf in chosen.leaves]
    inputs += ["own" if stacked else "shared" for stacked in traced.stacked]
    dense = (4 * leaf.numbers(config.rank) for leaf in chosen.leaves if leaf.kind == "dense")
    largest = max(largest_value(traced.jaxpr, inputs), *dense, 1)
    room = _CACHED if jax.default_backend() == "cpu" else _IN_MEMORY
    # The noise of a batch is there beside it.
    fit = min(room // (largest * config.members_per_draw), _noise_that_fits(config, chosen))
    return _draws(batch_size, config, fit)


def draws_to_sum(batch_size: BatchSize, config: EggrollConfig, chosen: Plan) -> int | None:
    """How many draws' noise to hold at a time for the update; None for that of all."""
    return _draws(batch_size, config, _noise_that_fits(config, chosen))


def _noise_that_fits(config: EggrollConfig, chosen: Plan) -> int:
    return _NOISE // max(4 * sum(leaf.numbers(config.rank) for leaf in chosen.leaves), 1)


def _draws(batch_size: BatchSize, config: EggrollConfig, fit: int) -> int | None:
    if batch_size is None:
        return None
    if batch_size != "auto":
        return -(-batch_size // config.members_per_draw)
    if fit >= config.draws:
        return None
    fit = max(fit, 1)
    # A rest would be compiled apart: rather a few draws less, if that leaves none.
    return next((few for few in range(fit, fit // 2, -1) if config.draws % few == 0), fit)


def largest_value(closed: ClosedJaxpr, inputs: Sequence[Input]) -> int:
    """Bytes of the largest value in a function that is a member's own, as far as that can be told beforehand.

    Args:
        closed: the function of one member.
        inputs: what each of its inputs is.

    Returns:
        0 where nothing is a member's own. Values of a size that is not known are left out.
    """
    return _largest(closed.jaxpr, inputs)[0]


# A factored matrix goes through these as it is.
_VIEWS = frozenset(
    {
        *("transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "split", "rev"),
        *("convert_element_type", "copy", "neg", "pad", "tile", "sharding_constraint", "stop_gradient"),
        *("device_put", "name", "optimization_barrier", "pvary"),
    }
)
# Several of them are one factored matrix after these.
_JOINTS = frozenset({"concatenate", "stack"})


def _largest(jaxpr: Jaxpr, inputs: Sequence[Input]) -> tuple[int, list[Input]]:
    """`largest_value`, and what the outputs are."""
    kinds: dict[Any, Input] = dict(zip(jaxpr.invars, inputs, strict=True))

    def kind_of(variable: Any) -> Input:
        return "shared" if isinstance(variable, Constant) else kinds.get(variable, "shared")

    largest = 0
    for equation in jaxpr.eqns:
        given = [kind_of(variable) for variable in equation.invars]
        inside, outputs = _through(equation, given)
        largest = max(largest, inside)
        kinds.update(zip(equation.outvars, outputs, strict=True))
        own = [_bytes(out.aval) for out, kind in zip(equation.outvars, outputs, strict=True) if kind == "own"]
        largest = max(largest, *own, 0)
    return largest, [kind_of(variable) for variable in jaxpr.outvars]


def _through(equation: Any, given: list[Input]) -> tuple[int, list[Input]]:
    """What an equation makes of its inputs: bytes of the largest value inside, and what its outputs are."""
    count, name = len(equation.outvars), equation.primitive.name
    if _scales(equation, given):
        return 0, ["factored"] * count
    if "own" not in given:
        if "factored" not in given:
            return 0, ["shared"] * count
        joined = name in _JOINTS and "shared" not in given
        if name in _VIEWS or joined:
            return 0, ["factored"] * count
    inside = 0
    outputs: list[Input] = ["own"] * count
    for inner in jaxprs_in(tuple(equation.params.values())):
        # The branches of a condition do not get its first input; loops arrange theirs otherwise.
        left_out = len(given) - len(inner.invars)
        inputs: list[Input] = given[left_out:] if left_out in (0, 1) else ["own"] * len(inner.invars)
        found, outs = _largest(inner, inputs)
        inside = max(inside, found)
        if left_out == 0 and name not in ("scan", "while") and len(outs) == count:
            outputs = outs
    return inside, outputs


def _scales(equation: Any, given: list[Input]) -> bool:
    """Whether a factored matrix is multiplied with a number or divided by one, whoever's that is."""
    name = equation.primitive.name
    if name not in ("mul", "div"):
        return False
    matrices = [kind == "factored" for kind in given]
    numbers = [getattr(variable.aval, "shape", None) == () for variable in equation.invars]
    return (matrices[0] and numbers[1]) or (name == "mul" and matrices[1] and numbers[0])


def _size(aval: Any) -> int:
    """How many numbers; 0 where a size is a symbol or the value no array."""
    shape = getattr(aval, "shape", ())
    return math.prod(shape) if all(isinstance(length, int) for length in shape) else 0


def _bytes(aval: Any) -> int:
    return _size(aval) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
