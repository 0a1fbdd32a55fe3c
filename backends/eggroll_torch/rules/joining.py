"""Perturbed matrices joined to one, such as the projections of queries, keys and values, or to a stack of them.

Side by side, the factors of each belong to columns of their own: ``[W; V]`` has ``[[A_W, 0], [0, A_V]]`` and
``[B_W, B_V]``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..perturbed import PerturbedWeight, plain, rule
from .views import transposed, unsqueezed


@rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors, dim=0):
    first = tensors[0]
    if not all(_go_together(first, other) for other in tensors):
        return NotImplemented
    axis = dim % first.ndim
    if axis == first.ndim - 1:
        joined = _cat([transposed(weight) for weight in tensors], axis - 1)
        return joined if joined is NotImplemented else transposed(joined)
    base = torch.cat([plain(weight) for weight in tensors], dim)
    for weight in tensors:
        weight.noise.operands()  # notes that each takes part
    A, B = [weight.noise.A for weight in tensors], [weight.noise.B for weight in tensors]
    ranks = [factor.shape[-1] for factor in A]
    if axis < first.ndim - 2:
        if len(set(ranks)) > 1:
            return NotImplemented
        return PerturbedWeight.make(base, first.noise.having(torch.cat(A, axis + 1), torch.cat(B, axis + 1)))
    before = 0
    for place, rank in enumerate(ranks):
        A[place] = F.pad(A[place], (before, sum(ranks) - before - rank))
        before += rank
    return PerturbedWeight.make(base, first.noise.having(torch.cat(A, -2), torch.cat(B, -1)))


@rule(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    if not all(_go_together(tensors[0], other) for other in tensors):
        return NotImplemented
    layers = [unsqueezed(weight, dim) for weight in tensors]
    return NotImplemented if any(layer is NotImplemented for layer in layers) else _cat(layers, dim)


def _go_together(weight: Any, other: Any) -> bool:
    """Whether both are perturbed matrices, or stacks of them, whose noise is scaled alike."""
    perturbed = all(isinstance(each, PerturbedWeight) and each.noise.kernel is None for each in (weight, other))
    return perturbed and weight.ndim == other.ndim and weight.noise.scales is other.noise.scales
