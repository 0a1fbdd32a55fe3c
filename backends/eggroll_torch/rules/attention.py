"""Multi-head attention with perturbed projections.

`nn.MultiheadAttention` and the Transformer layers arrive here as one call of
`torch.nn.functional.multi_head_attention_forward`, because a weight among its arguments is not an ordinary tensor.
It is answered from its documented semantics: project, split into heads, attend, join, project.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..member_mode import FUNCTIONS
from ..perturbed import PerturbedWeight, rule
from .autocasting import linear
from .layers import attention, dropout


@rule(F.multi_head_attention_forward)
def _multi_head_attention(
    query,
    key,
    value,
    embed_dim_to_check,
    num_heads,
    in_proj_weight,
    in_proj_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_proj_weight,
    out_proj_bias,
    training=True,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    use_separate_proj_weight=False,
    q_proj_weight=None,
    k_proj_weight=None,
    v_proj_weight=None,
    static_k=None,
    static_v=None,
    average_attn_weights=True,
    is_causal=False,
):
    if any(isinstance(tensor, PerturbedWeight) for tensor in (query, key, value, static_k, static_v)):
        return NotImplemented
    batched = query.ndim == 3
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    itself = query is key and key is value
    # (length, batch, embedding), or without a batch, to (batch, length, embedding): so heads need not be copied.
    query, key, value = (x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (query, key, value))
    batch = query.shape[0]
    if itself and not use_separate_proj_weight:
        q, k, v = linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if bias_k is not None:
        k = torch.cat([k, bias_k.expand(batch, 1, -1)], dim=1)
        v = torch.cat([v, bias_v.expand(batch, 1, -1)], dim=1)

    def heads(x: Tensor) -> Tensor:  # (batch, length, embedding) to (batch, heads, length, head_dim)
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q = heads(q)
    k = heads(k) if static_k is None else static_k.unflatten(0, (batch, num_heads))
    v = heads(v) if static_v is None else static_v.unflatten(0, (batch, num_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(attn_mask, key_padding_mask, q, k.shape[2], num_heads, is_causal and not need_weights)
    rate = dropout_p if training else 0.0
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        shares = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        shares = dropout(shares, rate) if rate else shares
        attended = shares @ v
    else:
        attended = attention(q, k, v, mask, rate)
    out = linear(attended.transpose(1, 2).flatten(-2), out_proj_weight, out_proj_bias)
    out = out.transpose(0, 1) if batched else out.squeeze(0)
    if not need_weights:
        return out, None
    shares = shares.mean(dim=1) if average_attn_weights else shares
    return out, (shares if batched else shares.squeeze(0))


FUNCTIONS[F.multi_head_attention_forward] = _multi_head_attention


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    q: Tensor,
    source_length: int,
    num_heads: int,
    causal: bool,
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcastable to ``(batch, heads, target, source)``."""
    batch, target_length = q.shape[0], q.shape[2]
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.unflatten(0, (batch, num_heads)) if mask.ndim == 3 else mask
        # Columns that bias_k and add_zero_attn append are never masked.
        mask = F.pad(mask, (0, source_length - mask.shape[-1]))
    elif causal:
        ones = torch.ones(target_length, source_length, dtype=torch.bool, device=q.device)
        mask = _additive(ones.triu(1), q.dtype)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype).reshape(batch, 1, 1, -1)
        padding = F.pad(padding, (0, source_length - padding.shape[-1]))
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
