"""Perturbed arrays that are looked up (embeddings) and slid over an input (convolutions)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from .perturbed import COLUMN, ROW, STACK, PerturbedArray, fall_back
from .rules import einsum
from .structure import Has, each_part

__all__: list[str] = []

Array = jax.Array


@quax.register(lax.gather_p)
def _(
    x: PerturbedArray, indices: ArrayLike, *, dimension_numbers: Any, slice_sizes: Sequence[int], **params: Any
) -> Any:
    """Rows of ``W + E`` are rows of ``W`` plus rows of a factor times the other factor."""
    numbers = dimension_numbers
    # A number that is filled in beyond the bounds is not multiplied: 0 and NaN, though, would stay what they are.
    filled = x.gain is not None and abs(params["fill_value"] or 0) > 0
    if numbers.operand_batching_dims or filled:
        dense = fall_back(x, "gather")
        return lax.gather_p.bind(dense, indices, dimension_numbers=numbers, slice_sizes=tuple(slice_sizes), **params)
    indices = jnp.asarray(indices)
    ndim = indices.ndim - 1 + len(numbers.offset_dims)
    batch = [axis for axis in range(ndim) if axis not in numbers.offset_dims]

    def gather(part: Array, has: Has, trailing: int) -> Array:
        kept = [place for place, axis in enumerate(numbers.start_index_map) if has(axis)]
        if not kept:  # the same whatever the index
            return jnp.expand_dims(jnp.squeeze(part, numbers.collapsed_slice_dims), batch)
        sizes = [size if has(axis) else 1 for axis, size in enumerate(slice_sizes)]
        own = numbers._replace(
            offset_dims=(*numbers.offset_dims, *range(ndim, ndim + trailing)),
            start_index_map=tuple(numbers.start_index_map[place] for place in kept),
        )
        # Where a lookup out of bounds is filled, the base has the fill and the noise is zero.
        fill = params | {"fill_value": params["fill_value"] if part is x.base else 0}
        return lax.gather_p.bind(
            part,
            indices[..., jnp.asarray(kept)],
            dimension_numbers=own,
            slice_sizes=(*sizes, *part.shape[part.ndim - trailing :]),
            **fill,
        )

    picked = {axis for axis in numbers.start_index_map if slice_sizes[axis] != x.shape[axis]}
    left = iter(kind for axis, kind in enumerate(x.axes) if axis not in numbers.collapsed_slice_dims)
    axes = "".join(next(left) if axis in numbers.offset_dims else STACK for axis in range(ndim))
    looked_up = each_part(x, gather, axes)
    if all(x.axes[axis] == STACK for axis in picked) and _is_consistent(looked_up):
        return looked_up
    noise = looked_up.scale * jnp.sum(looked_up.A * looked_up.B, axis=-1)
    return looked_up.gained(looked_up.base + noise.astype(x.dtype))


def _is_consistent(x: PerturbedArray) -> bool:
    """Whether the parts have the axes that the kinds say: a picked row of a matrix is a row no more."""
    for axis, kind in enumerate(x.axes):
        lengths = (
            x.A.shape[axis] if kind != COLUMN else x.shape[axis],
            x.B.shape[axis] if kind != ROW else x.shape[axis],
        )
        if lengths != (x.shape[axis], x.shape[axis]) or (kind == STACK and x.scale.shape[axis] != x.shape[axis]):
            return False
    return True


@quax.register(lax.conv_general_dilated_p)
def _(
    x: ArrayLike,
    kernel: PerturbedArray,
    *,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: Any,
    **params: Any,
) -> Any:
    """A convolution with `rank` filters and a product over features.

    The product follows, with those of the output, or precedes, with those of the input: whichever a factor has alone.
    """
    groups, rank = feature_group_count, kernel.A.shape[-1]
    out_axis, in_axis = dimension_numbers.rhs_spec[:2]

    def convolve(x: ArrayLike, filters: Array) -> Array:
        return lax.conv_general_dilated_p.bind(
            x,
            filters,
            dimension_numbers=dimension_numbers,
            feature_group_count=groups,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **params,
        )

    def product(x: Array, axis: int, factor: Array) -> Array:
        """Features along `axis` made to others, by `factor` of shape ``(groups, of these, of those)``."""
        _, before, after = factor.shape
        x = jnp.moveaxis(x, axis, -1)
        x = x.reshape(*x.shape[:-1], groups, before)
        places = list(range(x.ndim - 2))
        group, old, new = x.ndim, x.ndim + 1, x.ndim + 2
        out = einsum(x, [*places, group, old], factor, [group, old, new], [*places, group, new], precision)
        return jnp.moveaxis(out.reshape(*out.shape[:-2], groups * after), -1, axis)

    if batch_group_count == 1 and (apart := _apart(kernel, out_axis)):
        features, window = apart
        filters = jnp.moveaxis(jnp.squeeze(window, out_axis), -1, out_axis)  # (..., rank, ...)
        thin = convolve(x, jnp.concatenate([filters] * groups, out_axis))
        by_group = features.reshape(groups, -1, rank)  # (groups, out / groups, rank)
        noise = product(thin, dimension_numbers.out_spec[1], jnp.swapaxes(by_group, 1, 2))
    elif batch_group_count == 1 and (apart := _apart(kernel, in_axis)):
        features, window = apart
        by_group = jnp.broadcast_to(features.reshape(-1, rank), (groups, kernel.shape[in_axis], rank))
        thin = product(jnp.asarray(x), dimension_numbers.lhs_spec[1], by_group)
        noise = convolve(thin, jnp.moveaxis(jnp.squeeze(window, in_axis), -1, in_axis))
    else:
        return convolve(x, fall_back(kernel, "conv_general_dilated"))
    values = convolve(x, kernel.base) + (kernel.scale.reshape(()) * noise).astype(noise.dtype)
    return kernel.gained(values, lambda gain: gain.reshape(()).astype(values.dtype))


def _apart(x: PerturbedArray, axis: int) -> tuple[Array, Array] | None:
    """The factor of `axis` and that of all other axes, if that is how they are divided."""
    # Axes of length 1 are of any kind.
    own, others = (
        "".join({x.axes[axis] for axis in axes if x.shape[axis] != 1})
        for axes in ([axis], [other for other in range(x.ndim) if other != axis])
    )
    if own in (ROW, "") and others in (COLUMN, ""):
        return x.A, x.B
    if own in (COLUMN, "") and others in (ROW, ""):
        return x.B, x.A
    return None
