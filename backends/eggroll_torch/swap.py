"""Other values for a model's parameters, or for PyTorch's generators, for a while, with a sure way back."""

import collections
import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .interrupts import surely
from .perturbed import Weight
from .threefry import seed_of
from .trees import OPAQUE, Parts

__all__ = [
    "HeldTensors",
    "attributes_restored",
    "check_is_itself",
    "seeded",
    "swapped",
]

_SWAPPED: set[int] = set()
"""The ids of the models that are a member right now."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes of modules that hold no tensors themselves."""


@contextlib.contextmanager
def swapped(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The model with other values for some parameters, and with copies of all other tensors that its modules hold.

    The model's own storage is never written to: the body may change all weights, buffers and attributes in place.
    Attributes that it sets to tensors are afterwards what they were.
    """
    held = HeldTensors(model)
    with _restored(model), held.nothing_of_members_left(alone=True):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = parameters[name] if name in parameters else parameter.data.clone()
                parameter.grad = None
            for buffer in model.buffers():
                buffer.data = buffer.data.clone()
            attributes = {id(tensor): tensor.detach().clone() for tensor in held.attributes.values()}
        with held.replaced(attributes):
            yield


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
def _restored(model: nn.Module) -> Iterator[None]:
    """On the way out every parameter and buffer is in its place again and points to its own storage and gradient.

    Also when the body raises, is interrupted, or put other tensors in their place. Inside, the model is a member.
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
        _SWAPPED.discard(id(model))

    try:
        _SWAPPED.add(id(model))
        yield
    finally:
        surely(restore)


def _unscripted(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose tables are Python's: those of scripted ones cannot be replaced, nor need be."""
    return (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))


_LISTS_OF_WEIGHTS = ("_flat_weights", "_flat_weight_refs")


class HeldTensors:
    """The tensors that a model's modules hold, and where; found in one walk, which every call of a population takes.

    Attributes:
        parameters: by their first names.
        buffers: likewise, those that are no parameters as well.
        attributes: likewise, the rest.
    """

    def __init__(self, model: nn.Module):
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        self._seen: set[int] = set()
        named = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
        attributes = [(prefix, vars(module), _own(vars(module))) for prefix, module in named]
        self.parameters = self._found((prefix, m._parameters, m._parameters) for prefix, m in named)
        self.buffers = self._found((prefix, m._buffers, m._buffers) for prefix, m in named)
        self.attributes = self._found(attributes)
        self._lists = [  # which recurrent modules make of their weights when they see others
            (table, name, table[name])
            for (_, table, _), (_, module) in zip(attributes, named, strict=True)
            if isinstance(module, nn.RNNBase)
            for name in _LISTS_OF_WEIGHTS
            if name in table
        ]
        self._attributes = [
            (module, table, own)
            for (_, table, own), (_, module) in zip(attributes, named, strict=True)
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def _found(self, tables: Iterable[tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[str, Tensor]:
        """The tensors of some tables that were not met before, by name: of what precedes it, a table, and a part."""
        found = {}
        for prefix, table, part in tables:
            for name, value in part.items():
                if isinstance(value, Tensor):
                    self._places.append((table, name, value))
                    if id(value) not in self._seen:
                        self._seen.add(id(value))
                        found[prefix + name] = value
        return found

    def hold(self, tensor: Tensor) -> bool:
        return id(tensor) in self._seen

    def all(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers, **self.attributes}

    @contextlib.contextmanager
    def replaced(self, others: Mapping[int, Tensor]) -> Iterator[None]:
        """Other tensors, of any kind, in the places of some, by the ids of these.

        Not `torch.func.functional_call`, which leaves its tensors in a module that has two names.
        """
        undo = [place for place in self._places if id(place[2]) in others]

        def restore() -> None:
            for table, name, value in (*self._lists, *undo):
                table[name] = value

        try:
            for table, name, value in undo:
                table[name] = others[id(value)]
            yield
        finally:
            surely(restore)

    @contextlib.contextmanager
    def nothing_of_members_left(self, alone: bool = False, last: bool = True) -> Iterator[None]:
        """On the way out attributes that were set to what members compute are what they were.

        So is what was put into lists, dictionaries and deques in attributes, and into objects there. Nobody could use
        the tensors of a `torch.vmap` that is over, and the next member is to begin as this one did. If the body
        raises, everything is what it was.

        Args:
            alone: it is one member, with ordinary tensors: all that were put there are its own.
            last: no member comes after it; otherwise changes of other values, such as of a count, are undone, too.
        """
        containers = self._containers()
        concerns: Callable[[Any], bool] = lambda value: True  # noqa: E731
        try:
            yield
            if last:
                concerns = _holds_tensors if alone else _holds_members
        finally:
            surely(lambda: self._restore(containers, concerns))

    def _containers(self) -> list[tuple[Any, Any]]:
        """What is in attributes, and in what is in them, that can be changed in place, each with a copy."""
        found: dict[int, tuple[Any, Any]] = {}

        def remember(value: Any) -> None:
            if isinstance(value, _CONTAINERS) and id(value) not in found:
                found[id(value)] = value, value.copy()
                for inner in value.values() if isinstance(value, dict) else value:
                    remember(inner)

        for module, _, own in self._attributes:
            remember(module._parameters)
            remember(module._buffers)
            for value in own.values():
                if type(value) not in _PLAIN:
                    is_object = not isinstance(value, (*OPAQUE, *_CONTAINERS)) and hasattr(value, "__dict__")
                    remember(vars(value) if is_object else value)
        return list(found.values())

    def _restore(self, containers: list[tuple[Any, Any]], concerns: Callable[[Any], bool]) -> None:
        for _, table, before in self._attributes:
            _restore_entries(table, _own(table), before, concerns)
            for name, value in before.items():  # one that was set to a weight has become a parameter
                table.setdefault(name, value)
        for container, before in containers:
            if isinstance(container, dict):
                _restore_entries(container, container, before, concerns)
            elif len(container) != len(before) or not all(map(operator.is_, container, before)):
                known = set(map(id, before))
                if concerns([value for value in container if id(value) not in known]):
                    container.clear()
                    container.extend(before)


_CONTAINERS = (list, dict, collections.deque)
_PLAIN = {int, float, bool, str, tuple, type(None)}
_NOTHING = object()


def _restore_entries(
    table: dict[Any, Any], now: Mapping[Any, Any], before: Mapping[Any, Any], concerns: Callable[[Any], bool]
) -> None:
    """Puts back what entries of a table were, where what they became `concerns`; `now` are those that count."""
    if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
        return
    changed = [name for name, value in now.items() if value is not before.get(name, _NOTHING)]
    for name in [*changed, *(name for name in before if name not in now)]:
        if concerns(table.get(name)):
            if name in before:
                table[name] = before[name]
            else:
                del table[name]


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that not every module has."""
    return {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}


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


def _holds_tensors(value: Any) -> bool:
    return bool(Parts(value).tensors)


def _holds_members(value: Any) -> bool:
    """Whether there is a tensor in it that belongs to a `torch.vmap` that is over, or a member's weight."""
    return any(
        isinstance(tensor, Weight) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in Parts(value).tensors
    )


@contextlib.contextmanager
def seeded(key: Tensor, data: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators, seeded from a key and a number, and put back afterwards.

    Args:
        key, data: see `threefry.seed_of`.
        device: whose generator is seeded besides that of the CPU.
    """
    # Not torch.manual_seed, which formats a stack trace for devices that are not there yet: a millisecond.
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    seed, states = seed_of(key, data), [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
