"""Where a sum goes that was computed beside it: ``total = beta * total + alpha * summed``, as in `torch.addmm`."""

import torch
from torch import Tensor

__all__ = ["add_", "scale_"]


def add_(total: Tensor, summed: Tensor, alpha: float, beta: float) -> None:
    """``total = beta * total + alpha * summed``, rounded once; with `beta` 0 what `total` holds does not matter.

    Args:
        summed: float32 or wider, in the shape of `total`; overwritten.
    """
    if alpha != 1.0:
        summed.mul_(alpha)
    if beta == 0:
        total.copy_(summed)
    elif total.dtype == summed.dtype:
        torch.add(summed, total, alpha=beta, out=total)
    else:
        total.copy_(summed.add_(total, alpha=beta))


def scale_(total: Tensor, beta: float) -> None:
    """``total = beta * total``, where nothing is added."""
    total.zero_() if beta == 0 else total.mul_(beta)
