"""Where a sum goes that a kernel has computed: ``total = beta * total + alpha * summed``, as in `torch.addmm`."""

from torch import Tensor

__all__ = ["add_", "scale_"]


def add_(total: Tensor, summed: Tensor, alpha: float, beta: float) -> None:
    """``total = beta * total + alpha * summed``, rounded once; with `beta` 0 what `total` holds does not matter.

    Args:
        summed: float32, in the shape of `total`; overwritten.
    """
    summed.mul_(alpha)
    total.copy_(summed if beta == 0 else summed.add_(total, alpha=beta))


def scale_(total: Tensor, beta: float) -> None:
    """``total = beta * total``, where nothing is added."""
    total.zero_() if beta == 0 else total.mul_(beta)
