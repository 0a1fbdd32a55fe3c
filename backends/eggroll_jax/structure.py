"""What keeps a perturbed array a perturbed array: transposing, reshaping, slicing, stacking, casting, scaling it.

A structural operation on ``W`` is the same operation on its factors, on those axes that a factor has.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.extend.core.primitives import device_put_p, sharding_constraint_p, stop_gradient_p
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import ArrayLike

from .perturbed import COLUMN, ROW, STACK, PerturbedArray, fall_back

__all__ = ["Has", "each_part"]

Array = jax.Array
Has = Callable[[int], bool]


def each_part(
    x: PerturbedArray, function: Callable[[Array, Has, int], Array], axes: str | None = None
) -> PerturbedArray:
    """`x` with ``function(part, has, trailing)`` in the place of base, `A`, `B` and scale.

    Args:
        function: gets an array of the axes of `x`, which of them are there in full (the others have length 1), and
            how many axes, the rank's, come after them.
        axes: the kinds of the resulting axes, where they change.
    """
    kinds = x.axes

    def of_layers(part: Array) -> Array:
        return function(part, lambda axis: kinds[axis] == STACK, 0)

    return PerturbedArray(
        base=function(x.base, lambda axis: True, 0),
        A=function(x.A, lambda axis: kinds[axis] != COLUMN, 1),
        B=function(x.B, lambda axis: kinds[axis] != ROW, 1),
        scale=of_layers(x.scale),
        kinds=kinds if axes is None else axes,
        name=x.name,
        strict=x.strict,
        gain=None if x.gain is None else of_layers(x.gain),
    )


@quax.register(lax.transpose_p)
def _(x: PerturbedArray, *, permutation: Sequence[int]) -> PerturbedArray:
    def transpose(part: Array, has: Has, trailing: int) -> Array:
        return jnp.transpose(part, (*permutation, *range(len(permutation), len(permutation) + trailing)))

    return each_part(x, transpose, "".join(x.axes[axis] for axis in permutation))


@quax.register(lax.reshape_p)
def _(x: PerturbedArray, *, new_sizes: Sequence[int], dimensions: Any, **params: Any) -> Any:
    groups = None if dimensions is not None else matching_groups(x.shape, new_sizes)
    kinds = None if groups is None else [_common_kind(x, old) for old, _ in groups]
    if groups is None or kinds is None or None in kinds:
        return lax.reshape(fall_back(x, "reshape"), new_sizes, dimensions)
    axes = "".join(kind * len(new) for kind, (_, new) in zip(kinds, groups, strict=True) if kind)

    def reshape(part: Array, has: Has, trailing: int) -> Array:
        sizes: list[int] = []
        for old, new in groups:
            full = all(has(axis) or x.shape[axis] == 1 for axis in old)
            sizes += [new_sizes[axis] for axis in new] if full else [1] * len(new)
        return part.reshape(*sizes, *part.shape[part.ndim - trailing :])

    return each_part(x, reshape, axes)


def matching_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The finest runs of old and of new axes that hold the same elements, or None for an empty array."""
    if 0 in old:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        size_left, size_right = (old[i] if left else 1), (new[j] if right else 1)
        i, j = i + len(left), j + len(right)
        # An axis of length 1 facing a longer one is a run of its own, without a partner.
        if left and right and size_left != size_right and 1 in (size_left, size_right):
            if size_left == 1:
                right, j = [], j - 1
            else:
                left, i = [], i - 1
            groups.append((left, right))
            continue
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * old[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * new[j], j + 1
        groups.append((left, right))
    return groups


def _common_kind(x: PerturbedArray, axes: Sequence[int]) -> str | None:
    """The kind that all of `axes` longer than 1 have; None where they differ."""
    kinds = {x.axes[axis] for axis in axes if x.shape[axis] != 1}
    return None if len(kinds) > 1 else kinds.pop() if kinds else STACK


@quax.register(lax.squeeze_p)
def _(x: PerturbedArray, *, dimensions: Sequence[int]) -> PerturbedArray:
    axes = "".join(kind for axis, kind in enumerate(x.axes) if axis not in dimensions)
    return each_part(x, lambda part, has, trailing: lax.squeeze(part, dimensions), axes)


@quax.register(lax.broadcast_in_dim_p)
def _(
    x: PerturbedArray, *dynamic: ArrayLike, shape: Sequence[int], broadcast_dimensions: Sequence[int], **params: Any
) -> PerturbedArray:
    source = dict(zip(broadcast_dimensions, range(x.ndim), strict=True))
    # An axis that did not exist, or had length 1, repeats the matrix: a stack of equal layers.
    grown = {axis for axis in range(len(shape)) if axis not in source or x.shape[source[axis]] != shape[axis]}
    axes = "".join(STACK if axis in grown else x.axes[source[axis]] for axis in range(len(shape)))

    def broadcast(part: Array, has: Has, trailing: int) -> Array:
        sizes = [length if axis in grown or has(source[axis]) else 1 for axis, length in enumerate(shape)]
        rank = part.shape[part.ndim - trailing :]
        kept = (*broadcast_dimensions, *range(len(shape), len(shape) + trailing))
        return lax.broadcast_in_dim(part, (*sizes, *rank), kept)

    return each_part(x, broadcast, axes)


@quax.register(lax.slice_p)
def _(
    x: PerturbedArray, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Sequence[int] | None
) -> PerturbedArray:
    steps = strides or [1] * x.ndim

    def take(part: Array, has: Has, trailing: int) -> Array:
        window = [
            slice(start_indices[axis], limit_indices[axis], steps[axis]) if has(axis) else slice(None)
            for axis in range(x.ndim)
        ]
        return part[tuple(window)]

    return each_part(x, take)


@quax.register(lax.dynamic_slice_p)
def _(x: PerturbedArray, *starts: ArrayLike, slice_sizes: Sequence[int]) -> PerturbedArray:
    # The primitive clamps what the function of its name counts from the end.
    inside = [
        jnp.clip(start, 0, length - size) for start, length, size in zip(starts, x.shape, slice_sizes, strict=True)
    ]

    def take(part: Array, has: Has, trailing: int) -> Array:
        for axis, (start, size) in enumerate(zip(inside, slice_sizes, strict=True)):
            if has(axis) and size != x.shape[axis]:
                part = lax.dynamic_slice_in_dim(part, start, size, axis)
        return part

    return each_part(x, take)


@quax.register(lax.pad_p)
def _(x: PerturbedArray, padding_value: ArrayLike, *, padding_config: Sequence[tuple[int, int, int]]) -> Any:
    """The base is filled, the noise has zeros there."""
    if x.gain is not None:
        return lax.pad(fall_back(x, "pad"), padding_value, padding_config)
    nothing = (0, 0, 0)

    def pad(part: Array, has: Has, trailing: int) -> Array:
        own = [config if has(axis) else nothing for axis, config in enumerate(padding_config)]
        return lax.pad(part, padding_value if part is x.base else part.dtype.type(0), own + [nothing] * trailing)

    return each_part(x, pad)


def _tile(x: PerturbedArray, *, reps: Sequence[int]) -> PerturbedArray:
    def tile(part: Array, has: Has, trailing: int) -> Array:
        return jnp.tile(part, [count if has(axis) else 1 for axis, count in enumerate(reps)] + [1] * trailing)

    return each_part(x, tile)


# Older versions of JAX reshape what was broadcast.
if hasattr(lax, "tile_p"):
    quax.register(lax.tile_p)(_tile)


@quax.register(lax.split_p)
def _(x: PerturbedArray, *, sizes: Sequence[int], axis: int) -> list[PerturbedArray]:
    pieces, start = [], 0
    for size in sizes:

        def take(part: Array, has: Has, trailing: int, start: int = start, size: int = size) -> Array:
            return lax.slice_in_dim(part, start, start + size, axis=axis) if has(axis) else part

        pieces.append(each_part(x, take))
        start += size
    return pieces


@quax.register(lax.rev_p)
def _(x: PerturbedArray, *, dimensions: Sequence[int]) -> PerturbedArray:
    return each_part(
        x,
        lambda part, has, trailing: lax.rev(part, [axis for axis in dimensions if has(axis)]) if part.ndim else part,
    )


@quax.register(lax.concatenate_p)
def _(*operands: PerturbedArray | ArrayLike, dimension: int) -> Any:
    """Weights side by side are one matrix whose rank is the sum of their ranks (gates of an LSTM, packed q, k, v).

    Weights one after the other are layers of one stack.
    """
    weights = [operand for operand in operands if isinstance(operand, PerturbedArray)]
    kinds = {weight.axes for weight in weights}
    axes = kinds.pop() if len(kinds) == 1 else ""
    if len(weights) != len(operands) or not axes or _differ(weights, axes[dimension]):
        dense = [fall_back(one, "concatenate") if isinstance(one, PerturbedArray) else one for one in operands]
        return lax.concatenate(dense, dimension)
    base = lax.concatenate([weight.base for weight in weights], dimension)
    name, strict = " and ".join(weight.name for weight in weights), any(weight.strict for weight in weights)
    if axes[dimension] == STACK:
        A, B, scale = (
            lax.concatenate([getattr(weight, part) for weight in weights], dimension) for part in ("A", "B", "scale")
        )
        return PerturbedArray(base, A, B, scale, kinds=axes, name=name, strict=strict)
    grows_a = axes[dimension] == ROW
    split_factors, shared_factors = [], []
    total = sum(weight.A.shape[-1] for weight in weights)
    place = 0
    for weight in weights:
        own, other = (weight.A, weight.B) if grows_a else (weight.B, weight.A)
        # Its own columns of the common rank, zeros in those of its neighbours.
        pad = [(0, 0)] * (own.ndim - 1) + [(place, total - place - own.shape[-1])]
        split_factors.append(jnp.pad(own, pad))
        shared_factors.append(other * weight.scale[..., None])
        place += own.shape[-1]
    own, other = jnp.concatenate(split_factors, dimension), jnp.concatenate(shared_factors, -1)
    return PerturbedArray(
        base=base,
        A=own if grows_a else other,
        B=other if grows_a else own,
        scale=jnp.ones_like(weights[0].scale),
        kinds=axes,
        name=name,
        strict=strict,
    )


def _differ(weights: Sequence[PerturbedArray], kind: str) -> bool:
    """Whether they cannot be one weight: layers of a stack have one rank, and whatever was multiplied is apart."""
    ranks = {weight.A.shape[-1] for weight in weights}
    return any(weight.gain is not None for weight in weights) or (kind == STACK and len(ranks) > 1)


def _stack(*operands: PerturbedArray | ArrayLike, axis: int) -> Any:
    def stack(*arrays: Any) -> Array:
        return lax.concatenate([lax.expand_dims(array, [axis]) for array in arrays], axis)

    return quax.quaxify(stack)(*operands)


# What `jnp.stack` ends with: not every version of JAX has a primitive for it.
_STACKING = jax.make_jaxpr(lambda x: jnp.stack([x, x]))(0.0).eqns[-1].primitive
if _STACKING is not lax.concatenate_p:
    quax.register(_STACKING)(_stack)


@quax.register(lax.convert_element_type_p)
def _(x: PerturbedArray, *, new_dtype: Any, **params: Any) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return lax.convert_element_type(fall_back(x, "convert_element_type"), new_dtype)
    return each_part(x, lambda part, has, trailing: part.astype(new_dtype))


@quax.register(lax.copy_p)
def _(x: PerturbedArray, **params: Any) -> PerturbedArray:
    return x


def _register_identity(primitive: Primitive) -> None:
    @quax.register(primitive)
    def _(*operands: PerturbedArray | ArrayLike, **params: Any) -> Any:
        """Where its values are, and what follows from them, matters for the base, which is stored, alone."""
        bases = [operand.base if isinstance(operand, PerturbedArray) else operand for operand in operands]
        out = primitive.bind(*bases, **params)
        outs = [
            dataclasses.replace(operand, base=base) if isinstance(operand, PerturbedArray) else base
            for operand, base in zip(operands, out if primitive.multiple_results else [out], strict=True)
        ]
        return outs if primitive.multiple_results else outs[0]


# Flax constrains partitioned parameters wherever a mesh is set.
_register_identity(sharding_constraint_p)
_register_identity(stop_gradient_p)
_register_identity(device_put_p)
# Not every version of JAX exports theirs.
for _function in (lax.optimization_barrier, lambda x: checkpoint_name(x, "any")):
    _register_identity(jax.make_jaxpr(_function)(0.0).eqns[0].primitive)
# Nor what it inserts under `jax.shard_map` where devices with values of their own multiply them with a shared one.
_devices = AbstractMesh((1,), ("i",))
_multiply = jax.shard_map(
    jnp.multiply, mesh=_devices, in_specs=(PartitionSpec(), PartitionSpec("i")), out_specs=PartitionSpec("i")
)
for _equation in jax.make_jaxpr(_multiply)(*np.ones((2, 1))).eqns[0].params["jaxpr"].eqns[:-1]:
    _register_identity(_equation.primitive)


@quax.register(lax.neg_p)
def _(x: PerturbedArray, **params: Any) -> PerturbedArray:
    return _scaled(x, jnp.negative)


@quax.register(lax.mul_p)
def _(x: PerturbedArray, y: ArrayLike, **params: Any) -> Any:
    return _multiplied(x, y, lambda part: part * y) if jnp.ndim(y) == 0 else fall_back(x, "mul") * y


@quax.register(lax.mul_p)
def _(x: ArrayLike, y: PerturbedArray, **params: Any) -> Any:
    factor = jnp.asarray(x)
    return _multiplied(y, x, lambda part: factor * part) if factor.ndim == 0 else factor * fall_back(y, "mul")


@quax.register(lax.div_p)
def _(x: PerturbedArray, y: ArrayLike, **params: Any) -> Any:
    divisor = jnp.asarray(y)
    return _multiplied(x, y, lambda part: part / divisor) if divisor.ndim == 0 else fall_back(x, "div") / divisor


def _multiplied(x: PerturbedArray, number: ArrayLike, function: Callable[[Array], Array]) -> PerturbedArray:
    """`x` times or through a number. One that is not known yet may be the member's own: the base must stay shared."""
    if not isinstance(number, jax.core.Tracer):
        return _scaled(x, function)
    return dataclasses.replace(x, gain=function(jnp.ones_like(x.scale) if x.gain is None else x.gain))


def _scaled(x: PerturbedArray, function: Callable[[Array], Array]) -> PerturbedArray:
    """`x` times a number: the base and the scale are."""
    return dataclasses.replace(x, base=function(x.base), scale=function(x.scale))
