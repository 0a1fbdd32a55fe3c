"""Weights that are data: rows, ``W[index] + scale * A[index] @ B.T``, or what is added to activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..member_mode import FUNCTIONS
from ..perturbed import EITHER, LowRankWeight, PerturbedWeight, ScaledWeight, plain, rule, times, unwrapped
from ..policy import UnsupportedOperationError
from ..vectorising import called

__all__ = ["rows"]


def rows(weight: LowRankWeight, index: Tensor) -> Tensor:
    """``W_i[index]``: `index` of shape ``(...)``, `weight` ``(n, dim)``, result ``(..., dim)``."""
    if isinstance(weight, ScaledWeight):
        factor = weight.rows
        if factor is not None and factor.ndim:
            factor = factor[index].unsqueeze(-1)
        return times(times(rows(weight.weight, index), factor), weight.columns)
    noise = weight.noise
    return called(ops.perturbed_embedding, index, plain(weight), noise.A, noise.B, *noise.operands())


@rule(F.embedding, of=EITHER)
def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    _refuse_max_norm(weight, max_norm)
    return rows(weight, input) if weight.is_matrix else NotImplemented


@rule(torch.embedding, of=EITHER)
def _torch_embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return _embedding(indices, weight)


def _added(function: Any) -> Any:
    def answer(input, other, **how):
        x, weight = (input, other) if isinstance(other, LowRankWeight) else (other, input)
        # A sum that is larger than the weight, such as that of activations and learned positions, is none itself.
        if not isinstance(x, Tensor) or isinstance(x, LowRankWeight):
            return NotImplemented
        is_data = x.numel() > weight.numel() or x.ndim > weight.ndim
        return function(unwrapped(input), unwrapped(other), **how) if is_data else NotImplemented

    return answer


for _name in ("add", "sub", "__add__", "__radd__", "__sub__"):
    for _function in (getattr(of, _name) for of in (torch, Tensor) if hasattr(of, _name)):
        rule(_function, of=EITHER)(_added(_function))


@rule(F.embedding_bag)
def _embedding_bag(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    perturbed = isinstance(weight, PerturbedWeight)
    if perturbed:
        _refuse_max_norm(weight, max_norm)
    if (perturbed and not weight.is_matrix) or isinstance(per_sample_weights, PerturbedWeight):
        return NotImplemented
    if input.ndim == 2:
        bags, length = input.shape
        bag_of = torch.arange(bags, device=input.device).repeat_interleave(length)
        flat = input.reshape(-1)
    else:
        ends = offsets[1:]
        bags = offsets.shape[0] - int(include_last_offset)
        places = torch.arange(input.shape[0], device=input.device)
        bag_of = torch.searchsorted(ends[: bags - 1].contiguous(), places, right=True)
        flat = input
    found = rows(weight, flat) if perturbed else F.embedding(flat, weight)  # (entries, dim)
    in_bag = torch.ones_like(flat, dtype=torch.bool)
    if padding_idx is not None:
        in_bag = flat != padding_idx % weight.shape[0]
    if input.ndim == 1 and include_last_offset:
        in_bag = in_bag & (torch.arange(len(flat), device=flat.device) < offsets[-1])
    counted = in_bag.to(found.dtype)
    if mode == "max":
        found = torch.where(counted.unsqueeze(-1) > 0, found, float("-inf"))
        index = bag_of.unsqueeze(-1).expand_as(found)
        most = found.new_full((bags, found.shape[1]), float("-inf")).scatter_reduce(0, index, found, "amax")
        return torch.where(most == float("-inf"), 0.0, most)
    weights = counted if per_sample_weights is None else counted * per_sample_weights.reshape(-1)
    total = found.new_zeros(bags, found.shape[1]).index_add(0, bag_of, found * weights.unsqueeze(-1))
    if mode == "sum":
        return total
    count = counted.new_zeros(bags).index_add(0, bag_of, counted)
    return total / count.clamp(min=1).unsqueeze(-1)


def _bag_of_another_weight(input, weight, offsets=None, max_norm=None, *args, **kwargs):
    """Bags of a weight that is not perturbed, or densely: `vmap` has no batching rule for them."""
    if isinstance(weight, PerturbedWeight) or max_norm is None:
        return _embedding_bag(input, weight, offsets, max_norm, *args, **kwargs)
    return F.embedding_bag(input, weight, offsets, max_norm, *args, **kwargs)


FUNCTIONS[F.embedding_bag] = _bag_of_another_weight


def _refuse_max_norm(weight: LowRankWeight, max_norm: float | None) -> None:
    if max_norm is not None:
        raise UnsupportedOperationError(
            f"parameter {weight.noise.name!r}: an embedding with `max_norm` renormalises its weight in place, "
            f"which a member cannot do to a weight that all members share; got max_norm={max_norm!r}"
        )
