"""Other values for a model's parameters, or for PyTorch's generators, for a while, with a sure way back."""

import contextlib
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .perturbed import Weight
from .threads import lock
from .threefry import seed_of

__all__ = [
    "NamedTensors",
    "attributes_restored",
    "check_is_itself",
    "named_tensors",
    "nothing_of_members_left",
    "replaced",
    "restored",
    "seeded",
    "swapped",
    "uninterrupted",
]

_SWAPPED: set[int] = set()
"""The ids of the models that are a member right now."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes of modules that hold no tensors themselves."""


@contextlib.contextmanager
def swapped(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The model with other values for some parameters, and with copies of its frozen parameters and buffers.

    The model's own storage is never written to: the body may change all weights and buffers in place.
    """
    check_is_itself(model, "this")
    with lock(model), restored(model), _marked(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = parameters[name] if name in parameters else parameter.data.clone()
                parameter.grad = None
            for buffer in model.buffers():
                buffer.data = buffer.data.clone()
        yield


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    _SWAPPED.add(id(model))
    try:
        yield
    finally:
        _SWAPPED.discard(id(model))


def check_is_itself(model: nn.Module, what: str) -> None:
    """Raises where the model is a member, whose weights would be taken for the model's own.

    Raises:
        RuntimeError: names what cannot be done.
    """
    if id(model) in _SWAPPED:
        raise RuntimeError(
            f"{what} needs the model's own weights, and the model is a member now: "
            "leave `population.member(...)`, or return from the `fitness_fn`, first"
        )


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On the way out every parameter and buffer is in its place again and points to its own storage and gradient.

    Also when the body raises, is interrupted, or put other tensors in their place.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for module in _unscripted(model) for table in (module._parameters, module._buffers)
    ]
    parameters = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]

    def restore() -> None:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for parameter, storage, gradient in parameters:
            parameter.grad = None
            parameter.data = storage
            parameter.grad = gradient
        for buffer, storage in buffers:
            buffer.data = storage

    try:
        yield
    finally:
        try:
            with uninterrupted():
                restore()
        except BaseException:
            # An interrupt may have come before it was held back; restoring twice does no harm.
            restore()
            raise


def _unscripted(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose tables are Python's: those of scripted ones cannot be replaced, nor need be."""
    return (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))


class NamedTensors(NamedTuple):
    """What tensors a model's modules hold, each by its first name."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    attributes: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers, **self.attributes}


def named_tensors(model: nn.Module) -> NamedTensors:
    """The tensors of a model; one that is in several places counts as a parameter before a buffer before the rest."""
    # `named_parameters()` and `named_buffers()` would go through the modules three times, in every call.
    modules = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
    seen: set[int] = set()

    def held(tables: Iterable[tuple[str, Mapping[str, Any]]], but: Collection[str] = ()) -> dict[str, Tensor]:
        found = {}
        for prefix, table in tables:
            for name, value in table.items():
                if name not in but and isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    found[prefix + name] = value
        return found

    return NamedTensors(
        held((prefix, module._parameters) for prefix, module in modules),
        held((prefix, module._buffers) for prefix, module in modules),
        held(((prefix, vars(module)) for prefix, module in modules), _OF_EVERY_MODULE),
    )


_LISTS_OF_WEIGHTS = ("_flat_weights", "_flat_weight_refs")


@contextlib.contextmanager
def replaced(model: nn.Module, names: dict[str, Tensor], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the places of a model's own, wherever its modules hold these.

    Not `torch.func.functional_call`, which leaves its tensors in a module that has two names.

    Args:
        model: the model.
        names: all its tensors by name, see `named_tensors`.
        tensors: others for some of them, of any kind.
    """
    others = {id(names[name]): other for name, other in tensors.items()}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            attributes = vars(module)
            if isinstance(module, nn.RNNBase):  # which makes lists of its weights when it sees others
                undo += [(attributes, name, attributes[name]) for name in _LISTS_OF_WEIGHTS if name in attributes]
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, attributes)
            for table in tables:
                for name, value in list(table.items()):
                    if isinstance(value, Tensor) and id(value) in others:
                        undo.append((table, name, value))
                        table[name] = others[id(value)]
        yield
    finally:
        for table, name, value in undo:
            table[name] = value


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """On the way out the attributes of the model's modules are again what they were, whatever the body set."""
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in _unscripted(model)
        for table in (module._parameters, module._buffers, vars(module))
    ]
    try:
        yield
    finally:
        for table, entries in tables:
            table.clear()
            table.update(entries)


@contextlib.contextmanager
def nothing_of_members_left(model: nn.Module) -> Iterator[None]:
    """On the way out attributes that were set to tensors of members under `torch.vmap` are what they were.

    Nobody can use those afterwards. Also what was appended to lists, or put into dictionaries, under new keys.
    """
    tables = [vars(module) for module in _unscripted(model)]
    found = [{name: (table[name], _length(table[name])) for name in _own(table)} for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, found, strict=True):
            for name in _own(table):
                value = table[name]
                old, length = before.get(name, (None, 0))
                if name not in before or value is not old:
                    if _holds_members(value):
                        table[name] = old
                        if name not in before:
                            del table[name]
                elif isinstance(value, list) and len(value) > length and _holds_members(value[length:]):
                    del value[length:]
                elif isinstance(value, dict) and len(value) > length:
                    new = list(value)[length:]
                    if _holds_members([value[key] for key in new]):
                        for key in new:
                            del value[key]


def _own(table: dict[str, Any]) -> set[str]:
    """The names of the attributes that not every module has."""
    return table.keys() - _OF_EVERY_MODULE


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _holds_members(value: Any) -> bool:
    """Whether there is a tensor in it that belongs to a `torch.vmap` that is over, or a member's weight."""
    return any(
        isinstance(leaf, Weight)
        or (isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf))
        for leaf in pytree.tree_leaves(value)
    )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the body is done: what must happen whole happens whole."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pending: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *signal_and_frame: pending.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def seeded(key: Tensor, data: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators, seeded from a key and a number, and put back afterwards.

    Args:
        key, data: see `threefry.seed_of`.
        device: whose generator is seeded besides that of the CPU.
    """
    seed, devices = seed_of(key, data), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which formats a stack trace for devices that are not there yet: a millisecond.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
