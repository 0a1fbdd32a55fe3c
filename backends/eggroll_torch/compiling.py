"""Compiled forward passes: what PyTorch computes for a chunk is recorded once and handed to `torch.compile`.

`torch.compile` alone would have to follow the engine, its tensor subclass and its modes line by line. A record
(`make_fx`) has nothing of these left: it is a list of PyTorch's operations and of those of `eggroll_torch.ops`, which
runs without the model's Python and without `vmap`.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .autocast import autocasts, without_autocast
from .perturbed import Policy, UnsupportedOperationError
from .trees import Same

__all__ = ["Compile", "Compiler", "left_as_it_is", "state_of"]

Compile = bool | Mapping[str, Any]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# How often a record is made for a model whose own attributes change while it runs.
_ATTEMPTS = 2


@dataclasses.dataclass(frozen=True)
class _Record:
    run: Callable[..., list[Tensor]]
    extra: Any


class Compiler:
    """Runs functions of tensors from records, one for each kind of call.

    Args:
        compile: False to run functions as they are; True, or the arguments of `torch.compile` by name.

    Raises:
        TypeError, ValueError: of other types, and of names that `torch.compile` does not have.
    """

    def __init__(self, compile: Compile):
        if not isinstance(compile, bool | Mapping):
            raise TypeError(f"`compile` must be a bool or options of torch.compile by name, got {compile!r}")
        options = dict(compile) if isinstance(compile, Mapping) else {}
        known = set(inspect.signature(torch.compile).parameters) - {"model"}
        if unknown := options.keys() - known:
            raise ValueError(f"`compile` may have the options {sorted(known)}, got {sorted(map(str, unknown))}")
        self.enabled = compile is not False
        self._options = options
        self._records: dict[Hashable, _Record] = {}
        self._attempts: dict[Hashable, int] = {}

    def run(
        self,
        function: Callable[..., list[Tensor]],
        arguments: Any,
        kind: Callable[[], Hashable],
        extra: Callable[[], Any],
        policy: Policy,
    ) -> tuple[list[Tensor], Any]:
        """``function(*arguments)`` from a record, which is made the first time.

        Args:
            function: of nothing but its arguments, for calls of one kind.
            arguments: tensors in lists, tuples and dictionaries.
            kind: what the function depends on besides tensors, and their shapes and dtypes. Asked before and after
                the function has run: if it differs it changes by itself, and cannot be recorded.
            extra: what the function left behind besides its result, asked after it has run.
            policy: what to do if the function cannot be recorded or compiled.

        Returns:
            The result and what `extra` returned when the record was made.
        """
        tensors, structure = pytree.tree_flatten(arguments)
        device = tensors[0].device
        key = (kind(), structure, _autocast(device), tuple(map(_meta, tensors)))
        record = self._records.get(key)
        if record is not None:
            return self._replayed(record, tensors, device), record.extra
        if self._attempts.get(key[1:], 0) >= _ATTEMPTS:
            return function(*arguments), extra()
        try:
            record = self._recorded(function, tensors, structure, extra)
            result = self._replayed(record, tensors, device)
        except (UnsupportedOperationError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            result = function(*arguments)  # what cannot be vectorised either is no matter of compiling
            error = getattr(error, "inner_exception", error)  # what the compiler raised, without its advice
            self._give_up(key, policy, (str(error).splitlines() or [type(error).__name__])[0])
            return result, extra()
        if kind() == key[0]:
            self._records[key] = record
        else:
            self._attempts[key[1:]] = self._attempts.get(key[1:], 0) + 1
            if self._attempts[key[1:]] == _ATTEMPTS:
                self._give_up(key, policy, "attributes of its modules change while it runs")
        return result, record.extra

    def _recorded(
        self, function: Callable[..., list[Tensor]], tensors: list[Tensor], structure: Any, extra: Callable[[], Any]
    ) -> _Record:
        def flat(*tensors: Tensor) -> list[Tensor]:
            return function(*pytree.tree_unflatten(tensors, structure))

        # With tensors that have no values a read of one is an error, and not a constant in the record.
        record = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)
        # A part of the model that is compiled itself is recorded as it is.
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            graph = record(*tensors)
        return _Record(torch.compile(graph, **self._options), extra())

    @staticmethod
    def _replayed(record: _Record, tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        # The casts of autocast are in the record.
        with without_autocast(device):
            return record.run(*tensors)

    def _give_up(self, key: Any, policy: Policy, reason: str) -> None:
        self._attempts[key[1:]] = _ATTEMPTS
        policy.fall_back(f"the model's forward pass cannot be compiled ({reason})", "it runs as it is")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": {}, "_attempts": {}}


def left_as_it_is(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A method that `torch.compile` leaves alone in a function that it compiles: it compiles what is around."""
    apart: Callable[_Arguments, _Result] | None = None

    @functools.wraps(method)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        nonlocal apart
        if apart is None:  # not before: it imports the compiler, which takes a second
            apart = torch.compiler.disable(method)
        return apart(*args, **kwargs)

    return call


def state_of(model: nn.Module) -> Hashable:
    """What a record of a model depends on: its modules, and their flags, numbers, strings, functions and hooks.

    Tensors, too, that are no buffers: those are in the record itself.
    """
    return tuple((name, type(module), _attributes(module), _hooks(module)) for name, module in model.named_modules())


_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


def _attributes(module: nn.Module) -> Hashable:
    tensors = [(name, Same(value)) for name, value in vars(module).items() if isinstance(value, Tensor)]
    return *tensors, *(item for item in vars(module).items() if _is_plain(item[1]))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, *_FUNCTIONS))


def _hooks(module: nn.Module) -> Hashable:
    return tuple(module._forward_hooks), tuple(module._forward_pre_hooks)


def _meta(tensor: Tensor) -> Hashable:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device


def _autocast(device: torch.device) -> Hashable:
    return torch.get_autocast_dtype(device.type) if autocasts(device) else None
