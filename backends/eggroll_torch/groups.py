"""Parameter groups and optimizers as users hand them in, checked."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "OptimizerFactory",
    "as_group",
    "as_groups",
    "check_factory",
    "check_lr",
    "flatten_groups",
    "made_by",
    "options_of",
]

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Called with parameter groups and ``lr``."""


def as_groups(params: Any) -> list[Any]:
    """What `params` of a trainer holds: parameters, or copies of groups, each of which has parameters.

    Raises:
        TypeError, ValueError: it is one thing instead of several, it is empty, or a group has no parameters.
    """
    if isinstance(params, Tensor | nn.Module | dict | str) or not isinstance(params, Iterable):
        raise TypeError(
            "`params` must be parameters, such as model.parameters(), or a list of parameter groups, "
            f"got {type(params).__name__}"
        )
    groups = [dict(group) if isinstance(group, dict) else group for group in params]
    if not groups:
        raise ValueError("`params` must hold at least one trainable parameter, got none")
    for group in groups:
        if isinstance(group, dict):
            if "params" not in group:
                raise ValueError(f"`params` groups must have the key 'params', got {sorted(group, key=str)}")
            _check_parameters(group["params"])
    return groups


def as_group(param_group: Any) -> dict[str, Any]:
    """A copy of one parameter group, whose parameters are a list, with their names where they came with names.

    Raises:
        TypeError: it is no group.
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        is_dict = isinstance(param_group, dict)
        got = f"one with the keys {sorted(param_group, key=str)}" if is_dict else type(param_group).__name__
        raise TypeError(f"`param_group` must be a dict with the key 'params', got {got}")
    params = param_group["params"]
    _check_parameters(params)
    return {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}


def _check_parameters(params: Any) -> None:
    if isinstance(params, str) or not isinstance(params, Iterable):
        raise TypeError(f"`params` of a group must be parameters, got {params!r:.80}")


def flatten_groups(param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [parameter for group in param_groups for parameter in group["params"]]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """Copies of what a group says besides its parameters, such as ``lr``."""
    return copy.deepcopy({name: value for name, value in group.items() if name not in {"params", "param_names"}})


def check_lr(lr: Any) -> None:
    """Raises a TypeError or ValueError unless a group's ``lr``, a number or a tensor, is finite and not negative."""
    if isinstance(lr, bool) or not isinstance(lr, Real | Tensor) or (isinstance(lr, Tensor) and lr.numel() != 1):
        raise TypeError(f"`lr` must be a non-negative finite number, got {lr!r}")
    if not (math.isfinite(float(lr)) and float(lr) >= 0):
        raise ValueError(f"`lr` must be a non-negative finite number, got {lr!r}")


def check_factory(optimizer: Any) -> None:
    """Raises a TypeError or ValueError unless it can be called with groups and ``lr`` for an optimizer."""
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            "`optimizer` must make an optimizer, such as torch.optim.AdamW or a functools.partial of it, "
            f"got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, functools.partial) and "lr" in optimizer.keywords:
        raise ValueError(
            "`optimizer` must leave the step size to `learning_rate`, "
            f"got a partial with lr={optimizer.keywords['lr']!r}"
        )


def made_by(factory: OptimizerFactory, param_groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """The optimizer that takes a trainer's steps.

    Raises:
        TypeError: the factory makes something else, or an optimizer that evaluates a loss itself, as LBFGS does.
    """
    optimizer = factory(param_groups, lr=lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` must make a torch.optim.Optimizer, it made {optimizer!r}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            "`optimizer` must step without a `closure`, which evaluates a loss again: "
            f"{type(optimizer).__name__} does not"
        )
    return optimizer
