"""`jax.lax.ragged_dot`, the product of a mixture of experts, for a population.

JAX vectorises it over the first axis of all three arguments alone, and what comes of that not again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import ArrayLike

from .perturbed import STACK, PerturbedArray, fall_back

__all__ = ["has_rules", "ragged_dot", "ragged_dot_general"]

Array = jax.Array

_GENERAL = "ragged_dot_general"
_RAGGED_DOT = Primitive("eggroll_ragged_dot")


class _Layout(NamedTuple):
    """The axes of an operation that multiplies rows in groups with a matrix for each, perhaps for several at once.

    Attributes:
        lhs: those of the batches, the rows and the features.
        rhs: those of the batches, the groups, the features and the columns.
        batches: how many there are of the former.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    batches: int


def _layout(numbers: Any, lhs_ndim: int, rhs_ndim: int) -> _Layout | None:
    """The axes of a `jax.lax.ragged_dot_general`; None where it is another operation."""
    (lhs_features, rhs_features), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    lhs = (*lhs_batch, *numbers.lhs_ragged_dimensions, *lhs_features)
    rhs = (*rhs_batch, *numbers.rhs_group_dimensions, *rhs_features)
    rhs = (*rhs, *(axis for axis in range(rhs_ndim) if axis not in rhs))
    batches = len(lhs_batch)
    # Rows that are summed over, or other axes besides, are further operations of that name.
    if len(rhs_features) != 1 or sorted(lhs) != list(range(lhs_ndim)) or lhs_ndim != batches + 2:
        return None
    return _Layout(lhs, rhs, batches) if len(rhs) == rhs_ndim == batches + 3 else None


def has_rules(equation: Any) -> bool:
    """Whether `ragged_dot_general` can take the place of an equation of a jaxpr."""
    if equation.primitive.name != _GENERAL or equation.params.get("group_offset") is not None:
        return False
    lhs, rhs, _ = (variable.aval for variable in equation.invars)
    return _layout(equation.params["ragged_dot_dimension_numbers"], lhs.ndim, rhs.ndim) is not None


def ragged_dot_general(
    lhs: Array, rhs: Array, group_sizes: Array, *, ragged_dot_dimension_numbers: Any, **params: Any
) -> Array:
    """`jax.lax.ragged_dot_general` where it is `ragged_dot`, vectorised or with the matrices transposed."""
    layout = _layout(ragged_dot_dimension_numbers, lhs.ndim, rhs.ndim)
    assert layout is not None
    dot: Any = partial(ragged_dot, **params)
    for _ in range(layout.batches):
        dot = jax.vmap(dot, (0, 0, 0 if group_sizes.ndim > 1 else None))
    out: Array = dot(jnp.transpose(lhs, layout.lhs), jnp.transpose(rhs, layout.rhs), group_sizes)
    return out


def ragged_dot(
    lhs: Array, rhs: Array, group_sizes: Array, *, precision: Any, preferred_element_type: Any, **_: Any
) -> Array:
    """`jax.lax.ragged_dot` under any `jax.vmap`, and with a perturbed `rhs`.

    Args:
        lhs: shape ``(rows, in)``; the first ``group_sizes[0]`` rows are the first group's, and so on.
        rhs: shape ``(groups, in, out)``.
        group_sizes: integers, shape ``(groups,)``.

    Returns:
        Shape ``(rows, out)``, 0 in rows of no group.
    """
    how = {"precision": precision, "preferred_element_type": preferred_element_type}
    # Those of all members are added up, which may be more than a narrow type holds.
    out: Array = _RAGGED_DOT.bind(lhs, rhs, lax.convert_element_type(group_sizes, jnp.int32), **how)
    return out


def _ragged_dot(lhs: Array, rhs: Array, group_sizes: Array, **how: Any) -> Array:
    return lax.ragged_dot(lhs, rhs, group_sizes, **how)


