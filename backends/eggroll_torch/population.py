"""The members of one generation, called like the model that they are perturbations of."""

import contextlib
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from eggroll.config import as_int

from .chunking import Chunking, chunk_ranges
from .comparing import comparable
from .compiling import Compiler, Function, left_as_it_is
from .lora import adapter
from .member_mode import MemberMode, copied_each
from .perturbed import Policy, UnsupportedOperationError, formed
from .swap import HeldTensors, check_is_itself, seeded, swapped
from .threads import alone, lock
from .trees import Parts
from .vectorising import vectorised

__all__ = ["MemberWeights", "Population", "Randomness"]

Randomness = Literal["different", "same"]


class MemberWeights(Protocol):
    """Where a population gets its members' weights from."""

    members_per_draw: int
    """A chunk of members starts at, and holds, whole multiples of this."""
    device: torch.device
    """Where the parameters are."""
    randomness_key: Tensor
    """int32, shape ``(2,)``, on the CPU: the key of what is random apart from the noise, such as dropout."""
    policy: Policy
    """What to do where the model cannot be vectorised as it is."""

    numbers_in_a_draw: int
    """Numbers drawn for a member, or for a pair."""

    def prepare(self, members: range) -> None:
        """Draws what `materialise` needs for these members, all at once."""

    def prepare_shared(self) -> None:
        """Draws what is drawn once for all members."""

    @property
    def signature(self) -> Hashable:
        """What `bind` depends on besides its arguments."""

    def batched(self, members: range) -> dict[str, Tensor]:
        """What differs between members of a chunk, with a leading axis over them; handed to `bind` one by one."""

    def shared(self, members: range) -> dict[str, list[Tensor]]:
        """What `bind` needs besides, the same for all members of a chunk."""

    def bind(self, place: Tensor, mine: dict[str, Tensor], shared: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Parameters by name for one member of a chunk.

        Args:
            place: int64, shape ``()``, the member's place in the chunk.
            mine: its slices of `batched`.
            shared: what `shared` returned.
        """

    def materialise(self, member: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Parameters by name for one member, each in a tensor of its own, in `dtype` or their own dtypes."""


class Population:
    """Members of one generation. `population(x)` runs the unmodified model for every one of them.

    Args:
        model: the model, whose own parameters are left alone.
        weights: the members' weights.
        members: which members.
        chunking: how many members run at a time.
        randomness: ``"different"`` for each member, such as its dropout, or the ``"same"`` in all.
        compiler: runs the forward passes.

    Example:
        >>> import torch
        >>> from eggroll.torch import EGGROLLTrainer
        >>> model = torch.nn.Linear(3, 2)
        >>> trainer = EGGROLLTrainer(model.parameters(), model=model, population_size=8, seed=0)
        >>> population = trainer.ask()
        >>> population(torch.zeros(5, 3)).shape
        torch.Size([8, 5, 2])
        >>> population(torch.zeros(8, 5, 3), per_member=True).shape
        torch.Size([8, 5, 2])
        >>> scores, done = torch.empty(len(population)), 0
        >>> for part in population.chunks(4):
        ...     scores[done : done + len(part)] = -part(torch.ones(3)).square().sum(dim=1)
        ...     done += len(part)
    """

    def __init__(
        self,
        model: nn.Module,
        weights: MemberWeights,
        members: range,
        chunking: Chunking | None = None,
        randomness: Randomness = "different",
        compiler: Compiler | None = None,
    ):
        self._model = model
        self._open_weights: MemberWeights | None = weights
        self._whole: Population | None = None
        self._members = members
        self._chunking = chunking or Chunking(None)
        self._randomness = randomness
        self._compiler = compiler or Compiler(False)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Population(members={self._members.start}..{self._members.stop - 1})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a population is neither pickled nor copied: send `population.state_dict(i)` to another process, or the "
            "trainer, whose ask() gives the same population there"
        )

    @property
    def weights(self) -> MemberWeights:
        """The members' weights, while the generation is open."""
        if self._whole is not None:
            return self._whole.weights  # a part is over with the whole
        if self._open_weights is None:
            raise RuntimeError("this population's generation is finished: ask() for the next one")
        return self._open_weights

    def close(self) -> None:
        """Ends the generation: the parameters are about to be others, and the members with them."""
        self._open_weights = None

    @property
    def members(self) -> range:
        """Which members of the generation these are."""
        return self._members

    def __call__(self, *args: Any, per_member: bool = False, **kwargs: Any) -> Any:
        """The model's output for every member.

        Args:
            *args, **kwargs: the model's, tensors at any depth of tuples, lists, dictionaries and dataclasses. Members
                work on copies: what they write to their inputs reaches nobody.
            per_member: whether axis 0 of every tensor is over members, so that each gets its own input; otherwise all
                members get the same.

        Returns:
            What the model returns, with an axis over members before the others of every tensor.

        Raises:
            ValueError: `per_member`, and a tensor whose axis 0 is not as long as the population.
        """
        return self._run(_Call("__call__", args, kwargs, per_member, len(self)))

    def call(self, method: str, *args: Any, per_member: bool = False, **kwargs: Any) -> Any:
        """What a method of the model returns for every member, as `population(...)` does for the model itself.

        Args:
            method: its name, such as ``"encode"``.
        """
        if not callable(getattr(self._model, method, None)):
            raise AttributeError(f"`method` must be a method of {type(self._model).__name__}, got {method!r}")
        return self._run(_Call(method, args, kwargs, per_member, len(self)))

    def chunks(self, size: int) -> Iterator["Population"]:
        """The population in parts of at most `size` members, rounded up to whole antithetic pairs.

        Scoring part by part keeps memory independent of the population. Write the scores into one tensor, as the
        class's example does: single ones that are kept lie between the activations of parts, and on a CPU the
        allocator can then not use those again.
        """
        for members in chunk_ranges(self._members, as_int("size", size, 1), self.weights.members_per_draw):
            part = Population(self._model, self.weights, members, self._chunking, self._randomness, self._compiler)
            part._whole = self
            yield part

    @alone
    def state_dict(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The `state_dict` of member `index`: trained parameters are copies, the rest is the model's own.

        Args:
            dtype: of the trained parameters, by default their own. float32 keeps what a narrow dtype rounds away.

        Raises:
            TypeError: `dtype` is not a floating-point dtype.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"`dtype` must be a floating-point dtype of PyTorch or None, got {dtype!r}")
        check_is_itself(self._model, "population.state_dict()")
        state = self._model.state_dict()
        member = self.weights.materialise(self._member(index), dtype)
        return {name: _tied(self._model, member, name, tensor) for name, tensor in state.items()}

    @contextlib.contextmanager
    def member(self, index: int) -> Iterator[nn.Module]:
        """A context in which the model itself is member `index`.

        Parameters point to the member's weights and back to their own storage afterwards, whatever happened inside;
        so do buffers, which the member can write to without the next one seeing it.
        """
        with lock(self._model):
            check_is_itself(self._model, "population.member()")
            with swapped(self._model, self._materialised(index)):
                torch.clear_autocast_cache()  # which holds casts of the weights that were there before
                try:
                    yield self._model
                finally:
                    torch.clear_autocast_cache()

    @alone
    def lora(self, index: int) -> dict[str, Tensor]:
        """The low-rank perturbations of member `index` as a LoRA adapter in PEFT's layout, exact, without an SVD.

        The adapter's ``lora_alpha`` equals its rank, so its scaling is 1. A matrix ``weight`` of a module ``m`` gives
        ``base_model.model.m.lora_A.weight`` and ``...lora_B.weight``, an embedding ``...lora_embedding_A`` and
        ``...lora_embedding_B``, a convolution the kernels of its two convolutions. Dense perturbations have no place
        in an adapter: train with `freeze_nonlora` for members that are adapters entirely.
        """
        return adapter(self._model, self.weights, self._member(index))

    @left_as_it_is
    @torch.no_grad()
    def evaluate(self, fitness_fn: Callable[[nn.Module], float]) -> list[float]:
        """What `fitness_fn` says of each member, one at a time, without recording gradients; see `member`.

        What it draws from PyTorch's global generators follows from the seed of the run; they are put back afterwards.
        """
        scores = []
        weights = self.weights
        size = self._chunking.noise(len(self), weights.members_per_draw, weights.numbers_in_a_draw)
        for part in self.chunks(size):
            weights.prepare(part.members)
            for index in range(len(part)):
                with part.member(index) as model, self._seeded(part.members[index]), weights.policy.watching(model):
                    scores.append(fitness_fn(model))
        return scores

    def _materialised(self, index: int) -> dict[str, Tensor]:
        return self.weights.materialise(self._member(index))

    def _member(self, index: int) -> int:
        try:
            place = operator.index(index)
        except TypeError:
            raise TypeError(f"`index` must be an int, got {index!r}") from None
        if not -len(self) <= place < len(self):
            raise IndexError(f"`index` must be in [{-len(self)}, {len(self)}), got {place}")
        return self._members[place]

    def chunk_size(self, *args: Any, per_member: bool = False, **kwargs: Any) -> int:
        """How many members such a call evaluates at a time."""
        call = _Call("__call__", args, kwargs, per_member, len(self))
        if self._chunking.requested == "auto" and not call.tensors:
            return self._chunking.noise(len(self), self.weights.members_per_draw, self.weights.numbers_in_a_draw)
        return self._size(call)

    def _size(self, call: "_Call") -> int:
        weights = self.weights

        def run(count: int) -> int:
            outputs = self._run_chunk(call, self._members[:count], Compiler(False))
            return sum(tensor.nbytes for tensor in outputs.tensors)

        if self._chunking.measures_next:  # what is drawn once for all members is no member's
            weights.prepare_shared()
        return self._chunking.forward(len(self), weights.members_per_draw, weights.device, run)

    @left_as_it_is
    @torch.no_grad()
    def _run(self, call: "_Call") -> Any:
        size = self._size(call)
        call.kind = self._kind(call) if self._compiler.enabled else None
        collected: _Collected | None = None
        for members in chunk_ranges(self._members, size, self.weights.members_per_draw):
            outputs = self._run_chunk(call, members, self._compiler)
            if len(members) == len(self):
                return outputs.tree()
            if collected is None:
                collected = _Collected(outputs, len(self))
            collected.put(outputs, members.start - self._members.start)
        assert collected is not None
        return collected.tree()

    @torch.no_grad()
    @alone
    def _run_chunk(self, call: "_Call", members: range, compiler: Compiler) -> "_Outputs":
        check_is_itself(self._model, "a population")
        weights = self.weights
        held_by_modules = HeldTensors(self._model)
        names = held_by_modules.all()
        # A tensor of the model that is handed in has its values for all members, and is not the member's own.
        given = [
            tensor.detach() if held_by_modules.hold(tensor) else tensor
            for tensor in call.inputs(members.start - self._members.start, len(members))
        ]
        # Members write to copies, of buffers too: nothing of one chunk reaches the next, the model or the caller.
        # Copies of the inputs are made until a call has shown that the model does not write to them.
        way = weights.policy.ways[call.method, self._model.training]
        copied = way.fills_tensors or way.writes_to_inputs is not False
        inputs = [tensor.clone() for tensor in given] if copied else given
        counted = not torch.is_inference_mode_enabled()  # where tensors count how often they were written to
        versions = [tensor._version for tensor in inputs] if counted else []
        outputs = _Outputs()
        index = torch.arange(members.start, members.stop, device=weights.device)
        key = weights.randomness_key.to(weights.device, non_blocking=True)

        def buffers_and(attributes: Iterable[str]) -> dict[str, Tensor]:
            """What is copied: buffers, and tensors that are plain attributes if members write to them."""
            found = held_by_modules.attributes
            return {**held_by_modules.buffers, **{name: found[name] for name in attributes if name in found}}

        def copied_for(index: Tensor, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: copied_each(index, buffer) if name in way.own_buffers else buffer.clone()
                for name, buffer in buffers.items()
            }

        def run_member(index: Tensor, key: Tensor, bound: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
            args, kwargs = call.arguments(inputs)
            randomness = torch.zeros_like(index) if self._randomness == "same" else index
            own = {id(names[name]): tensor for name, tensor in bound.items()}
            with MemberMode(randomness, key, own, way.fills_tensors), held_by_modules.replaced(own):
                return outputs.take_apart(getattr(self._model, call.method)(*args, **kwargs))

        def run_all(
            index: Tensor,
            key: Tensor,
            mine: dict[str, Tensor],
            shared: dict[str, list[Tensor]],
            held: dict[str, Tensor],
            buffers: dict[str, Tensor],
            inputs: list[Tensor],
        ) -> list[Tensor]:
            def run(index: Tensor, place: Tensor, *rest: Tensor) -> list[Tensor]:
                bound = weights.bind(place, dict(zip(mine, rest, strict=False)), shared)
                given = list(rest[len(mine) :]) if call.per_member else inputs
                if way.own_inputs and not call.per_member:
                    given = [copied_each(index, tensor) for tensor in given]
                return run_member(index, key, held | bound | copied_for(index, buffers), given)

            outputs.clear()
            place = torch.arange(index.shape[0], device=index.device)
            of_members = [index, place, *mine.values(), *(inputs if call.per_member else ())]
            return vectorised(run, of_members, self._randomness)

        def run_vectorised() -> list[Tensor]:
            mine, shared = weights.batched(members), weights.shared(members)
            buffers = buffers_and(way.own_buffers)
            # An attempt before may have written to its copies.
            tensors = [tensor.clone() for tensor in given] if way.fills_tensors else inputs
            with self._seeded(members.start):
                if not compiler.enabled:
                    with held_by_modules.nothing_of_members_left():
                        return run_all(index, key, mine, shared, {}, buffers, tensors)
                # A record would hold on to the tensors that it saw in the model: they are handed to it.
                held = {n: tensor for n, tensor in names.items() if n not in {*mine, *shared, *buffers}}
                function = Function(run_all, outputs.parts_alone, functools.partial(self._kind, call), self._model)
                arguments = (index, key, mine, shared, held, buffers, tensors)
                returned, outputs.parts = compiler.run(function, call.kind, arguments, weights.policy)
                return returned

        def run_alone(place: int, given: list[Tensor], copies: dict[str, Tensor]) -> list[Tensor]:
            with self._seeded(members[place]):
                alone = [tensor.clone() for tensor in call.of_member(given, place)]
                # Parameters: the model may take derivatives with respect to them, or have an optimizer change them.
                bound = {name: nn.Parameter(tensor) for name, tensor in weights.materialise(members[place]).items()}
                with weights.policy.watching_member(self._model, bound, way):
                    return run_member(index[place], key, bound | copies, alone)

        def written_to() -> frozenset[str]:
            outputs.clear()
            copies = copied_for(index[0], buffers_and(held_by_modules.attributes))
            with held_by_modules.nothing_of_members_left(alone=True, last=False):
                run_alone(0, call.inputs(members.start - self._members.start, 1), copies)
            return frozenset(name for name, copy in copies.items() if counted and copy._version)

        def run_one_by_one() -> list[Tensor]:
            way.writes_to_inputs = True  # members come one after another: each gets a copy of its own
            outputs.clear()
            weights.prepare(members)
            fresh = call.inputs(members.start - self._members.start, len(members))
            rows = []
            for place in range(len(members)):
                with held_by_modules.nothing_of_members_left(alone=True, last=place == len(members) - 1):
                    copies = copied_for(index[place], buffers_and(held_by_modules.attributes))
                    rows.append(run_alone(place, fresh, copies))
            return [_stacked(parts) for parts in zip(*rows, strict=True)]

        outputs.tensors = weights.policy.run(way, run_vectorised, written_to, run_one_by_one)
        weights.policy.forward_passes += 1
        written = counted and versions != [tensor._version for tensor in inputs]
        if counted and copied and not way.writes_to_inputs:
            way.writes_to_inputs = written or not all(map(_equal, inputs, given))
        elif written and not copied:
            way.writes_to_inputs = True
            raise RuntimeError(
                "the model wrote to its inputs, which it did not in calls before: they are no longer what they were. "
                "From now on it gets copies"
            )
        return outputs

    def _kind(self, call: "_Call") -> Hashable:
        """What the result of a call depends on besides tensors."""
        return comparable((self._model, call.method)), self.weights.signature, self._randomness, call.signature

    def _seeded(self, member: int) -> contextlib.AbstractContextManager[None]:
        """PyTorch's global generators as `member`, or all of them alike, find them."""
        weights = self.weights
        return seeded(weights.randomness_key, 0 if self._randomness == "same" else member, weights.device)


class _Call:
    """A call of the model taken apart into tensors, which are shared or over members, and the rest."""

    kind: Hashable = None
    """What the result depends on besides tensors, if that was asked for."""

    def __init__(self, method: str, args: Any, kwargs: Any, per_member: bool, members: int):
        self.method = method
        self.per_member = per_member
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


class _Outputs:
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

    def append(self, other: "_Outputs") -> None:
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


class _Collected:
    """The outputs of all chunks, copied into place as they come, so that no chunk is held twice."""

    def __init__(self, first: _Outputs, members: int):
        self._first = first
        self._tensors = [tensor.new_empty((members, *tensor.shape[1:])) for tensor in first.tensors]

    def put(self, outputs: _Outputs, start: int) -> None:
        self._first.append(outputs)
        for whole, part in zip(self._tensors, outputs.tensors, strict=True):
            _check_shapes({tuple(whole.shape[1:]), tuple(part.shape[1:])})
            whole[start : start + len(part)] = part
        outputs.tensors = []  # the next chunk runs before the caller lets go of this one

    def tree(self) -> Any:
        return self._first.tree(self._tensors)


def _check_has_members(output: Any) -> None:
    """Raises for what would be that of no member, or not know that it is that of all."""
    if isinstance(output, Iterator):
        problem, remedy = "which would compute only after the members are gone", "return a list or a tensor"
    elif isinstance(output, Distribution):
        problem, remedy = "whose shapes have no axis over members", "return its parameters, or a sample"
    else:
        return
    raise UnsupportedOperationError(f"the model returns a {type(output).__name__}, {problem}: {remedy}")


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether one has not been written to past its counter, as through `.data`; NaN may have been anything."""
    return tensor.device.type == "meta" or tensor.layout != torch.strided or torch.equal(tensor, other)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    _check_shapes({tuple(tensor.shape) for tensor in tensors})
    return torch.stack(list(tensors))


def _check_shapes(shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        raise UnsupportedOperationError(
            f"members return tensors of different shapes, {sorted(shapes)}: make them equal, "
            "or run members alone with `population.member(i)`"
        )


def _tied(model: nn.Module, member: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The member's tensor for a `state_dict` entry, which for tied weights has more than one name."""
    if name in member or not isinstance(tensor, Tensor):  # modules may have a state of their own kind
        return member.get(name, tensor)
    for other, parameter in model.named_parameters():
        if parameter.data_ptr() == tensor.data_ptr() and other in member and parameter.shape == tensor.shape:
            return member[other]
    return tensor
