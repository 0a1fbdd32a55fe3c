"""`jax.lax.ragged_dot`, the product of a mixture of experts, for a population: JAX has no batching rule for it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import ArrayLike

from .perturbed import STACK, PerturbedArray, fall_back

__all__ = ["is_ragged_dot", "ragged_dot"]

Array = jax.Array

_GENERAL = "ragged_dot_general"
_RAGGED_DOT = Primitive("eggroll_ragged_dot")


def is_ragged_dot(equation: Any) -> bool:
    """Whether an equation of a jaxpr is what `jax.lax.ragged_dot` makes: rows in groups, a matrix for each."""
    if equation.primitive.name != _GENERAL or equation.params.get("group_offset") is not None:
        return False
    numbers = equation.params["ragged_dot_dimension_numbers"]
    parts = (numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions)
    return tuple(jax.tree.leaves(parts)) == (1, 1, 0, 0)


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
    out: Array = _RAGGED_DOT.bind(lhs, rhs, group_sizes, **how)
    return out


def _ragged_dot(lhs: Array, rhs: Array, group_sizes: Array, **how: Any) -> Array:
    return lax.ragged_dot(lhs, rhs, group_sizes, **how)


_RAGGED_DOT.def_impl(partial(jax.jit, static_argnames=("precision", "preferred_element_type"))(_ragged_dot))
mlir.register_lowering(_RAGGED_DOT, mlir.lower_fun(_ragged_dot, multiple_results=False))


@_RAGGED_DOT.def_abstract_eval
def _(lhs: Any, rhs: Any, group_sizes: Any, **how: Any) -> Any:
    out = jax.eval_shape(partial(_ragged_dot, **how), *(_shape_of(aval) for aval in (lhs, rhs, group_sizes)))
    return jax.core.ShapedArray(out.shape, out.dtype)


def _shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


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
    out = ragged_dot(
        lhs.reshape(-1, lhs.shape[-1])[order], args[1], group_sizes.sum(0, dtype=group_sizes.dtype), **how
    )
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
    return lax.scan(add, jnp.zeros(shape.shape, shape.dtype), (jnp.arange(rhs.shape[0]), rhs))[0]


@quax.register(_RAGGED_DOT)
def _(lhs: ArrayLike, rhs: PerturbedArray, group_sizes: ArrayLike, **how: Any) -> Array:
    x, sizes = jnp.asarray(lhs), jnp.asarray(group_sizes)
    if rhs.axes[0] != STACK or STACK in rhs.axes[1:] or len(set(rhs.axes[1:])) == 1:
        return ragged_dot(x, fall_back(rhs, "ragged_dot"), sizes, **how)
    base = ragged_dot(x, rhs.base, sizes, **how)
    factors = [rhs.factor_a(), rhs.factor_b()]
    (first, _), (second, _) = factors if factors[0][1] == [0, 1] else factors[::-1]
    scale, _ = rhs.stacked_scale()
    group = _groups(sizes, x.shape[0])
    of_row = jnp.minimum(group, rhs.base.shape[0] - 1)
    thin = jnp.einsum("bi,bir->br", x, first[of_row], precision=how["precision"])
    noise = jnp.einsum("br,bor->bo", thin, second[of_row], precision=how["precision"])
    noise = jnp.where((group < rhs.base.shape[0])[:, None], noise * scale[of_row][:, None], 0)
    return base + noise.astype(base.dtype)