_RAGGED_DOT.def_impl(partial(jax.jit, static_argnames=("precision", "preferred_element_type"))(_ragged_dot))
mlir.register_lowering(_RAGGED_DOT, mlir.lower_fun(_ragged_dot, multiple_results=False))


@_RAGGED_DOT.def_abstract_eval
def _(lhs: Any, rhs: Any, group_sizes: Any, **how: Any) -> Any:
    (out,) = jax.make_jaxpr(partial(_ragged_dot, **how))(lhs, rhs, group_sizes).out_avals
    return out


def _batched(args: Any, dims: Any, **how: Any) -> tuple[Array, int]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)

    def over_first(place: int) -> Array:
        arg, dim = args[place], dims[place]
        return jnp.broadcast_to(arg, (size, *arg.shape)) if dim is None else jnp.moveaxis(arg, dim, 0)

    lhs, group_sizes = over_first(0), over_first(2)
    if dims[1] is not None:
        of_one: Any = partial(_looped, **how)
        return jax.vmap(of_one)(lhs, over_first(1), group_sizes), 0
    # All rows of a group at once, whoever's they are.
    group = jax.vmap(_groups, (0, None))(group_sizes, lhs.shape[1]).ravel()
    order = jnp.argsort(group, stable=True)
    out = ragged_dot(lhs.reshape(-1, lhs.shape[-1])[order], args[1], group_sizes.sum(0, dtype=jnp.int32), **how)
    return out[jnp.argsort(order)].reshape(size, lhs.shape[1], -1), 0


batching.primitive_batchers[_RAGGED_DOT] = _batched


def _groups(group_sizes: Array, rows: int) -> Array:
    """The group of each row; the number of groups for rows of none."""
    return jnp.sum(jnp.arange(rows)[:, None] >= jnp.cumsum(group_sizes), axis=1)


def _looped(lhs: Array, rhs: Array, group_sizes: Array, *, precision: Any, preferred_element_type: Any) -> Array:
    """`lax.ragged_dot` in operations that have batching rules, group by group."""
    group = _groups(group_sizes, lhs.shape[0])
    product = partial(jnp.matmul, precision=precision, preferred_element_type=preferred_element_type)

    def add(out: Array, of_group: tuple[Array, Array]) -> tuple[Array, None]:
        index, matrix = of_group
        return out + jnp.where((group == index)[:, None], product(lhs, matrix), 0), None

    shape = jax.eval_shape(product, lhs, rhs[0])
    return lax.scan(add, jnp.zeros_like(shape), (jnp.arange(rhs.shape[0]), rhs))[0]


@quax.register(_RAGGED_DOT)
def _(lhs: ArrayLike, rhs: PerturbedArray, group_sizes: ArrayLike, **how: Any) -> Array:
    x, sizes = jnp.asarray(lhs), jnp.asarray(group_sizes)
    if rhs.axes[0] != STACK or STACK in rhs.axes[1:] or len(set(rhs.axes[1:])) == 1:
        return ragged_dot(x, fall_back(rhs, "ragged_dot"), sizes, **how)
    base = ragged_dot(x, rhs.base, sizes, **how)
    factors = [rhs.factor_a(), rhs.factor_b()]
    (first, _), (second, _) = factors if factors[0][1] == [0, 1] else factors[::-1]
    scale, _ = rhs.stacked(rhs.scale)
    group = _groups(sizes, x.shape[0])
    of_row = jnp.minimum(group, rhs.base.shape[0] - 1)
    thin = jnp.einsum("bi,bir->br", x, first[of_row], precision=how["precision"])
    noise = jnp.einsum("br,bor->bo", thin, second[of_row], precision=how["precision"])
    noise = jnp.where((group < rhs.base.shape[0])[:, None], noise * scale[of_row][:, None], 0)
    return rhs.gained(
        base + noise.astype(base.dtype), lambda gain: rhs.stacked(gain)[0][of_row][:, None].astype(base.dtype)
    )
