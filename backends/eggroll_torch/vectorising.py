"""Operations, and `torch.vmap`, called without the Python that PyTorch puts around them.

Around a rule for `torch.vmap` that takes 0.2 milliseconds, for every layer of a chunk: more than small layers take,
and than a GPU is launched in. Around an operation it takes 10 to 20 microseconds, around `torch.vmap` itself 100.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["Info", "batching_rule", "called", "vectorised"]

try:  # what `torch.vmap` is made of, in PyTorch 2.9 to 2.15
    from torch._C._functorch import _add_batch_dim, _remove_batch_dim, _unwrap_batched, maybe_current_level
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
    from torch._functorch.vmap import lazy_load_decompositions, vmap_increment_nesting
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


def vectorised(
    function: Callable[..., list[Tensor]], tensors: Sequence[Tensor], randomness: Literal["different", "same"]
) -> list[Tensor]:
    """``torch.vmap(function, randomness=randomness)(*tensors)``: over the first axes of the tensors, one at least."""
    if maybe_current_level is None:
        return torch.vmap(function, randomness=randomness)(*tensors)
    lazy_load_decompositions()
    members = tensors[0].shape[0]
    with vmap_increment_nesting(members, randomness) as level:
        results = function(*[_add_batch_dim(tensor, 0, level) for tensor in tensors])
        return [_remove_batch_dim(result, level, members, 0) for result in results]


def called(operation: CustomOpDef, *args: Any) -> Any:
    """``operation(*args)``, directly by its function where nothing watches PyTorch's operations.

    Where the innermost transformation at work is a `torch.vmap`, directly by the operation's rule, if it has one.

    Args:
        operation: takes no keyword arguments, and returns one tensor if it has a rule.
        args: tensors in lists are the same for all that is vectorised over.
    """
    if torch.compiler.is_compiling() or maybe_current_level is None:
        return operation(*args)
    if maybe_current_level() is None:
        return operation(*args) if _get_current_dispatch_mode() else operation._init_fn(*args)
    interpreter = retrieve_current_functorch_interpreter()
    if operation not in _RULES or not isinstance(interpreter, VmapInterpreter):
        return operation(*args)
    level = interpreter.level()
    pairs = [_unwrap_batched(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    values, dims = zip(*pairs, strict=True)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return called(operation, *values)
        out, dim = _RULES[operation](Info(interpreter.batch_size()), dims, *values)
    return _add_batch_dim(out, dim, level)
