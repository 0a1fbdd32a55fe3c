"""Layers that PyTorch would compute otherwise for a population, whatever their weights: dropout, norms, attention.

A member's dropout draws from its own key. Batch normalisation in training mode uses the statistics of the member's
own batch and leaves the running ones alone. Attention has no usable batching rule in PyTorch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import member_ops
from ..autocast import autocasts
from ..derivatives import differentiates
from ..member_mode import FUNCTIONS, is_active, transformation_level, uniform, vectorised_inside
from ..perturbed import LowRankWeight, unwrapped
from ..vectorising import called

__all__ = ["attention", "dropout", "replaced"]


def replaced(input: Tensor, result: Tensor, inplace: bool) -> Tensor:
    """What a function with an `inplace` argument returns."""
    return input.copy_(result) if inplace else result


def dropout(x: Tensor, p: float, shape: torch.Size | None = None) -> Tensor:
    """`x` with elements zeroed at rate `p` and the rest scaled up; `shape` broadcasts one decision over axes of 1."""
    if not is_active() or vectorised_inside():
        return F.dropout(x, p) if shape is None else x * F.dropout(x.new_ones(shape), p)
    if not 0 <= p <= 1:
        raise ValueError(f"`p` must be a probability, got {p!r}")
    if p == 1:
        return x * 0
    keep = uniform(x.shape if shape is None else shape) >= p
    return x * (keep.to(x.dtype) / (1 - p))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whose dropout is the member's own."""
    q, k, v = unwrapped(q), unwrapped(k), unwrapped(v)
    if dropout_p == 0 and not differentiates():
        return called(member_ops.attention, q, k, v, mask, is_causal, scale, enable_gqa)
    if dropout_p == 0 and transformation_level() is None:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = (q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    shares = torch.softmax(scores, dim=-1)
    return (dropout(shares, dropout_p) if dropout_p else shares) @ v


def _answers(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            FUNCTIONS[function] = answer
        return answer

    return register


@_answers(F.dropout)
def _dropout(input, p=0.5, training=True, inplace=False):
    return replaced(input, dropout(unwrapped(input), p), inplace) if training and p else input


@_answers(torch.dropout)
def _torch_dropout(input, p, train):
    return _dropout(input, p, train)


@_answers(torch.dropout_)
def _torch_dropout_(input, p, train):
    return _dropout(input, p, train, inplace=True)


def _channel_dropout(spatial: int) -> Callable[..., Any]:
    def answer(input, p=0.5, training=True, inplace=False):
        x = unwrapped(input)
        shape = torch.Size((*x.shape[: x.ndim - spatial], *(1,) * spatial))
        return replaced(input, dropout(x, p, shape), inplace) if training and p else input

    return answer


for _function, _spatial in ((F.dropout1d, 1), (F.dropout2d, 2), (F.dropout3d, 3)):
    FUNCTIONS[_function] = _channel_dropout(_spatial)


@_answers(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        running_mean = running_var = None
    x = _widened(input, weight, running_mean)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).to(input.dtype)


@_answers(torch.batch_norm)
def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@_answers(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if use_input_stats:
        running_mean = running_var = None
    x = _widened(input, weight, running_mean)
    return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps).to(input.dtype)


def _norm(function: Callable[..., Any]) -> Callable[..., Any]:
    def answer(input, *args, **kwargs):
        out = function(input, *args, **kwargs)
        # On a CPU, or without autocast, the result has the input's dtype, which `vmap` widens to that of the weight.
        return out if input.device.type != "cpu" and autocasts(input.device) else out.to(input.dtype)

    return answer


def _group_norm(input, *args, **kwargs):
    # In another layout `torch.vmap` asks for one that it does not know.
    return F.group_norm(input.contiguous(), *args, **kwargs)


FUNCTIONS |= {F.layer_norm: _norm(F.layer_norm), F.group_norm: _norm(_group_norm), F.rms_norm: _norm(F.rms_norm)}


@_answers(torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def _data(input):
    # `torch.vmap` gives none. A low-rank weight has an answer of its own.
    if isinstance(input, LowRankWeight) or transformation_level() is None:
        return input.data
    return unwrapped(input).detach()


@_answers(torch.Tensor.requires_grad_)
def _requires_grad_(input, requires_grad=True):
    # Refused under `torch.vmap`, and without gradients of no consequence.
    if transformation_level() is not None and not torch.is_grad_enabled():
        return input
    return input.requires_grad_(requires_grad)


@_answers(torch.Tensor.contiguous)
def _contiguous(input, memory_format=torch.contiguous_format):
    if memory_format != torch.contiguous_format and transformation_level() is not None:
        return input  # `torch.vmap` knows no other layout, and numbers do not depend on it
    return input.contiguous(memory_format=memory_format)


@_answers(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(input, output_size):
    if output_size in (1, (1, 1), [1, 1]) and input.ndim in (3, 4):
        # The same numbers; PyTorch would go through the members of what lies in memory with channels last.
        return unwrapped(input).mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


def _widened(x: Tensor, *others: Tensor | None) -> Tensor:
    """`x` in the dtype of the others where that is wider, which `vmap` does not do by itself."""
    for other in others:
        x = x if other is None else x.to(torch.promote_types(x.dtype, other.dtype))
    return x


@_answers(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
