"""The operations on a perturbed weight, each for a whole chunk of members at once.

Under `torch.vmap` over members an operation sees one member; its batching rule sees all of them and does what no
composition of batched PyTorch operations would: the product with the shared weight once for all rows (once at all,
where the inputs are shared), the rank-`r` term once for each draw, added in place while the rows are in the cache.

Each is a `torch.library` operation, so a compiler sees through it and a kernel can take its place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .drawing import draw_uniforms, fold_in_each
from .vectorising import batching_rule, called

__all__ = [
    "attention",
    "member_uniform",
    "perturbed_dense",
    "perturbed_embedding",
    "perturbed_linear",
    "perturbed_stacked_linear",
    "sparse_product",
]

# Bytes of a block of rows: they stay in the last-level cache from what is added first to the product, and a block is
# large enough for a product that keeps all cores busy.
_BLOCK_BYTES = 1 << 24


@torch.library.custom_op("eggroll::perturbed_linear", mutates_args=())
def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    bias_noise: Sequence[Tensor],
    rank: int,
    precision: str,
    rng: str,
    member: Tensor,
    scales: Tensor,
) -> Tensor:
    """``x @ W_i.T + bias`` with ``W_i = W + scales[i] * A[d] @ B[d].T`` for one member ``i``.

    Args:
        x: shape ``(..., in)``.
        weight: shape ``(out, in)``.
        bias: shape ``(out,)``, or None.
        factors: `A`, shape ``(draws, out, rank)``, and `B`, ``(draws, in, rank)``; or, for kernels that draw them,
            their keys, int32 of shape ``(draws, 2)``.
        bias_noise: nothing; or, for kernels that draw the noise of the bias, its keys and the members' scales, as
            `perturbed_dense` has them.
        rank: columns of each factor.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.
        member: int64, shape ``()``, the member's place in the chunk. Under `vmap` over members it is
            ``0 .. members - 1``; draw ``d`` is ``member // (members / draws)``.
        scales: float32, shape ``(members,)``: ``sigma / sqrt(rank)`` times the member's sign.

    Returns:
        Shape ``(..., out)``.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    *factors, scale = _one_member(*factors, member=member, scales=scales)
    if bias_noise:
        bias_noise = _one_member(bias_noise[0], member=member, scales=bias_noise[1])
    out = _linear_of_members(rows, weight, bias, factors, bias_noise, rank, precision, rng, scale)
    return out.view(*x.shape[:-1], weight.shape[0])


@perturbed_linear.register_fake
def _(x, weight, bias, factors, bias_noise, rank, precision, rng, member, scales):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@batching_rule(perturbed_linear)
def _(info, in_dims, x, weight, bias, factors, bias_noise, rank, precision, rng, member, scales):
    x_dim, _, bias_dim, *_, member_dim, _ = in_dims
    x = _batch_first(x, x_dim)
    bias = _batch_first(bias, bias_dim)
    if member_dim is None:
        # A vmap inside the model: the same member, more rows.
        if x_dim is None:
            x = x.expand(info.batch_size, *x.shape)
        shared = None if bias_dim is not None else bias
        out = called(perturbed_linear, x, weight, shared, factors, bias_noise, rank, precision, rng, member, scales)
        if bias_dim is not None:
            out = out + bias.view(bias.shape[0], *(1,) * (out.ndim - 2), -1)
        return out, 0
    lead = x.shape[:-1] if x_dim is None else x.shape[1:-1]
    rows = x.reshape(-1, x.shape[-1]) if x_dim is None else x.reshape(x.shape[0], -1, x.shape[-1])
    out = _linear_of_members(rows, weight, bias, factors, bias_noise, rank, precision, rng, scales)
    return out.view(out.shape[0], *lead, weight.shape[0]), 0


