"""Compiled forward passes: what PyTorch computes for a chunk is recorded once and handed to `torch.compile`.

`torch.compile` alone would have to follow the engine, its tensor subclass and its modes line by line. A record
(`make_fx`) has nothing of these left: it is a list of PyTorch's operations and of those of `eggroll_torch.ops`, which
runs without the model's Python and without `vmap`.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .autocast import autocasts, without_autocast
from .fusing import with_epilogues
from .policy import Policy, UnsupportedOperationError
from .simplifying import simplify
from .swap import attributes_restored

__all__ = ["Compile", "Compiler", "Function", "left_as_it_is"]

Compile = bool | Mapping[str, Any]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# So many calls in a row of which none is of the kind of one before: there is nothing to gain.
_NEW_IN_A_ROW = 64
# Kinds of calls that are remembered, those that were used last.
_REMEMBERED = 256


@dataclass(frozen=True)
class Function:
    """What is to be recorded.

    Attributes:
        run: returns tensors, given tensors in lists, tuples and dictionaries.
        extra: what a run left behind besides its result, asked after it.
        kind: what a run depends on besides tensors, and their shapes and dtypes.
        model: whose attributes a run may set.
    """

    run: Callable[..., list[Tensor]]
    extra: Callable[[], Any]
    kind: Callable[[], Hashable]
    model: nn.Module


@dataclass(frozen=True)
class _Record:
    run: Callable[..., list[Tensor]]
    extra: Any
    of_model: tuple[int, ...]
    """Which arguments are the model's own tensors, where a compiler has to know that."""


_Standing = Literal["met", "refused"]
"""Of a kind of call: it has run as it is, or it always does."""


