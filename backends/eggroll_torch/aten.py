"""Operations of ATen, of which exported programs consist, as the functions of PyTorch that they stand behind."""

import functools
import types
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["function_behind"]


@functools.cache
def function_behind(operation: Any) -> Any:
    """The function of PyTorch with the name and the arguments of an operation of ATen; anything else as it is."""
    if isinstance(operation, OpOverload) and operation.namespace == "aten":
        name = operation._schema.name.removeprefix("aten::")
        for of in (torch, torch.nn.functional, torch.Tensor):
            function = getattr(of, name, None)
            # What is written in Python may have other arguments.
            if function is not None and not isinstance(function, types.FunctionType):
                return function
    return operation
