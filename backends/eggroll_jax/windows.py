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
    if numbers.operand_batching_dims:
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
    """A convolution with `rank` filters, then a product with the factor of the output features."""

    def convolve(filters: Array) -> Array:
        return lax.conv_general_dilated_p.bind(
            x,
            filters,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **params,
        )

    out_axis = dimension_numbers.rhs_spec[0]
    # Axes of length 1 are of any kind.
    out_kind, window_kind = (
        "".join({kernel.axes[axis] for axis in axes if kernel.shape[axis] != 1})
        for axes in ([out_axis], [axis for axis in range(kernel.ndim) if axis != out_axis])
    )
    if batch_group_count == 1 and out_kind in (ROW, "") and window_kind in (COLUMN, ""):
        window, features = kernel.B, kernel.A
    elif batch_group_count == 1 and out_kind in (COLUMN, "") and window_kind in (ROW, ""):
        window, features = kernel.A, kernel.B
    else:
        return convolve(fall_back(kernel, "conv_general_dilated"))
    rank, groups = window.shape[-1], feature_group_count
    filters = jnp.moveaxis(jnp.squeeze(window, out_axis), -1, out_axis)  # (..., rank, ...)
    thin = convolve(jnp.concatenate([filters] * groups, out_axis))
    feature_axis = dimension_numbers.out_spec[1]
    thin = jnp.moveaxis(thin, feature_axis, -1)
    thin = thin.reshape(*thin.shape[:-1], groups, rank)
    by_group = features.reshape(groups, -1, rank)  # (groups, out / groups, rank)
    places = list(range(thin.ndim - 2))
    group, out, k = thin.ndim, thin.ndim + 1, thin.ndim + 2
    noise = einsum(thin, [*places, group, k], by_group, [group, out, k], [*places, group, out], precision)
    noise = jnp.moveaxis(noise.reshape(*noise.shape[:-2], kernel.shape[out_axis]), -1, feature_axis)
    values = convolve(kernel.base) + (kernel.scale.reshape(()) * noise).astype(noise.dtype)
    return kernel.gained(values, lambda gain: gain.reshape(()).astype(values.dtype))
