"""Weights times numbers and vectors, such as what their own norms give: the products stay low rank.

Norms are those of rows, ``|W + a B.T|^2 = |W|^2 + 2 a . (W B) + a (B.T B) a`` with a row ``a`` of ``scale * A``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..member_mode import FUNCTIONS
from ..perturbed import EITHER, LowRankWeight, PerturbedWeight, ScaledWeight, plain, rule, times, unwrapped
from .views import transposed

# Columns up to which a matrix is hardly more than its factors, and a row may be nearly the opposite of its noise: its
# norm is then what is left of squares that are much larger.
_NARROW = 16


@rule(torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, of=EITHER)
def _mul(input, other):
    if not isinstance(input, LowRankWeight) or (isinstance(other, LowRankWeight) and other.numel() > input.numel()):
        input, other = other, input
    return _scaled(input, other)


@rule(torch.Tensor.div, torch.div, torch.Tensor.__truediv__, of=EITHER)
def _div(input, other, *, rounding_mode=None):
    if not isinstance(input, LowRankWeight) or rounding_mode is not None:
        return NotImplemented
    if isinstance(other, Tensor) and _is_factor(input, other):
        return _scaled(input, 1 / unwrapped(other).to(input.dtype))
    return _scaled(input, 1 / other) if isinstance(other, int | float) else NotImplemented


@rule(torch.Tensor.__neg__, torch.neg, torch.Tensor.neg, of=EITHER)
def _neg(input):
    return _scaled(input, -1)


@rule(torch.norm, torch.Tensor.norm)
def _norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    covered = p in ("fro", 2, None) and out is None and dtype is None
    return _norms(input, dim, keepdim) if covered else NotImplemented


@rule(torch.linalg.vector_norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False):
    return _norms(x, dim, keepdim) if ord == 2 else NotImplemented


@rule(torch.linalg.norm)
def _linalg_norm(A, ord=None, dim=None, keepdim=False):
    return _norms(A, dim, keepdim) if ord is None or (ord == 2 and isinstance(dim, int)) else NotImplemented


@rule(F.normalize)
def _normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    norms = NotImplemented if p != 2 or out is not None else _norms(input, dim, keepdim=True)
    return norms if norms is NotImplemented else _scaled(input, 1 / norms.clamp_min(eps))


@rule(torch._weight_norm)
def _weight_norm(v, g, dim=0):
    """``g * v / |v|``, where the norm is over all axes but `dim`, or over all of them where that is -1."""
    if not isinstance(v, PerturbedWeight):
        return NotImplemented
    norms = _norms(v, _normed_together(v, dim), keepdim=True)
    return norms if norms is NotImplemented else _scaled(v, unwrapped(g) / norms)


def _answer_weight_norm(v, g, dim=0):
    """As `_weight_norm`: of another weight PyTorch would go through the members."""
    if isinstance(v, PerturbedWeight):
        return torch._weight_norm(v, g, dim)
    v = unwrapped(v)
    return v * (unwrapped(g) / torch.linalg.vector_norm(v, dim=_normed_together(v, dim), keepdim=True))


def _normed_together(v: Tensor, dim: int) -> list[int] | None:
    return None if dim == -1 else [axis for axis in range(v.ndim) if axis != dim]


def _answer_normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    """Into `out`, which `torch.vmap` does not allow, by a copy."""
    result = F.normalize(input, p, dim, eps)
    return result if out is None else out.copy_(result)


FUNCTIONS |= {torch._weight_norm: _answer_weight_norm, F.normalize: _answer_normalize}


def _is_factor(weight: LowRankWeight, factor: Any) -> bool:
    """Whether it is a number, or scales whole rows, or columns, of a matrix or a kernel, and leaves its dtype."""
    if not isinstance(factor, Tensor):
        return isinstance(factor, int | float)
    same_dtype = factor.dtype == weight.dtype or (factor.ndim == 0 and factor.is_floating_point())
    if not same_dtype or not (weight.is_matrix or weight.noise.kernel):
        return False
    of_columns = (1, weight.shape[-1]) if weight.is_matrix else (1,)
    return tuple(factor.shape) in {
        *((1,) * axes for axes in range(weight.ndim + 1)),
        (weight.shape[0], *(1,) * (weight.ndim - 1)),
        *(of_columns, of_columns[1:]),
    }


def _scaled(weight: LowRankWeight, factor: Any) -> Any:
    if not _is_factor(weight, factor):
        return NotImplemented
    if isinstance(weight, PerturbedWeight):
        weight = ScaledWeight.make(weight, None, None)
    assert isinstance(weight, ScaledWeight)
    perturbed, rows, columns = weight.weight, weight.rows, weight.columns
    if not isinstance(factor, Tensor):
        noise = perturbed.noise
        perturbed = PerturbedWeight.make(plain(perturbed) * factor, replace(noise, scales=noise.scales * factor))
        if rows is None and columns is None:
            return perturbed
    else:
        factor = unwrapped(factor).to(weight.dtype)
        if factor.ndim and factor.shape[-1] > 1:
            columns = times(factor.reshape(-1), columns)
        else:
            rows = times(factor.reshape(-1 if factor.numel() > 1 else ()), rows)
    return ScaledWeight.make(perturbed, rows, columns)


def _norms(weight: PerturbedWeight, dim: int | Sequence[int] | None, keepdim: bool) -> Any:
    """Norms of rows or columns of a matrix, of the filters of a kernel, or of the whole."""
    if not (weight.is_matrix or weight.noise.kernel):
        return NotImplemented
    everything = tuple(range(weight.ndim))
    axes = everything if dim is None else (dim,) if isinstance(dim, int) else tuple(dim) or everything
    axes = tuple(sorted(axis % weight.ndim for axis in axes))
    if axes == everything:
        norms = _norms_of_rows(weight).norm()
    elif axes == everything[1:]:
        norms = _norms_of_rows(weight)
    elif weight.is_matrix:
        norms = _norms_of_rows(transposed(weight))
    else:
        return NotImplemented
    shape = [1 if axis in axes else length for axis, length in enumerate(weight.shape)]
    return norms.reshape(shape) if keepdim else norms


def _norms_of_rows(weight: LowRankWeight) -> Tensor:
    W = plain(weight).flatten(1)
    A, B = weight.noise.of_member()  # (rows, rank), (columns, rank)
    with without_autocast(W.device):
        W, A, B = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (W, A, B))
        if math.prod(weight.shape[1:]) <= _NARROW:
            norms = (W + A @ B.mT).norm(dim=1)
        else:
            squares = W.square().sum(1) + (A * (2 * W @ B + A @ (B.mT @ B))).sum(1)
            norms = squares.clamp_min(0).sqrt()
    return norms.to(weight.dtype)
