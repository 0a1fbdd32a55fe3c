"""What a perturbed array does in a matrix product: ``(W + E) x`` as ``W x`` and two thin products."""

from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from .perturbed import COLUMN, ROW, STACK, PerturbedArray, fall_back

__all__ = ["contract", "einsum"]

Array = jax.Array


@quax.register(lax.dot_general_p)
def _(lhs: PerturbedArray, rhs: PerturbedArray, **params: Any) -> Any:
    return contract(lhs, fall_back(rhs, "dot_general"), weight_first=True, **params)


@quax.register(lax.dot_general_p)
def _(lhs: PerturbedArray, rhs: ArrayLike, **params: Any) -> Any:
    return contract(lhs, jnp.asarray(rhs), weight_first=True, **params)


@quax.register(lax.dot_general_p)
def _(lhs: ArrayLike, rhs: PerturbedArray, **params: Any) -> Any:
    return contract(rhs, jnp.asarray(lhs), weight_first=False, **params)


def contract(
    weight: PerturbedArray,
    x: Array,
    *,
    weight_first: bool,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    **params: Any,
) -> Array:
    """`lax.dot_general` of a perturbed array with a dense one, on either side, with any axes.

    ``x`` meets the factor that holds most of the contracted axes first; what is left has `rank` where the weight had
    rows and columns, and meets the other factor. Axes are numbered for `jnp.einsum`: those of the weight from 0,
    the free ones of `x` after them, the rank last.
    """

    def product(matrix: Array) -> Array:
        return lax.dot_general(
            *((matrix, x) if weight_first else (x, matrix)),
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **params,
        )

    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    w_contract, x_contract = (lhs_contract, rhs_contract) if weight_first else (rhs_contract, lhs_contract)
    w_batch, x_batch = (lhs_batch, rhs_batch) if weight_first else (rhs_batch, lhs_batch)

    if weight.gain is not None and any(weight.axes[axis] == STACK for axis in w_contract):
        return product(fall_back(weight, "dot_general"))  # the sum runs over layers that differ in gain
    base = product(weight.base)

    ndim = weight.base.ndim
    shared = dict(zip((*x_contract, *x_batch), (*w_contract, *w_batch), strict=True))
    x_axes = [shared.get(axis, ndim + axis) for axis in range(x.ndim)]
    w_free = [axis for axis in range(ndim) if axis not in (*w_contract, *w_batch)]
    x_free = [axis for axis in x_axes if axis >= ndim]
    out = [*w_batch, *w_free, *x_free] if weight_first else [*w_batch, *x_free, *w_free]
    rank = ndim + x.ndim

    factors = [weight.factor_a(), weight.factor_b()]
    kinds = [weight.axes[axis] for axis in w_contract]
    if kinds.count(COLUMN) > kinds.count(ROW):
        factors.reverse()
    (first, first_axes), (second, second_axes) = factors
    thin_axes = [axis for axis in dict.fromkeys([*x_axes, *first_axes]) if axis in {*out, *second_axes}]
    scale, scale_axes = weight.stacked(weight.scale)
    thin = einsum(x, x_axes, first, [*first_axes, rank], [*thin_axes, rank], precision)
    if any(axis in w_contract for axis in scale_axes):  # the sum runs over layers that differ in scale
        thin, scale, scale_axes = thin * _along(scale, scale_axes, [*thin_axes, rank]), jnp.ones((), scale.dtype), []
    noise = einsum(thin, [*thin_axes, rank], second, [*second_axes, rank], out, precision)
    # Signs and sigma come last: the two members of a pair share everything before them, where `x` is shared too.
    values = base + (_along(scale, scale_axes, out) * noise).astype(base.dtype)
    return weight.gained(values, lambda gain: _along(*weight.stacked(gain), out).astype(base.dtype))


def einsum(a: Array, a_axes: list[int], b: Array, b_axes: list[int], out: list[int], precision: Any) -> Array:
    """A contraction of two arrays; without a sum to take, a product by broadcasting, which XLA fuses.

    A rank of 1 has no sum, and that is what makes the second thin product free: it joins the addition to the base.
    """
    summed = [axis for axis in {*a_axes, *b_axes} if axis not in out]
    lengths = dict(zip((*a_axes, *b_axes), (*a.shape, *b.shape), strict=True))
    if all(lengths[axis] == 1 for axis in summed):
        return _along(a, a_axes, out) * _along(b, b_axes, out)
    return jnp.einsum(a, a_axes, b, b_axes, out, precision=precision)


def _along(a: Array, axes: list[int], out: list[int]) -> Array:
    """`a` with its axes in the order of `out`, of length 1 where it has none."""
    kept = [axis for axis in axes if axis in out]
    a = jnp.squeeze(a, [place for place, axis in enumerate(axes) if axis not in out])
    a = jnp.transpose(a, [kept.index(axis) for axis in out if axis in kept])
    return jnp.expand_dims(a, [place for place, axis in enumerate(out) if axis not in kept])
