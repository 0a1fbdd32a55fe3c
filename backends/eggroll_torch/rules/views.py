"""Parts and views of a perturbed matrix, or of a stack of them, mostly perturbed weights themselves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..perturbed import EITHER, LowRankWeight, PerturbedWeight, ScaledWeight, plain, rule
from .lookup import rows

__all__ = ["layer", "part", "transposed", "unsqueezed"]


def transposed(weight: LowRankWeight) -> LowRankWeight:
    """Each matrix transposed: rows and columns, hence ``A`` and ``B``, change places."""
    if isinstance(weight, ScaledWeight):
        return ScaledWeight.make(_transposed(weight.weight), weight.columns, weight.rows)
    assert isinstance(weight, PerturbedWeight)
    return _transposed(weight)


def _transposed(weight: PerturbedWeight) -> PerturbedWeight:
    noise = weight.noise
    return PerturbedWeight.make(plain(weight).mT, noise.having(noise.B, noise.A))


def part(weight: LowRankWeight, axis: int, where: slice) -> LowRankWeight:
    """A slice of rows, of columns, or of the stack."""
    if not isinstance(weight, ScaledWeight):
        return _part(weight, axis, where)
    rows, columns = weight.rows, weight.columns
    if axis % 2 == 0 and rows is not None and rows.ndim:
        rows = rows[where]
    if axis % 2 == 1 and columns is not None and columns.ndim:
        columns = columns[where]
    return ScaledWeight.make(_part(weight.weight, axis, where), rows, columns)


def _part(weight: LowRankWeight, axis: int, where: slice) -> PerturbedWeight:
    axis %= weight.ndim
    noise = weight.noise
    # The factors have one more axis in front, that of the draws; rows are those of A, columns those of B.
    index = (slice(None),) * (axis + 1) + (where,)
    A, B = noise.A, noise.B
    if axis < weight.ndim - 2:
        A, B = A[index], B[index]
    elif axis == weight.ndim - 2:
        A = A[index]
    else:
        B = B[(slice(None),) * axis + (where,)]
    return PerturbedWeight.make(plain(weight)[index[1:]], noise.having(A, B))


def layer(weight: PerturbedWeight, index: int) -> PerturbedWeight:
    """One layer of a stack."""
    noise = weight.noise
    return PerturbedWeight.make(plain(weight)[index], noise.having(noise.A[:, index], noise.B[:, index]))


def _row(weight: PerturbedWeight, index: int) -> Tensor:
    """One row of a matrix, as a vector of the member."""
    A, B = weight.noise.of_member()
    return plain(weight)[index] + A[index] @ B.mT


_T: Any = torch.Tensor.T
_MT: Any = torch.Tensor.mT
_H: Any = torch.Tensor.H
_MH: Any = torch.Tensor.mH
_DATA: Any = torch.Tensor.data


@rule(_T.__get__, _H.__get__, torch.t, torch.Tensor.t, of=EITHER)
def _t(input):
    return transposed(input) if input.is_matrix else NotImplemented


@rule(_MT.__get__, _MH.__get__, torch.adjoint, torch.Tensor.adjoint, of=EITHER)
def _m_t(input):
    return transposed(input) if input.noise.kernel is None else NotImplemented


@rule(torch.transpose, torch.Tensor.transpose, of=EITHER)
@rule(torch.swapaxes, torch.Tensor.swapaxes, torch.swapdims, torch.Tensor.swapdims, of=EITHER)
def _transpose(input, dim0, dim1):
    if input.noise.kernel is not None:
        return NotImplemented
    dims = {_axis(input, dim) for dim in (dim0, dim1)}
    if len(dims) == 1:
        return input
    return transposed(input) if dims == {input.ndim - 2, input.ndim - 1} else NotImplemented


@rule(torch.permute, torch.Tensor.permute, of=EITHER)
def _permute(input, *args, dims=None):
    order = [_axis(input, dim) for dim in (_flat(args) if dims is None else dims)]
    identity = list(range(input.ndim))
    if input.noise.kernel is not None:
        return NotImplemented
    if order == identity:
        return input
    return transposed(input) if order == [*identity[:-2], identity[-1], identity[-2]] else NotImplemented


@rule(torch.movedim, torch.Tensor.movedim, torch.moveaxis, torch.Tensor.moveaxis, of=EITHER)
def _movedim(input, source, destination):
    # The axes of a tensor without storage are moved in its place.
    axes = torch.empty(list(range(2, 2 + input.ndim)), device="meta").movedim(source, destination).shape
    return _permute(input, [length - 2 for length in axes])


@rule(torch.Tensor.__getitem__)
def _getitem(input, index):
    if isinstance(index, Tensor):
        is_lookup = input.is_matrix and index.dtype in (torch.int64, torch.int32)
        return rows(input, index) if is_lookup else NotImplemented
    indices = index if isinstance(index, tuple) else (index,)
    if indices and indices[0] is None:
        inside = _getitem(input, indices[1:])
        return inside if inside is NotImplemented else inside.unsqueeze(0)
    if input.noise.kernel is not None or not all(
        isinstance(i, slice) or i is Ellipsis or (isinstance(i, int) and not isinstance(i, bool)) for i in indices
    ):
        return NotImplemented
    if Ellipsis in indices:
        place = indices.index(Ellipsis)
        missing = input.ndim - (len(indices) - 1)
        indices = (*indices[:place], *(slice(None),) * missing, *indices[place + 1 :])
    plain(input)[index]  # raises what PyTorch says of indices that do not fit
    return _apply_indices(input, indices)


@rule(torch.index_select, torch.Tensor.index_select)
def _index_select(input, dim, index):
    if not input.is_matrix:
        return NotImplemented
    index = index.reshape(-1)
    return rows(input, index) if dim % 2 == 0 else rows(transposed(input), index).mT


@rule(torch.narrow, torch.Tensor.narrow, of=EITHER)
def _narrow(input, dim, start, length):
    if input.noise.kernel is not None or isinstance(start, Tensor):
        return NotImplemented
    plain(input).narrow(dim, start, length)  # raises what PyTorch says of a range that does not fit
    start += input.shape[dim] if start < 0 else 0
    return part(input, dim, slice(start, start + length))


@rule(torch.select, torch.Tensor.select)
def _select(input, dim, index):
    if input.noise.kernel is not None:
        return NotImplemented
    dim = _axis(input, dim)
    return _apply_indices(input, (*(slice(None),) * dim, index))


@rule(torch.unbind, torch.Tensor.unbind, torch.Tensor.__iter__)
def _unbind(input, dim=0):
    if input.noise.kernel is not None or dim % input.ndim != 0:
        return NotImplemented
    layers = tuple(_apply_indices(input, (index,)) for index in range(input.shape[0]))
    return NotImplemented if any(layer is NotImplemented for layer in layers) else layers


@rule(torch.split, torch.Tensor.split, of=EITHER)
def _split(input, split_size_or_sections, dim=0):
    if input.noise.kernel is not None:
        return NotImplemented
    plain(input).split(split_size_or_sections, dim)  # raises what PyTorch says of sections that do not fit
    length = input.shape[dim]
    if isinstance(split_size_or_sections, int):
        step = split_size_or_sections
        bounds = [*range(0, length, step), length]
    else:
        bounds = [0]
        for section in split_size_or_sections:
            bounds.append(bounds[-1] + section)
    return tuple(part(input, dim, slice(a, b)) for a, b in pairwise(bounds))


@rule(torch.chunk, torch.Tensor.chunk, of=EITHER)
def _chunk(input, chunks, dim=0):
    return _split(input, -(-input.shape[dim] // chunks), dim)


@rule(torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
def _reshape(input, *shape):
    target = _flat(shape)
    if not all(isinstance(length, int) for length in target):
        return NotImplemented
    return _reshaped(input, target)


@rule(torch.unsqueeze, torch.Tensor.unsqueeze)
def unsqueezed(input, dim):
    """Another axis of length 1, in front of those of the matrices."""
    noise, axis = input.noise, dim % (input.ndim + 1)
    if noise.kernel is not None or axis > input.ndim - 2:
        return _reshaped(input, plain(input).unsqueeze(dim).shape)
    return PerturbedWeight.make(
        plain(input).unsqueeze(dim), noise.having(noise.A.unsqueeze(axis + 1), noise.B.unsqueeze(axis + 1))
    )


@rule(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(input, dim=None):
    if not isinstance(dim, int):
        return NotImplemented
    noise, axis = input.noise, _axis(input, dim)
    if input.shape[axis] != 1:
        return input
    if noise.kernel is not None or axis >= input.ndim - 2:
        return _reshaped(input, plain(input).squeeze(dim).shape)
    return PerturbedWeight.make(
        plain(input).squeeze(axis), noise.having(noise.A.squeeze(axis + 1), noise.B.squeeze(axis + 1))
    )


@rule(torch.Tensor.expand)
def _expand(input, *sizes):
    noise, base = input.noise, plain(input).expand(*sizes)
    if noise.kernel is not None or base.shape[-2:] != input.shape[-2:]:
        return NotImplemented
    *stack, _, _ = base.shape
    more = (1,) * (base.ndim - input.ndim)
    A, B = (
        factor.reshape(len(factor), *more, *factor.shape[1:]).expand(-1, *stack, -1, -1)
        for factor in (noise.A, noise.B)
    )
    return PerturbedWeight.make(base, noise.having(A, B))


@rule(torch.Tensor.reshape_as, torch.Tensor.view_as)
def _reshape_as(input, other):
    if not isinstance(input, PerturbedWeight):
        return input.reshape(other.shape)  # like a weight, of which that is all that counts
    return _reshaped(input, other.shape)


@rule(torch.flatten, torch.Tensor.flatten)
def _flatten(input, start_dim=0, end_dim=-1):
    start, end = start_dim % input.ndim, end_dim % input.ndim
    return _reshaped(input, [*input.shape[:start], -1, *input.shape[end + 1 :]])


@rule(torch.unflatten, torch.Tensor.unflatten)
def _unflatten(input, dim, sizes):
    dim %= input.ndim
    return _reshaped(input, [*input.shape[:dim], *sizes, *input.shape[dim + 1 :]])


@rule(torch.Tensor.to)
def _to(input, *args, **kwargs):
    args = tuple(plain(arg) if isinstance(arg, PerturbedWeight) else arg for arg in args)
    if not isinstance(input, PerturbedWeight):
        return input.to(*args, **kwargs)  # like a weight, of which that is all that counts
    return _cast(input, lambda tensor: tensor.to(*args, **kwargs))


@rule(torch.Tensor.type_as)
def _type_as(input, other):
    if not isinstance(input, PerturbedWeight):
        return input.to(other.dtype)
    return _cast(input, lambda tensor: tensor.to(other.dtype))


@rule(torch.Tensor.type)
def _type(input, dtype=None, non_blocking=False):
    if dtype is None:
        return plain(input).type()
    return _cast(input, lambda tensor: tensor.type(dtype, non_blocking))


for _method, _dtype in (
    (torch.Tensor.float, torch.float32),
    (torch.Tensor.half, torch.float16),
    (torch.Tensor.bfloat16, torch.bfloat16),
    (torch.Tensor.double, torch.float64),
):
    rule(_method)(lambda input, _dtype=_dtype: _cast(input, lambda tensor: tensor.to(_dtype)))


_COPIES = (torch.Tensor.detach, torch.detach, torch.Tensor.contiguous, torch.clone, torch.Tensor.clone)


@rule(_DATA.__get__, *_COPIES, of=EITHER)
def _same(input, **kwargs):
    return input


def _apply_indices(weight: PerturbedWeight, indices: Sequence[Any]) -> Any:
    axis = 0
    current: Any = weight
    for index in indices:
        if isinstance(index, slice):
            current = part(current, axis, index)
            axis += 1
        elif axis == 0 and current.ndim > 2:
            current = layer(current, index)
        elif axis == 0 and current.ndim == 2 and len(indices) == 1:
            return _row(current, index)
        else:
            return NotImplemented
    return current


def _reshaped(weight: PerturbedWeight, shape: Sequence[int]) -> Any:
    """Another shape that leaves rows or columns whole: a stack of fewer rows, or a convolution kernel of a matrix."""
    noise, base = weight.noise, plain(weight)
    target = _resolved(shape, base.numel())
    if target == list(base.shape):
        return weight
    if noise.kernel is not None:
        matrix = [noise.kernel[0], noise.B.shape[-2]]
        if target != matrix:
            return NotImplemented
        return PerturbedWeight.make(base.reshape(matrix), replace(noise, kernel=None))
    if base.ndim != 2 or len(target) < 2:
        return NotImplemented
    if target[-1] != base.shape[1]:
        if len(target) < 3 or target[0] != base.shape[0]:
            return NotImplemented
        return PerturbedWeight.make(base.reshape(target), replace(noise, kernel=tuple(target)))
    *stack, rows, columns = target
    A = noise.A.reshape(noise.A.shape[0], *stack, rows, -1)
    B = noise.B.reshape(noise.B.shape[0], *(1,) * len(stack), columns, -1).expand(-1, *stack, -1, -1)
    return PerturbedWeight.make(base.reshape(target), noise.having(A, B))


def _axis(weight: LowRankWeight, dim: int) -> int:
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(f"`dim` must be in [{-weight.ndim}, {weight.ndim}), got {dim}")
    return dim % weight.ndim


def _resolved(shape: Sequence[int], numel: int) -> list[int]:
    known = math.prod(length for length in shape if length != -1)
    return [numel // max(known, 1) if length == -1 else length for length in shape]


def _cast(weight: PerturbedWeight, cast: Callable[[Tensor], Tensor]) -> Any:
    noise, base = weight.noise, cast(plain(weight))
    if not base.is_floating_point():
        return NotImplemented
    return PerturbedWeight.make(base, noise.having(noise.A.to(base.dtype), noise.B.to(base.dtype)))


def _flat(values: Sequence[Any]) -> list[Any]:
    return list(values[0]) if len(values) == 1 and isinstance(values[0], tuple | list | torch.Size) else list(values)
