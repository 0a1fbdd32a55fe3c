"""Whether Python values, a model among them, are what they were: what a record of a forward pass depends on."""

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["comparable"]

_VALUES = (bool, int, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size, range, Enum)
_MOST_FREQUENT = frozenset({bool, int, str, types.NoneType})
_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
# What every module has; of these the hooks and the mode count.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Of objects that are met later, such as the records of a data set, and of larger arrays, it counts which they are.
_MOST_VALUES = 20_000
_MOST_BYTES = 1 << 20


def comparable(value: Any) -> Hashable:
    """Something that is equal for two values, or for one value at two times, if they are alike.

    Numbers, strings, enumerations, containers and arrays are compared by what they hold; modules and other objects by
    which they are and by what is in their attributes. Of tensors it counts which they are, but of those that modules
    hold only which of them are one and the same.
    """
    return _Comparison().of(value)


class _Comparison:
    """One walk over a value, which meets every object once."""

    def __init__(self) -> None:
        self._values = 0
        self._met: dict[int, int] = {}
        self._held: list[Any] = []  # an id belongs to an object as long as that is there

    def of(self, value: Any) -> Hashable:
        kind = type(value)
        self._values += 1
        if kind in _MOST_FREQUENT:
            return kind, value
        if isinstance(value, nn.Module) and self._values <= _MOST_VALUES:
            again = self._again(value)
            return again or (kind, _Same(value), self._of_module(value))
        if isinstance(value, float):
            return kind, value.hex()  # 0.0 is not -0.0, and NaN is itself
        if isinstance(value, _VALUES):
            return kind, value
        if isinstance(value, np.ndarray | np.generic) and value.nbytes <= _MOST_BYTES:
            return kind, str(value.dtype), value.shape, value.tobytes()
        if isinstance(value, (*_NAMED, np.ndarray)) or self._values > _MOST_VALUES:
            return _Same(value)
        if again := self._again(value):
            return again
        if isinstance(value, Mapping):
            return kind, self._each(part for item in value.items() for part in item)
        if isinstance(value, set | frozenset):
            return kind, frozenset(map(self.of, value))
        if isinstance(value, list | tuple):
            return kind, self._each(value)
        if isinstance(value, slice):
            return kind, self._each((value.start, value.stop, value.step))
        if isinstance(value, functools.partial):
            return kind, self._each((value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return kind, self._each((value.__func__, value.__self__))
        if isinstance(value, Tensor) or not hasattr(value, "__dict__"):
            return kind, _Same(value)
        return kind, _Same(value), self.of(vars(value))

    def _again(self, value: Any) -> Hashable:
        """The number of an object that was met before; None, and it gets one, otherwise."""
        again = self._met.get(id(value))
        if again is not None:
            return "met", again
        self._met[id(value)] = len(self._met)
        self._held.append(value)
        return None

    def _each(self, values: Iterable[Any]) -> Hashable:
        return tuple(map(self.of, values))

    def _of_module(self, module: nn.Module) -> Hashable:
        parts: list[Hashable] = [tuple(getattr(module, hooks)) for hooks in _HOOKS]
        for table in (module._parameters, module._buffers):
            parts += [(name, self._which(value)) for name, value in table.items()]
        parts += [(name, self.of(child)) for name, child in module._modules.items()]
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                parts.append((name, self._which(value) if isinstance(value, Tensor) else self.of(value)))
        return tuple(parts)

    def _which(self, tensor: Tensor | None) -> int | None:
        """A number of a tensor whose identity does not count, but which other places hold it."""
        if tensor is None:
            return None
        self._again(tensor)
        return self._met[id(tensor)]


class _Same:
    """Equal to what is about the same object, as long as that is there, which it does not keep."""

    def __init__(self, value: Any):
        self._hash = id(value)
        self._value: Callable[[], Any]
        try:
            self._value = weakref.ref(value)
        except TypeError:
            self._value = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        value = self._value()
        return value is not None and value is other._value()

    def __hash__(self) -> int:
        return self._hash
