"""Threads that share a model: one at a time has members in it."""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["alone", "lock"]


class _OfAModel(Protocol):
    _model: nn.Module


_Self = TypeVar("_Self", bound=_OfAModel)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock(model: nn.Module) -> threading.RLock:
    """What a thread holds while tensors of members are in the places of a model's own."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def alone(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """A method that puts members into its `_model`, or needs what is there: one thread after another."""

    @functools.wraps(method)
    def call(self: _Self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with lock(self._model):
            return method(self, *args, **kwargs)

    return call
