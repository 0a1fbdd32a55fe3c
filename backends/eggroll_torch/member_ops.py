"""Operations of members that no weight has to take part in: attention, sparse products, random numbers of their own.

Each is a `torch.library` operation with a batching rule, as those on weights are; see `eggroll_torch.ops`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .drawing import draw_uniforms, fold_in_each
from .vectorising import batching_rule, called

__all__ = ["attention", "member_uniform", "sparse_product", "uniforms_of_members"]


@torch.library.custom_op("eggroll::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout; members become rows of its batch.

    Returns:
        Shape ``(..., heads, length, head_dim)``; in memory heads are side by side, as PyTorch writes them and
        models join them.
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.contiguous() if out.ndim < 3 else out.transpose(-3, -2).contiguous().transpose(-3, -2)


@attention.register_fake
def _(q, k, v, mask, is_causal, scale, enable_gqa):
    if q.ndim < 3:
        return q.new_empty(q.shape[0], v.shape[-1])
    *lead, heads, length, _ = q.shape
    return q.new_empty(*lead, length, heads, v.shape[-1]).transpose(-3, -2)


@batching_rule(attention)
def _(info, in_dims, q, k, v, mask, is_causal, scale, enable_gqa):
    members = info.batch_size
    q, k, v = (
        x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((q, k, v), in_dims[:3], strict=True)
    )
    lead = q.shape[1:-3] if q.ndim > 4 else q.shape[1:-2]
    keep = q.shape[-3:] if q.ndim > 4 else q.shape[-2:]
    if mask is not None:
        mask = _mask_of_members(mask, in_dims[3], members, q.ndim - 1, lead)
    q, k, v = (x.flatten(0, len(lead)) for x in (q, k, v))
    out = called(attention, q, k, v, mask, is_causal, scale, enable_gqa)
    return out.view(members, *lead, *keep[:-1], v.shape[-1]), 0


def _mask_of_members(mask: Tensor, dim: int | None, members: int, ndim: int, lead: torch.Size) -> Tensor:
    """A mask for queries whose axes `lead` were folded into one with that of the members."""
    if dim is None and mask.ndim <= ndim - len(lead):
        return mask
    mask = mask.expand(members, *mask.shape) if dim is None else mask.movedim(dim, 0)
    mask = mask.reshape(members, *(1,) * (ndim + 1 - mask.ndim), *mask.shape[1:])
    return mask.expand(members, *lead, *mask.shape[1 + len(lead) :]).flatten(0, len(lead))


@torch.library.custom_op("eggroll::sparse_product", mutates_args=())
def sparse_product(sparse: Tensor, dense: Tensor) -> Tensor:
    """``sparse @ dense``: shapes ``(n, m)`` and ``(m, ...)``, result ``(n, ...)``."""
    return torch.sparse.mm(sparse, dense.reshape(dense.shape[0], -1)).view(-1, *dense.shape[1:])


@sparse_product.register_fake
def _(sparse, dense):
    return dense.new_empty(sparse.shape[0], *dense.shape[1:])


@batching_rule(sparse_product)
def _(info, in_dims, sparse, dense):
    # The columns of all members side by side; `torch.vmap` takes no sparse tensors, so there is one for all of them.
    return called(sparse_product, sparse, dense.movedim(in_dims[1], 1)), 1


@torch.library.custom_op("eggroll::member_uniform", mutates_args=())
def member_uniform(key: Tensor, call: int, member: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1) from ``fold_in(fold_in(key, call), member)``, float32.

    Args:
        key: int32, shape ``(2,)``.
        call: which of the draws of a member this is.
        member: int64, shape ``()``.
        shape: of the result.
    """
    return uniforms_of_members(key, call, member, shape)


@member_uniform.register_fake
def _(key, call, member, shape):
    return key.new_empty(shape, dtype=torch.float32)


@batching_rule(member_uniform)
def _(info, in_dims, key, call, member, shape):
    return called(uniforms_of_members, key, call, member, shape), 0


# An operation of its own: what draws on a CPU is no operation of PyTorch, and would not be recorded.
@torch.library.custom_op("eggroll::uniforms_of_members", mutates_args=())
def uniforms_of_members(key: Tensor, call: int, members: Tensor, shape: Sequence[int]) -> Tensor:
    """`member_uniform` for int64 members of any shape: float32, shape ``(*members.shape, *shape)``."""
    # Filled on the device: a copy of the number from the host would be waited for.
    call_key = fold_in_each(key.view(1, 2), torch.full((1,), call, dtype=torch.int32, device=key.device)).view(1, 2)
    keys = fold_in_each(call_key, members.reshape(-1).to(torch.int32))
    return draw_uniforms(keys.view(*members.shape, 2), shape)


@uniforms_of_members.register_fake
def _(key, call, members, shape):
    return key.new_empty((*members.shape, *shape), dtype=torch.float32)