@torch.library.custom_op("eggroll::perturbed_dense", mutates_args=())
def perturbed_dense(weight: Tensor, keys: Tensor, precision: str, rng: str, member: Tensor, scales: Tensor) -> Tensor:
    """``W + scales[i] * Z[d]`` for one member ``i``, drawn by a kernel; see `perturbed_linear`.

    Args:
        weight: any shape.
        keys: int32, shape ``(draws, 2)``.
        scales: float32, shape ``(members,)``: ``sigma`` times the member's sign.

    Returns:
        The shape of `weight`.
    """
    keys, scale = _one_member(keys, member=member, scales=scales)
    return _dense_of_members(weight, keys, scale, precision, rng).squeeze(0)


@perturbed_dense.register_fake
def _(weight, keys, precision, rng, member, scales):
    return weight.new_empty(weight.shape)


@batching_rule(perturbed_dense)
def _(info, in_dims, weight, keys, precision, rng, member, scales):
    return _dense_of_members(weight, keys, scales, precision, rng), 0


@torch.library.custom_op("eggroll::perturbed_stacked_linear", mutates_args=())
def perturbed_stacked_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, member: Tensor, scales: Tensor
) -> Tensor:
    """``x[e] @ W_i[e].T`` for each matrix ``e`` of a stack, for one member ``i``; see `perturbed_linear`.

    Args:
        x: shape ``(stack, rows, in)``.
        weight: shape ``(stack, out, in)``.
        A: shape ``(draws, stack, out, rank)``.
        B: shape ``(draws, stack, in, rank)``.

    Returns:
        Shape ``(stack, rows, out)``.
    """
    A, B, scale = _one_member(A, B, member=member, scales=scales)
    return _stacked_linear_of_members(x.unsqueeze(0), weight, A, B, scale).squeeze(0)


@perturbed_stacked_linear.register_fake
def _(x, weight, A, B, member, scales):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[1])


@batching_rule(perturbed_stacked_linear)
def _(info, in_dims, x, weight, A, B, member, scales):
    x_dim, member_dim = in_dims[0], in_dims[4]
    x = _batch_first(x, x_dim) if x_dim is not None else x.expand(info.batch_size, *x.shape)
    if member_dim is None:
        # A vmap inside the model: the same member, more rows.
        rows = x.transpose(0, 1).flatten(1, 2)
        out = called(perturbed_stacked_linear, rows, weight, A, B, member, scales)
        return out.unflatten(1, (x.shape[0], x.shape[2])), 1
    return _stacked_linear_of_members(x, weight, A, B, scales), 0


@torch.library.custom_op("eggroll::perturbed_embedding", mutates_args=())
def perturbed_embedding(
    index: Tensor, weight: Tensor, A: Tensor, B: Tensor, member: Tensor, scales: Tensor
) -> Tensor:
    """Rows ``W_i[index]`` of the perturbed weight of one member ``i``; see `perturbed_linear`.

    Args:
        index: integer, shape ``(...)``.
        weight: shape ``(num_embeddings, embedding_dim)``.

    Returns:
        Shape ``(..., embedding_dim)``.
    """
    A, B, scale = _one_member(A, B, member=member, scales=scales)
    out = _embedding_of_members(index.reshape(1, -1), weight, A, B, scale)
    return out.view(*index.shape, weight.shape[1])


@perturbed_embedding.register_fake
def _(index, weight, A, B, member, scales):
    return weight.new_empty(*index.shape, weight.shape[1])


@batching_rule(perturbed_embedding)
def _(info, in_dims, index, weight, A, B, member, scales):
    index_dim, member_dim = in_dims[0], in_dims[4]
    index = _batch_first(index, index_dim)
    if member_dim is None:
        return called(perturbed_embedding, index, weight, A, B, member, scales), 0
    lead = index.shape if index_dim is None else index.shape[1:]
    flat = index.reshape(1, -1).expand(scales.shape[0], -1) if index_dim is None else index.flatten(1)
    out = _embedding_of_members(flat, weight, A, B, scales)
    return out.view(out.shape[0], *lead, weight.shape[1]), 0


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


