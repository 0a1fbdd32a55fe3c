"""What autocast does to the operands of operations that it cannot see into."""

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_operands", "autocasts", "without_autocast"]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; there are devices that have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for what belongs to no layer, such as a sum over noise: it is computed in its own dtypes."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocast_operands(x: Tensor, *others: Tensor | None) -> Any:
    """Operands in the dtype that autocast, where it is on, gives them: `vmap` leaves some as they are.

    What is not floating point, such as keys, stays as it is, and so does float64, as everywhere in PyTorch.
    """
    if not autocasts(x.device):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(operand: Tensor | None) -> Tensor | None:
        if operand is None or not operand.is_floating_point() or operand.dtype == torch.float64:
            return operand
        return operand.to(dtype)

    return tuple(map(cast, (x, *others)))
