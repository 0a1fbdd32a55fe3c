"""Operations with rules for `torch.vmap`, called without the Python that `torch.library` puts around a rule.

That takes 0.2 milliseconds, for every layer of a chunk: more than small layers take, and than a GPU is launched in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

__all__ = ["Info", "batching_rule", "called"]

try:  # what `torch.vmap` is made of, in PyTorch 2.9 to 2.15
    from torch._C._functorch import _add_batch_dim, _unwrap_batched, maybe_current_level
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
except ImportError:
    maybe_current_level = None  # type: ignore[assignment]

_Rule = TypeVar("_Rule", bound=Callable[..., tuple[Tensor, int]])
_RULES: dict[CustomOpDef, Callable[..., tuple[Tensor, int]]] = {}


class Info(NamedTuple):
    """What a rule is told besides its arguments.

    Attributes:
        batch_size: how many members, or whatever is vectorised over.
    """

    batch_size: int


def batching_rule(operation: CustomOpDef) -> Callable[[_Rule], _Rule]:
    """Registers a rule for `torch.vmap`, as `operation.register_vmap` does, and for `called`.

    A rule takes `Info`, for each argument of the operation the axis that is vectorised over, or None, and the
    arguments; it returns the result and the axis in that.
    """

    def register(rule: _Rule) -> _Rule:
        operation.register_vmap(rule)
        _RULES[operation] = rule
        return rule

    return register


def called(operation: CustomOpDef, *args: Any) -> Tensor:
    """``operation(*args)``; directly by its rule where the innermost transformation at work is a `torch.vmap`.

    Args:
        operation: has a rule. It takes no keyword arguments, and returns one tensor.
        args: tensors in lists are the same for all that is vectorised over.
    """
    if torch.compiler.is_compiling() or maybe_current_level is None or maybe_current_level() is None:
        return operation(*args)
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return operation(*args)
    level = interpreter.level()
    pairs = [_unwrap_batched(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    values, dims = zip(*pairs, strict=True)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return called(operation, *values)
        out, dim = _RULES[operation](Info(interpreter.batch_size()), dims, *values)
    return _add_batch_dim(out, dim, level)
