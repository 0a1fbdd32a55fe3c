"""The forward pass of a chunk of members: all at once or, where the model cannot be vectorised, one by one."""

import contextlib
from collections.abc import Hashable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from .calls import Call, Outputs, stacked
from .comparing import comparable
from .compiling import Compiler, Function
from .interrupts import uninterrupted
from .member_mode import MemberMode, copied_each
from .member_weights import MemberWeights
from .swap import HeldTensors, seeded
from .trees import Parts
from .vectorising import vectorised

__all__ = ["ForwardPass", "Randomness", "seeded_for"]

Randomness = Literal["different", "same"]


class ForwardPass:
    """One call of the model for the members of a chunk, to be run once.

    Members write to copies, of buffers too: nothing of one chunk reaches the next, the model or the caller. Copies of
    the inputs are made until a call has shown that the model does not write to them.

    Args:
        model: the model.
        weights: the members' weights.
        randomness: ``"different"`` for each member, or the ``"same"`` in all.
        call: what to run.
        members: which members of the generation.
        first: the place of the first of them in the inputs of the call.
        compiler: runs all members at once.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: MemberWeights,
        randomness: Randomness,
        call: Call,
        members: range,
        first: int,
        compiler: Compiler,
    ):
        self._model = model
        self._weights = weights
        self._randomness = randomness
        self._call = call
        self._members = members
        self._first = first
        self._compiler = compiler
        self._way = weights.policy.ways[call.method, model.training]
        self._held = HeldTensors(model)
        self._names = self._held.all()
        # A tensor of the model that is handed in has its values for all members, and is not the member's own.
        self._given = [
            tensor.detach() if self._held.hold(tensor) else tensor for tensor in call.inputs(first, len(members))
        ]
        self._copies_inputs = self._way.fills_tensors or self._way.writes_to_inputs is not False
        self._inputs = [tensor.clone() for tensor in self._given] if self._copies_inputs else self._given
        # Outside inference mode tensors count how often they were written to.
        self._counts_writes = not torch.is_inference_mode_enabled()
        self._versions = [tensor._version for tensor in self._inputs] if self._counts_writes else []
        self._outputs = Outputs()
        self._used: set[str] = set()
        self._index = torch.arange(members.start, members.stop, device=weights.device)
        self._key = weights.randomness_key.to(weights.device, non_blocking=True)

    def run(self) -> Outputs:
        """The outputs of the members.

        Raises:
            RuntimeError: the model wrote to its inputs, of which there were no copies.
            UnsupportedOperationError: members return what cannot be put together, or something is not strict.
        """
        policy = self._weights.policy
        outputs = self._outputs
        outputs.tensors = policy.run(self._way, self._all_at_once, self._buffers_that_one_writes, self._one_by_one)
        policy.forward_passes += 1
        self._note_writes_to_inputs()
        return outputs

    @uninterrupted(once=True)  # which PyTorch's transformations and modes do not bear
    def _all_at_once(self) -> list[Tensor]:
        weights, members = self._weights, self._members
        mine, shared = weights.batched(members), weights.shared(members)
        buffers = self._buffers_and(self._way.own_buffers)
        # An attempt before may have written to its copies.
        inputs = [tensor.clone() for tensor in self._given] if self._way.fills_tensors else self._inputs
        with seeded_for(weights, self._randomness, members.start):
            if not self._compiler.enabled:
                return self._run_all(self._index, self._key, mine, shared, {}, buffers, inputs)
            # A record would hold on to the tensors that it saw in the model: they are handed to it.
            in_arguments = {*mine, *shared, *buffers}
            held = {name: tensor for name, tensor in self._names.items() if name not in in_arguments}
            function = Function(self._run_all, self._left_behind, self._kind, self._model)
            arguments = (self._index, self._key, mine, shared, held, buffers, inputs)
            if self._call.kind is None:
                self._call.kind = self._kind()
            policy = weights.policy
            returned, left_behind = self._compiler.run(function, self._call.kind, arguments, policy)
            self._outputs.parts, used = left_behind
            policy.used |= used  # a record does not note it
            return returned

    def _run_all(
        self,
        index: Tensor,
        key: Tensor,
        mine: dict[str, Tensor],
        shared: dict[str, list[Tensor]],
        held: dict[str, Tensor],
        buffers: dict[str, Tensor],
        inputs: list[Tensor],
    ) -> list[Tensor]:
        """What may be recorded: everything that it computes with is among its arguments.

        Args:
            index: int64, shape ``(members,)``: which members of the generation.
            key: int32, shape ``(2,)``, of what is random in the model.
            mine, shared: what `MemberWeights` returns of these names.
            held: what else modules hold, by name, where it must not be found in the model.
            buffers: the model's, by name.
            inputs: of the call.
        """
        per_member = self._call.per_member

        def run(index: Tensor, place: Tensor, *rest: Tensor) -> list[Tensor]:
            bound = self._weights.bind(place, dict(zip(mine, rest, strict=False)), shared)
            own_inputs = list(rest[len(mine) :]) if per_member else inputs
            if self._way.own_inputs and not per_member:
                own_inputs = [copied_each(index, tensor) for tensor in own_inputs]
            return self._run_member(index, key, held | bound | self._copied_for(index, buffers), own_inputs)

        self._outputs.clear()
        place = torch.arange(index.shape[0], device=index.device)
        of_members = [index, place, *mine.values(), *(inputs if per_member else ())]
        with self._held.nothing_of_members_left(), self._weights.policy.noting() as self._used:
            return vectorised(run, of_members, self._randomness)

    def _left_behind(self) -> tuple[Parts, frozenset[str]]:
        """What a run leaves behind: what members returned besides tensors, and the names of what they used."""
        return self._outputs.parts_alone(), frozenset(self._used)

    def _run_member(self, index: Tensor, key: Tensor, bound: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The model's outputs for one member, with `bound` in the places of tensors of these names."""
        args, kwargs = self._call.arguments(inputs)
        randomness = torch.zeros_like(index) if self._randomness == "same" else index
        own = {id(self._names[name]): tensor for name, tensor in bound.items()}
        with MemberMode(randomness, key, own, self._way.fills_tensors), self._held.replaced(own):
            return self._outputs.take_apart(getattr(self._model, self._call.method)(*args, **kwargs))

    def _one_by_one(self) -> list[Tensor]:
        self._way.writes_to_inputs = True  # members come one after another: each gets a copy of its own
        self._outputs.clear()
        self._weights.prepare(self._members)
        inputs = self._call.inputs(self._first, len(self._members))
        last = len(self._members) - 1
        rows = [
            self._run_alone(place, inputs, self._copies_for_one(place), place == last) for place in range(last + 1)
        ]
        return [stacked(parts) for parts in zip(*rows, strict=True)]

    def _buffers_that_one_writes(self) -> frozenset[str]:
        """The names of the buffers, and of tensors in attributes, that the first member writes to, alone."""
        self._outputs.clear()
        copies = self._copies_for_one(0)
        self._run_alone(0, self._call.inputs(self._first, 1), copies, last=False)
        return frozenset(name for name, copy in copies.items() if self._counts_writes and copy._version)

    @uninterrupted(once=True)
    def _run_alone(self, place: int, inputs: list[Tensor], buffers: dict[str, Tensor], last: bool) -> list[Tensor]:
        """One member without `vmap`, the one at `place` of `inputs`; it may write to `buffers`.

        Args:
            last: whether no member comes after it.
        """
        weights, member, index = self._weights, self._members[place], self._index[place]
        with (
            self._held.nothing_of_members_left(alone=True, last=last),
            seeded_for(weights, self._randomness, member),
        ):
            own_inputs = [tensor.clone() for tensor in self._call.of_member(inputs, place)]
            # Parameters: the model may take derivatives with respect to them, or have an optimizer change them.
            bound = {name: nn.Parameter(tensor) for name, tensor in weights.materialise(member).items()}
            with weights.policy.watching_member(self._model, bound, self._way):
                return self._run_member(index, self._key, bound | buffers, own_inputs)

    def _buffers_and(self, attributes: Iterable[str]) -> dict[str, Tensor]:
        """What is copied for members: buffers, and those tensors that are plain attributes of these names."""
        found = self._held.attributes
        return {**self._held.buffers, **{name: found[name] for name in attributes if name in found}}

    def _copies_for_one(self, place: int) -> dict[str, Tensor]:
        """What a member that runs alone may write to."""
        return self._copied_for(self._index[place], self._buffers_and(self._held.attributes))

    def _copied_for(self, index: Tensor, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of buffers; of those that members write to one that is the member's own under `vmap`."""
        own = self._way.own_buffers
        return {
            name: copied_each(index, buffer) if name in own else buffer.clone() for name, buffer in buffers.items()
        }

    def _note_writes_to_inputs(self) -> None:
        if not self._counts_writes:
            return
        written = self._versions != [tensor._version for tensor in self._inputs]
        if not self._copies_inputs:
            if written:
                self._way.writes_to_inputs = True
                raise RuntimeError(
                    "the model wrote to its inputs, which it did not in calls before: they are no longer what they "
                    "were. From now on it gets copies"
                )
        elif not self._way.writes_to_inputs:
            self._way.writes_to_inputs = written or not all(map(_equal, self._inputs, self._given))

    def _kind(self) -> Hashable:
        """What the result depends on besides tensors."""
        model = comparable((self._model, self._call.method))
        return model, self._weights.signature, self._randomness, self._call.signature


def seeded_for(
    weights: MemberWeights, randomness: Randomness, member: int
) -> contextlib.AbstractContextManager[None]:
    """PyTorch's global generators as `member`, or all of them alike, find them."""
    return seeded(weights.randomness_key, 0 if randomness == "same" else member, weights.device)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether one has not been written to past its counter, as through `.data`; NaN may have been anything."""
    return tensor.device.type == "meta" or tensor.layout != torch.strided or torch.equal(tensor, other)
