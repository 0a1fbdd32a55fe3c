"""A stack of matrices, one for each group of rows: the experts of a mixture, for a whole chunk of members.

Rows of all members that go to one expert are multiplied with its shared weight at once.
"""

import torch
from torch import Tensor

from .ops import one_member
from .vectorising import batching_rule, called

__all__ = ["grouped_linear", "perturbed_grouped_linear", "unperturbed_grouped_linear"]


@torch.library.custom_op("eggroll::perturbed_grouped_linear", mutates_args=())
def perturbed_grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, A: Tensor, B: Tensor, member: Tensor, scales: Tensor
) -> Tensor:
    """``x[ends[e - 1]:ends[e]] @ W_i[e].T`` for each matrix ``e`` of a stack, for one member ``i``.

    See `perturbed_linear` of `eggroll_torch.ops`. Rows from ``ends[-1]`` on have any values.

    Args:
        x: shape ``(rows, in)``.
        weight: shape ``(stack, out, in)``.
        ends: int32, shape ``(stack,)``, ascending: where the rows of each matrix end.
        A: shape ``(draws, stack, out, rank)``.
        B: shape ``(draws, stack, in, rank)``.
        member: int64, shape ``()``, the member's place in the chunk.
        scales: float32, shape ``(members,)``.

    Returns:
        Shape ``(rows, out)``.
    """
    A, B, scale = one_member(A, B, member=member, scales=scales)
    return _of_members(x.unsqueeze(0), weight, ends.unsqueeze(0), A, B, scale).squeeze(0)


@perturbed_grouped_linear.register_fake
def _(x, weight, ends, A, B, member, scales):
    return x.new_empty(x.shape[0], weight.shape[1])


@batching_rule(perturbed_grouped_linear)
def _(info, in_dims, x, weight, ends, A, B, member, scales):
    x_dim, _, ends_dim, _, _, member_dim, _ = in_dims
    x, ends = _with_inputs_first(x, x_dim), _with_inputs_first(ends, ends_dim)
    if member_dim is not None:
        return _of_members(x, weight, ends, A, B, scales), 0
    # A vmap inside the model: one member with several inputs.
    inputs = zip(x.expand(info.batch_size, -1, -1), ends.expand(info.batch_size, -1), strict=True)
    outputs = [called(perturbed_grouped_linear, rows, weight, their, A, B, member, scales) for rows, their in inputs]
    return torch.stack(outputs), 0


@torch.library.custom_op("eggroll::unperturbed_grouped_linear", mutates_args=())
def unperturbed_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`perturbed_grouped_linear` without noise: for a weight that is frozen, or has dense noise."""
    return torch._grouped_mm(x, weight.mT, offs=ends)


@unperturbed_grouped_linear.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@batching_rule(unperturbed_grouped_linear)
def _(info, in_dims, x, weight, ends):
    x, ends = _with_inputs_first(x, in_dims[0]), _with_inputs_first(ends, in_dims[2])
    if in_dims[1] is None:
        return _base(x, weight, ends)[0], 0
    members = (
        tensor.expand(info.batch_size, *tensor.shape[1:]) for tensor in (x, weight.movedim(in_dims[1], 0), ends)
    )
    return torch.stack([called(unperturbed_grouped_linear, *member) for member in zip(*members, strict=True)]), 0


def _with_inputs_first(tensor: Tensor, dim: int | None) -> Tensor:
    """`tensor` with the axis that is vectorised over in front, of length 1 where there is none."""
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _of_members(x: Tensor, weight: Tensor, ends: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """`perturbed_grouped_linear` for all members of a chunk.

    Args:
        x: shape ``(members, rows, in)``, or ``(1, rows, in)``, shared.
        ends: shape ``(members, stack)``, or ``(1, stack)``, shared.

    Returns:
        Shape ``(members, rows, out)``.
    """
    members, draws = scales.shape[0], A.shape[0]
    base, group = _base(x, weight, ends)
    out = base.repeat(members // len(base), 1, 1)
    rows = members // draws * x.shape[1]
    x = x.expand(members, -1, -1).reshape(draws, rows, 1, x.shape[-1])
    group = group.clamp_(max=len(weight) - 1).expand(members, -1).reshape(draws, rows)
    of_draw, scales = torch.arange(draws, device=x.device).unsqueeze(1), scales.to(x.dtype).view(-1, 1, 1)
    # Column by column: each is gathered for every row.
    for a, b in zip(A.unbind(-1), B.unbind(-1), strict=True):
        projected = (x @ b[of_draw, group].unsqueeze(-1)).view(*out.shape[:2], 1)
        out.addcmul_(projected * scales, a[of_draw, group].view_as(out))
    return out


def _base(x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """What `_of_members` returns without noise, and the group of each row; once, if neither is a member's own."""
    rows = torch.arange(x.shape[1], dtype=ends.dtype, device=x.device).expand(len(ends), -1)
    group = torch.searchsorted(ends.contiguous(), rows.contiguous(), right=True)
    inputs = max(len(x), len(ends))
    return grouped_linear(x.expand(inputs, -1, -1), weight, group.expand(inputs, -1)), group


# An operation of its own: PyTorch knows the shape that `_grouped_mm` returns for bfloat16 alone.
@torch.library.custom_op("eggroll::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """``x[i, row] @ weight[group[i, row]].T``, all rows of a group at once.

    Args:
        x: shape ``(inputs, rows, in)``.
        weight: shape ``(stack, out, in)``.
        group: int64, shape ``(inputs, rows)``; rows whose group is ``stack`` have any values.

    Returns:
        Shape ``(inputs, rows, out)``.
    """
    order = group.flatten().argsort(stable=True)
    every = torch.arange(len(weight), device=x.device)
    ends = torch.searchsorted(group.flatten()[order], every, right=True, out_int32=True)
    product = torch._grouped_mm(x.flatten(0, 1)[order], weight.mT, offs=ends)
    return torch.empty_like(product).index_copy_(0, order, product).view(*x.shape[:2], product.shape[1])


@grouped_linear.register_fake
def _(x, weight, group):
    return x.new_empty(*x.shape[:2], weight.shape[1])


@batching_rule(grouped_linear)
def _(info, in_dims, x, weight, group):
    """A vmap inside the model."""
    x, group = (
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in ((x, in_dims[0]), (group, in_dims[2]))
    )
    if in_dims[1] is None:
        out = grouped_linear(x.flatten(0, 1), weight, group.flatten(0, 1))
        return out.unflatten(0, x.shape[:2]), 0
    each = zip(x, weight.movedim(in_dims[1], 0), group, strict=True)
    return torch.stack([grouped_linear(*operands) for operands in each]), 0