class Compiler:
    """Runs functions of tensors from records, one for each kind of call.

    The first call of a kind runs as it is, so that what a model keeps from it holds values. The second is recorded.

    Args:
        compile: False to run functions as they are; True, or the arguments of `torch.compile` by name.

    Raises:
        TypeError, ValueError: of other types, and of what `torch.compile` does not know.
    """

    def __init__(self, compile: Compile):
        if not isinstance(compile, bool | Mapping):
            raise TypeError(f"`compile` must be a bool or options of torch.compile by name, got {compile!r}")
        self.enabled = compile is not False
        self._options = _checked_options(compile) if isinstance(compile, Mapping) else {}
        self._records: OrderedDict[Hashable, _Record | _Standing] = OrderedDict()
        self._new_in_a_row = 0

    def run(self, function: Function, kind: Hashable, arguments: Any, policy: Policy) -> tuple[list[Tensor], Any]:
        """``function.run(*arguments)``, from a record where there is one.

        Args:
            function: what to run.
            kind: what `function.kind` returned before.
            arguments: tensors in lists, tuples and dictionaries.
            policy: what to do if the function cannot be recorded or compiled.

        Returns:
            The result, and what `function.extra` returned when it was recorded.
        """
        tensors: list[Tensor] = []
        structure = _taken_apart(arguments, tensors)
        device = tensors[0].device
        key = _Key((kind, structure, _surroundings(device), tuple(map(_meta, tensors))))
        record = self._records.get(key)
        if record == "refused" or self._new_in_a_row >= _NEW_IN_A_ROW:
            return function.run(*arguments), function.extra()
        if record is None:
            return self._first(function, key, arguments, policy)
        self._records.move_to_end(key)
        try:
            if record == "met":
                self._records[key] = record = self._recorded(function, kind, arguments)
            result = self._replayed(record, tensors, device)
        except (UnsupportedOperationError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            result = function.run(*arguments)  # what cannot be vectorised either is no matter of compiling
            self._records[key] = "refused"
            error = getattr(error, "inner_exception", error)  # what the compiler raised, without its advice
            _fall_back(policy, (str(error).splitlines() or [type(error).__name__])[0])
            return result, function.extra()
        self._new_in_a_row = 0
        return result, record.extra

    def _first(self, function: Function, key: Hashable, arguments: Any, policy: Policy) -> tuple[list[Tensor], Any]:
        result = function.run(*arguments), function.extra()
        self._records[key] = "met"
        if len(self._records) > _REMEMBERED:
            self._records.popitem(last=False)
        self._new_in_a_row += 1
        if self._new_in_a_row == _NEW_IN_A_ROW:
            _fall_back(
                policy,
                f"{_NEW_IN_A_ROW} calls in a row were each of another kind: shapes, arguments that are no tensors, "
                "or attributes of modules change with every one",
            )
        return result

    def _recorded(self, function: Function, kind: Hashable, arguments: Any) -> _Record:
        tensors, structure = pytree.tree_flatten(arguments)

        def flat(*tensors: Tensor) -> list[Tensor]:
            with _NothingReadOrSeeded():
                return function.run(*pytree.tree_unflatten(tensors, structure))

        # Tensors without values: what depends on them is an error, and not a constant in the record. Modules that are
        # compiled themselves are recorded as they are.
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        generator = torch.default_generator.get_state()
        with (
            attributes_restored(function.model),
            fakes,
            torch._dynamo.config.patch(error_on_nested_fx_trace=False),
        ):
            graph = make_fx(flat)(*map(fakes.from_tensor, tensors))
            if function.kind() != kind:
                raise RuntimeError("attributes of its modules change while it runs")
        if not torch.equal(generator, torch.default_generator.get_state()):
            raise RuntimeError("it seeds PyTorch's generator")
        simplify(graph)
        if self._options == {"backend": "eager"}:  # for which `torch.compile` would add its guards, and nothing else
            return _Record(graph.forward, function.extra(), ())
        compiled = torch.compile(with_epilogues(graph), **self._options)
        return _Record(compiled, function.extra(), _of_model(function.model, tensors))

    @staticmethod
    def _replayed(record: _Record, tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        # A CUDA graph copies its inputs to where it found them first, unless it is told that they stay where they
        # are: the weights, again in every call, and as much memory. One that has moved is recorded anew.
        tensors = list(tensors)
        for place in record.of_model:
            tensors[place] = tensors[place].detach()
            torch._dynamo.mark_static_address(tensors[place], guard=False)
        # The casts of autocast are in the record.
        with without_autocast(device):
            return record.run(*tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": OrderedDict()}


class _Key:
    """A key of records, which is long: its hash is worked out once."""

    def __init__(self, parts: tuple[Hashable, ...]):
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._parts == other._parts


class _NothingReadOrSeeded(TorchDispatchMode):
    """Refuses what a record could not repeat: a number that is read off a tensor, a draw from a generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it reads the value of a tensor")
        if kwargs.get("generator") is not None or any(isinstance(arg, torch.Generator) for arg in args):
            raise RuntimeError("it draws from a generator of its own")
        return func(*args, **kwargs)


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


def _checked_options(compile: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(compile)
    known = set(inspect.signature(torch.compile).parameters) - {"model"}
    if unknown := options.keys() - known:
        raise ValueError(f"`compile` may have the options {sorted(known)}, got {sorted(map(str, unknown))}")
    try:
        torch.compile(lambda: None, **options)
    except Exception as error:
        raise ValueError(f"`compile` must be options that torch.compile knows, got {options!r}: {error}") from None
    return options


def _of_model(model: nn.Module, tensors: list[Tensor]) -> tuple[int, ...]:
    """Which of some tensors are the parameters and buffers of a model, or share their memory."""
    own = {address for tensor in (*model.parameters(), *model.buffers()) if (address := _address(tensor))}
    return tuple(place for place, tensor in enumerate(tensors) if _address(tensor) in own)


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none."""
    has_storage = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)
    return tensor.untyped_storage().data_ptr() if has_storage else 0


def _fall_back(policy: Policy, reason: str) -> None:
    policy.fall_back(f"the model's forward pass cannot be compiled ({reason})", "it runs as it is")


def _taken_apart(tree: Any, tensors: list[Tensor]) -> Hashable:
    """Appends the tensors of lists, tuples and dictionaries, in the order of `pytree`, and returns what is around.

    In a seventh of the time of `pytree`, which knows more containers.
    """
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return None
    if isinstance(tree, dict):
        return tuple([(name, _taken_apart(value, tensors)) for name, value in tree.items()])
    return tuple([_taken_apart(value, tensors) for value in tree])


def _meta(tensor: Tensor) -> Hashable:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    negated = tensor.is_conj(), tensor.is_neg()
    return type(tensor), tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout, negated


def _surroundings(device: torch.device) -> Hashable:
    """What PyTorch is set to, as far as it decides what is computed."""
    autocast = torch.get_autocast_dtype(device.type) if autocasts(device) else None
    return autocast, torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device()
