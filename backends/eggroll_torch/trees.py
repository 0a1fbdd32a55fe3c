"""The tensors in what a model takes and returns: in containers, in dataclasses, in any other object."""

import copy
import dataclasses
import types
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .comparing import comparable

__all__ = ["OPAQUE", "Parts"]

_DATA = (int, float, complex, str, bytes, np.ndarray, np.generic, types.NoneType)
OPAQUE = (*_DATA, Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


class Parts:
    """A tree taken apart into its tensors and the rest.

    Containers are looked into as `torch.utils._pytree` does, and other objects that hold tensors, such as dataclasses
    and the caches of Hugging Face's models, by their attributes.

    Attributes:
        tensors: in order.
    """

    def __init__(self, tree: Any):
        self._leaves, self._structure = _flatten(tree, ())
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[place] for place in self._places]
        for place in self._places:
            self._leaves[place] = None

    @property
    def signature(self) -> Hashable:
        """Equal for trees that differ in nothing but their tensors, see `comparable`."""
        return comparable(self._leaves), tuple(self._places), self._structure.signature

    @property
    def others(self) -> Iterator[Any]:
        """What is neither a tensor (there is None for it) nor a container: values, and the objects looked into."""
        yield from self._leaves
        yield from self._structure.looked_into()

    def without_tensors(self) -> "Parts":
        """The same, without holding on to its tensors."""
        twin = copy.copy(self)
        twin.tensors = []
        return twin

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The tree with other tensors in place; objects and arrays are copies."""
        leaves = [leaf.copy() if isinstance(leaf, np.ndarray) else leaf for leaf in self._leaves]
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return self._structure.rebuilt(leaves)

    def difference(self, other: "Parts") -> str | None:
        """What is not the same in another tree, apart from its tensors; None where nothing is."""
        if self._places != other._places or len(self._leaves) != len(other._leaves):
            return f"{_described(self)} and {_described(other)}"
        for mine, theirs in zip(self._leaves, other._leaves, strict=True):
            plain = isinstance(mine, _DATA) or isinstance(theirs, _DATA)
            if plain and not (type(mine) is type(theirs) and np.array_equal(mine, theirs)):
                return f"{mine!r} and {theirs!r}"
        return None


@dataclasses.dataclass
class _Structure:
    """How leaves make a tree: containers, and objects in the places of some of their leaves."""

    containers: Any
    objects: list[tuple[Any, "_Structure"] | None]
    count: int

    @property
    def signature(self) -> Hashable:
        """Equal for trees of the same containers, with objects of the same types in the same places."""
        inside = (None if entry is None else (type(entry[0]), entry[1].signature) for entry in self.objects)
        return self.containers, tuple(inside)

    def looked_into(self) -> Iterator[Any]:
        """The objects, at any depth."""
        for entry in self.objects:
            if entry is not None:
                yield entry[0]
                yield from entry[1].looked_into()

    def rebuilt(self, leaves: list[Any]) -> Any:
        values, start = [], 0
        for inside in self.objects:
            if inside is None:
                values.append(leaves[start])
                start += 1
                continue
            original, structure = inside
            twin = copy.copy(original)
            for name, value in structure.rebuilt(leaves[start : start + structure.count]).items():
                object.__setattr__(twin, name, value)
            values.append(twin)
            start += structure.count
        return pytree.tree_unflatten(values, self.containers)


def _flatten(tree: Any, above: tuple[int, ...]) -> tuple[list[Any], _Structure]:
    values, containers = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    objects: list[tuple[Any, _Structure] | None] = []
    for value in values:
        attributes = None if id(value) in above else _attributes(value)
        if attributes:
            inner, structure = _flatten(attributes, (*above, id(value)))
            if any(isinstance(leaf, Tensor) for leaf in inner):
                leaves += inner
                objects.append((value, structure))
                continue
        leaves.append(value)
        objects.append(None)
    return leaves, _Structure(containers, objects, len(leaves))


def _attributes(value: Any) -> dict[str, Any] | None:
    if isinstance(value, OPAQUE):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _described(parts: Parts) -> str:
    return f"{len(parts._places)} tensors among {len(parts._leaves)} values"
