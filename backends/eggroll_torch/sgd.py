"""Plain SGD as two numbers for a parameter, so that its step can be taken where the direction is summed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_plain_sgd", "plain_sgd_steps"]


def check_plain_sgd(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    """Raises where a step of `optimizer` takes more than the parameter and the direction.

    Raises:
        ValueError: it is not `torch.optim.SGD` itself, or one of the `groups` has momentum.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(f"`fused` needs `optimizer` to be torch.optim.SGD, got {type(optimizer).__name__}")
    for group in groups:
        if group["momentum"] != 0:
            raise ValueError(f"`fused` needs SGD without momentum, got momentum={group['momentum']!r}")


def plain_sgd_steps(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[float, float]]:
    """``(alpha, beta)`` by parameter: a step of `optimizer` is ``parameter = beta * parameter + alpha * direction``.

    With a weight decay of ``wd`` SGD steps to ``p - lr * (g + wd * p)``, and with `maximize` it adds what it would
    otherwise subtract.

    Raises:
        ValueError: see `check_plain_sgd`.
    """
    check_plain_sgd(optimizer, optimizer.param_groups)
    steps = {}
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        step = (lr if group["maximize"] else -lr), 1.0 - lr * group["weight_decay"]
        steps.update(dict.fromkeys(group["params"], step))
    return steps
