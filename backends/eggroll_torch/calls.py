"""A call of the model, what it returned for the members of a chunk, and what came together of all chunks."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from eggroll.config import as_bool

from .perturbed import formed
from .policy import UnsupportedOperationError
from .trees import Parts

__all__ = ["Call", "Collected", "Outputs", "stacked"]


class Call:
    """A call of the model taken apart into tensors, which are shared or over members, and the rest."""

    kind: Hashable = None
    """What the result depends on besides tensors, if that was asked for."""

    def __init__(self, method: str, args: Any, kwargs: Any, per_member: bool, members: int):
        self.method = method
        self.per_member = as_bool("per_member", per_member)
        self._parts = Parts((args, kwargs))
        self.tensors = self._parts.tensors
        for tensor in self.tensors if per_member else ():
            shape = tuple(tensor.shape)
            if not shape or shape[0] != members:
                raise ValueError(
                    f"with `per_member` axis 0 of every input must be over the {members} members, "
                    f"got the shape {shape}"
                )

    def inputs(self, start: int, count: int) -> list[Tensor]:
        """The tensors for some of the members."""
        return [tensor[start : start + count] for tensor in self.tensors] if self.per_member else self.tensors

    def of_member(self, inputs: list[Tensor], index: int) -> list[Tensor]:
        """The tensors for one of the members of `inputs`."""
        return [tensor[index] for tensor in inputs] if self.per_member else inputs

    @property
    def signature(self) -> Hashable:
        """What is the same in calls that differ in nothing but tensors."""
        return self.method, self.per_member, self._parts.signature

    def arguments(self, tensors: list[Tensor]) -> Any:
        """Positional and keyword arguments with these tensors in place."""
        return self._parts.rebuilt(tensors)


class Outputs:
    """What the model returned for a chunk: tensors, which get an axis over members, and the rest."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.parts: Parts | None = None

    def clear(self) -> None:
        """Forgets an attempt that failed."""
        self.parts = None

    def take_apart(self, result: Any) -> list[Tensor]:
        """The tensors of what one member, or all of them under `vmap`, returned."""
        parts = Parts(result)
        for other in parts.others:
            _check_has_members(other)
        self._accept(parts.without_tensors())
        return [formed(tensor, "the model's output") for tensor in parts.tensors]

    def parts_alone(self) -> Parts:
        """The rest."""
        assert self.parts is not None
        return self.parts

    def append(self, other: "Outputs") -> None:
        """Checks that those of another chunk go with these."""
        assert other.parts is not None
        self._accept(other.parts)

    def tree(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """The output of all members, with `tensors` in place of the chunk's own."""
        assert self.parts is not None
        return self.parts.rebuilt(self.tensors if tensors is None else tensors)

    def _accept(self, parts: Parts) -> None:
        if self.parts is not None and (difference := self.parts.difference(parts)):
            raise UnsupportedOperationError(
                f"members return {difference}: only tensors may differ between members, return a tensor instead"
            )
        self.parts = parts


class Collected:
    """The outputs of all chunks, copied into place as they come, so that no chunk is held twice."""

    def __init__(self, first: Outputs, members: int):
        self._first = first
        self._tensors = [tensor.new_empty((members, *tensor.shape[1:])) for tensor in first.tensors]

    def put(self, outputs: Outputs, start: int) -> None:
        self._first.append(outputs)
        for whole, part in zip(self._tensors, outputs.tensors, strict=True):
            _check_shapes({tuple(whole.shape[1:]), tuple(part.shape[1:])})
            whole[start : start + len(part)] = part
        outputs.tensors = []  # the next chunk runs before the caller lets go of this one

    def tree(self) -> Any:
        return self._first.tree(self._tensors)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """What members that ran one by one returned, with an axis over them."""
    _check_shapes({tuple(tensor.shape) for tensor in tensors})
    return torch.stack(list(tensors))


def _check_has_members(output: Any) -> None:
    """Raises for what would be that of no member, or not know that it is that of all."""
    if isinstance(output, Iterator):
        problem, remedy = "which would compute only after the members are gone", "return a list or a tensor"
    elif isinstance(output, Distribution):
        problem, remedy = "whose shapes have no axis over members", "return its parameters, or a sample"
    else:
        return
    raise UnsupportedOperationError(f"the model returns a {type(output).__name__}, {problem}: {remedy}")


def _check_shapes(shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        raise UnsupportedOperationError(
            f"members return tensors of different shapes, {sorted(shapes)}: make them equal, "
            "or run members alone with `population.member(i)`"
        )