@torch.library.custom_op("eggroll::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout; members become rows of its batch."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


@attention.register_fake
def _(q, k, v, mask, is_causal, scale, enable_gqa):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


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


def _linear_of_members(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    bias_noise: Sequence[Tensor],
    rank: int,
    precision: str,
    rng: str,
    scales: Tensor,
) -> Tensor:
    """`perturbed_linear` for all members of a chunk.

    Args:
        x: shape ``(rows, in)``, shared by the members, or ``(members, rows, in)``.
        bias: shape ``(out,)``, shared, or ``(members, out)``, or None.

    Returns:
        Shape ``(members, rows, out)``.
    """
    if kernels.usable(x):
        from .kernels.linear import linear_of_members, linear_of_members_drawn

        how = *(bias_noise or (None, None)), precision, rng
        if len(factors) == 1:
            return called(linear_of_members_drawn, x, weight, bias, factors[0], rank, scales, 1.0, *how)
        return called(linear_of_members, x, weight, bias, *factors, scales, 1.0, *how)
    A, B = factors
    members, (draws, out_features) = scales.shape[0], A.shape[:2]
    copies = members // draws
    shared = x.ndim == 2
    rows, in_features = x.shape[-2:]
    out = x.new_empty(members, rows, out_features)
    if out.numel() == 0:
        return out
    own_bias = bias if bias is not None and bias.ndim == 2 else None
    base = torch.nn.functional.linear(x, weight, None if own_bias is not None else bias) if shared else None
    scales = scales.to(x.dtype).view(draws, copies, 1, 1)
    for draw in range(0, draws, step := _draws_in_block(x, copies * rows * max(in_features, out_features))):
        here, these = slice(draw, draw + step), slice(draw * copies, (draw + step) * copies)
        block, A_, B_ = out[these], A[here], B[here]  # `block`: (members of the block, rows, out)
        if base is not None:
            left = _shared_projection(x, B_).unsqueeze(1) * scales[here]  # (draws, copies, rows, rank)
            _outer_into(block, base, left, A_)
            if own_bias is not None:
                block.add_(own_bias[these].unsqueeze(1))
        else:
            # The small terms first: the product with the weight adds to them while they are in the cache.
            x_ = x[these].reshape(-1, in_features)
            left = _projection(x_.view(-1, copies * rows, in_features), B_)
            left = left.view(-1, copies, rows, left.shape[-1]) * scales[here]
            _outer_into(block, bias if own_bias is None else own_bias[these].unsqueeze(1), left, A_)
            flat = block.view(-1, out_features)
            torch.addmm(flat, x_, weight.mT, out=flat)
    return out


def _dense_of_members(weight: Tensor, keys: Tensor, scales: Tensor, precision: str, rng: str) -> Tensor:
    from .kernels.dense import dense_of_members

    return called(dense_of_members, weight, keys, scales, precision, rng)


def _stacked_linear_of_members(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """`perturbed_stacked_linear` for all members of a chunk: `x` of shape ``(members, stack, rows, in)``."""
    members, stack, rows, in_features = x.shape
    draws, _, out_features, rank = A.shape
    copies = members // draws
    by_matrix = x.transpose(0, 1).reshape(stack, members * rows, in_features)
    out = torch.bmm(by_matrix, weight.mT)  # (stack, members * rows, out)
    by_draw = by_matrix.reshape(stack * draws, copies * rows, in_features)
    projected = _projection(by_draw, B.transpose(0, 1).reshape(-1, in_features, rank))
    scales = scales.to(x.dtype).view(1, draws, copies, 1, 1)
    projected = projected.reshape(stack, draws, copies, rows, rank) * scales
    _add_outer_(
        out.view(stack * draws, copies * rows, out_features),
        projected.view(stack * draws, copies * rows, rank),
        A.transpose(0, 1).reshape(-1, out_features, rank),
    )
    return out.view(stack, members, rows, out_features).transpose(0, 1).contiguous()


def _embedding_of_members(index: Tensor, weight: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """`perturbed_embedding` for all members of a chunk: `index` of shape ``(members, rows)``."""
    draws, _, rank = A.shape
    copies, rows = index.shape[0] // draws, index.shape[1]
    out = torch.nn.functional.embedding(index, weight)  # (members, rows, dim)
    by_draw = index.reshape(draws, copies * rows)
    picked = A.gather(1, by_draw.unsqueeze(-1).expand(-1, -1, rank)).view(draws, copies, rows, rank)
    picked = (picked * scales.to(weight.dtype).view(draws, copies, 1, 1)).flatten(1, 2)
    _add_outer_(out.view(draws, copies * rows, weight.shape[1]), picked, B)
    return out


def _add_outer_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right.T`` for each draw: `left` ``(draws, rows, rank)``, `right` ``(draws, n, rank)``."""
    if left.shape[-1] == 1:
        out.addcmul_(left, right.mT)
    else:
        out.baddbmm_(left, right.mT)


def _outer_into(out: Tensor, start: Tensor | None, left: Tensor, right: Tensor) -> None:
    """``out = start + left @ right.T``, where `start` broadcasts against `out`, or is nothing.

    Args:
        out: shape ``(draws * copies, rows, n)``.
        left: shape ``(draws, copies, rows, rank)``.
        right: shape ``(draws, n, rank)``.
    """
    draws, copies, rows, rank = left.shape
    if rank > 1:
        if start is None:
            out.zero_()
        else:
            out.copy_(start)
        out.view(draws, copies * rows, -1).baddbmm_(left.flatten(1, 2), right.mT)
        return
    by_draw = out.view(draws, copies, rows, -1)
    right = right.view(draws, 1, 1, -1)
    if start is None:
        torch.mul(left, right, out=by_draw)
    else:
        if start.ndim == 3:
            start = start.view(draws, copies, 1, -1)
        torch.addcmul(start, left, right, out=by_draw)


def _projection(x: Tensor, B: Tensor) -> Tensor:
    """``x @ B`` for each draw, shape ``(draws, rows, rank)``.

    Written as its transpose, which CPU libraries run two and a half times as fast: their kernels expect a wide
    result, not a tall one. One row is too few for them, too: vectors are taken in twos, and of the four products
    those of a draw with its own rows are kept.
    """
    draws, rows, in_features = x.shape
    if x.device.type != "cpu" or B.shape[-1] > 1 or draws % 2:
        return torch.bmm(B.mT, x.mT).mT
    both = torch.bmm(B.reshape(-1, 2, in_features), x.view(-1, 2 * rows, in_features).mT)
    return both.view(-1, 2, 2, rows).diagonal(dim1=1, dim2=2).mT.reshape(draws, rows, 1)


def _shared_projection(x: Tensor, B: Tensor) -> Tensor:
    """``x @ B[d]`` for each draw, as one product; shape ``(draws, rows, rank)``."""
    draws, in_features, rank = B.shape
    flat = x @ B.permute(1, 0, 2).reshape(in_features, draws * rank)
    return flat.view(-1, draws, rank).permute(1, 0, 2)


def _one_member(*factors: Tensor, member: Tensor, scales: Tensor) -> list[Tensor]:
    """The draw of one member from factors, or keys, of all, with an axis of length 1 over draws; and its scale."""
    member = member.view(1)
    draw = member // (scales.shape[0] // factors[0].shape[0])
    return [*(factor.index_select(0, draw) for factor in factors), scales.index_select(0, member)]


def _draws_in_block(x: Tensor, elements_of_a_draw: int) -> int:
    if x.device.type != "cpu":
        return 2**31
    return max(1, _BLOCK_BYTES // max(1, elements_of_a_draw * x.element_size()))


def _batch_first(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    return tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
