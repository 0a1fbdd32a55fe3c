"""Derivatives that a model takes itself while its members run."""

import torch
from torch.autograd import forward_ad

__all__ = ["differentiates"]


def differentiates() -> bool:
    """Whether derivatives are taken right now, backward or forward, as of `torch.func.grad` and `torch.func.jvp`.

    The operations of this package have none, and forward ones would silently be 0: PyTorch's take their place.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0
