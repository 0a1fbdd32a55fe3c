"""The members of one generation, called like the model that they are perturbations of."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .member_mode import MemberMode
from .perturbed import Policy
from .swap import seeded, swapped

__all__ = ["MemberWeights", "Population", "Randomness"]

Randomness = Literal["different", "same"]


class MemberWeights(Protocol):
    """Where a population gets its members' weights from."""

    members_per_draw: int
    """A chunk of members starts at, and holds, whole multiples of this."""
    device: torch.device
    """Where the parameters are."""
    randomness_key: Tensor
    """int32, shape ``(2,)``: the key of the generation's randomness apart from the noise, such as dropout."""
    policy: Policy
    """What to do where the model cannot be vectorised as it is."""

    def prepare(self, members: range) -> None:
        """Draws what `materialise` needs for these members, all at once."""

    def batched(self, members: range) -> dict[str, Any]:
        """What differs between members of a chunk, with a leading axis over them; handed to `bind` one by one."""

    def bind(self, members: range, index: Tensor, mine: dict[str, Any]) -> dict[str, Tensor]:
        """Parameters by name for member `index` of a chunk, given its slices of `batched` or all of `materialise`."""

    def materialise(self, member: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Parameters by name for one member, each in a tensor of its own, in `dtype` or their own dtypes."""


class Population:
    """Members of one generation. `population(x)` runs the unmodified model for every one of them.

    Args:
        model: the model, whose own parameters are left alone.
        weights: the members' weights.
        members: which members.
        chunk_size: members that run at a time.
        randomness: ``"different"`` for each member, such as its dropout, or the ``"same"`` in all.

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
    """

    def __init__(
        self,
        model: nn.Module,
        weights: MemberWeights,
        members: range,
        chunk_size: int | None = None,
        randomness: Randomness = "different",
    ):
        self._model = model
        self._open_weights: MemberWeights | None = weights
        self._members = members
        self._chunk_size = chunk_size or len(members)
        self._randomness = randomness

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Population(members={self._members.start}..{self._members.stop - 1}, chunk_size={self._chunk_size})"

    @property
    def weights(self) -> MemberWeights:
        """The members' weights, while the generation is open."""
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
            *args, **kwargs: the model's, tensors at any depth of tuples, lists and dictionaries.
            per_member: whether axis 0 of every tensor is over members, so that each gets its own input; otherwise all
                members get the same.

        Returns:
            What the model returns, with an axis over members before the others of every tensor.

        Raises:
            ValueError: `per_member`, and a tensor whose axis 0 is not as long as the population.
        """
        return self._run("__call__", args, kwargs, per_member)

    def call(self, method: str, *args: Any, per_member: bool = False, **kwargs: Any) -> Any:
        """What a method of the model returns for every member, as `population(...)` does for the model itself.

        Args:
            method: its name, such as ``"encode"``.
        """
        if not callable(getattr(self._model, method, None)):
            raise AttributeError(f"`method` must be a method of {type(self._model).__name__}, got {method!r}")
        return self._run(method, args, kwargs, per_member)

    def chunks(self, size: int | None = None) -> Iterator["Population"]:
        """The population in parts of at most `size` members (by default the trainer's `chunk_size`).

        Scoring part by part keeps memory independent of the population:
        ``torch.cat([score(part(x)) for part in population.chunks()])``.
        """
        for members in chunk_ranges(self._members, size or self._chunk_size, self.weights.members_per_draw):
            yield Population(self._model, self.weights, members, self._chunk_size, self._randomness)

    def state_dict(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The `state_dict` of member `index`: trained parameters are copies, the rest is the model's own.

        Args:
            dtype: of the trained parameters, by default their own. float32 keeps what a narrow dtype rounds away.
        """
        state = self._model.state_dict()
        member = self.weights.materialise(self._member(index), dtype)
        return {name: _tied(self._model, member, name, tensor) for name, tensor in state.items()}

    @contextlib.contextmanager
    def member(self, index: int) -> Iterator[nn.Module]:
        """A context in which the model itself is member `index`.

        Parameters point to the member's weights and back to their own storage afterwards, whatever happened inside;
        so do buffers, which the member can write to without the next one seeing it.
        """
        with swapped(self._model, self.weights.materialise(self._member(index))):
            yield self._model

    @torch.no_grad()
    def evaluate(self, fitness_fn: Callable[[nn.Module], float]) -> list[float]:
        """What `fitness_fn` says of each member, one at a time, without recording gradients; see `member`."""
        scores = []
        for part in self.chunks():
            part.weights.prepare(part.members)
            for index in range(len(part)):
                with part.member(index) as model:
                    scores.append(fitness_fn(model))
        return scores

    def _member(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}")
        return self._members[index]

    @torch.no_grad()
    def _run(self, method: str, args: Any, kwargs: Any, per_member: bool) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if per_member:
            for place in places:
                self._check_axis(leaves[place])
        collected: _Collected | None = None
        for members in chunk_ranges(self._members, self._chunk_size, self.weights.members_per_draw):
            start = members.start - self._members.start
            tensors = [leaves[p][start : start + len(members)] if per_member else leaves[p] for p in places]
            outputs = self._run_chunk(method, members, leaves, structure, places, tensors, per_member)
            if len(members) == len(self):
                return outputs.tree()
            if collected is None:
                collected = _Collected(outputs, len(self))
            collected.put(outputs, start)
        assert collected is not None
        return collected.tree()

    def _run_chunk(
        self,
        method: str,
        members: range,
        leaves: list[Any],
        structure: pytree.TreeSpec,
        places: list[int],
        tensors: list[Tensor],
        per_member: bool,
    ) -> "_Outputs":
        outputs = _Outputs()
        caller = _Caller(self._model, method)
        weights = self.weights
        index = torch.arange(members.start, members.stop, device=weights.device)
        buffers = {f"model.{name}": buffer for name, buffer in self._model.named_buffers()}

        def run_member(index: Tensor, mine: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
            values = list(leaves)
            for place, tensor in zip(places, inputs, strict=True):
                values[place] = tensor
            args, kwargs = pytree.tree_unflatten(values, structure)
            bound = {f"model.{name}": value for name, value in weights.bind(members, index, mine).items()}
            # Members write to copies of the buffers: nothing of one chunk reaches the next, or the model.
            bound |= {name: buffer.clone() for name, buffer in buffers.items()}
            with MemberMode(torch.zeros_like(index) if self._randomness == "same" else index, weights.randomness_key):
                return outputs.take_apart(functional_call(caller, bound, args, kwargs))

        def run_vectorised() -> list[Tensor]:
            in_dims = (0, 0, 0 if per_member else None)
            run = torch.vmap(run_member, in_dims, randomness=self._randomness)
            return run(index, weights.batched(members), tensors)

        def run_one_by_one() -> list[Tensor]:
            rows = [
                run_member(index[i], weights.materialise(member), [t[i] for t in tensors] if per_member else tensors)
                for i, member in enumerate(members)
            ]
            return [torch.stack(parts) for parts in zip(*rows, strict=True)]

        with seeded(weights.randomness_key, members.start):
            outputs.tensors = weights.policy.run(run_vectorised, run_one_by_one)
        return outputs

    def _check_axis(self, tensor: Tensor) -> None:
        if tensor.ndim == 0 or tensor.shape[0] != len(self):
            raise ValueError(
                f"with `per_member` axis 0 of every input must be over the {len(self)} members, "
                f"got the shape {tuple(tensor.shape)}"
            )


class _Caller(nn.Module):
    """A method of the model as a module's forward, which is all that `functional_call` calls."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


class _Outputs:
    """A model's output taken apart into tensors, which vmap stacks, and the rest, which it would refuse."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def take_apart(self, result: Any) -> list[Tensor]:
        self._leaves, self._structure = pytree.tree_flatten(result)
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        return [self._leaves[place] for place in self._places]

    def tree(self, tensors: Sequence[Tensor] | None = None) -> Any:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors or self.tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._structure)


class _Collected:
    """The outputs of all chunks, copied into place as they come, so that no chunk is held twice."""

    def __init__(self, first: _Outputs, members: int):
        self._first = first
        self._tensors = [tensor.new_empty((members, *tensor.shape[1:])) for tensor in first.tensors]

    def put(self, outputs: _Outputs, start: int) -> None:
        for whole, part in zip(self._tensors, outputs.tensors, strict=True):
            whole[start : start + len(part)] = part

    def tree(self) -> Any:
        return self._first.tree(self._tensors)


def chunk_ranges(members: range, size: int, multiple: int) -> Iterator[range]:
    """`members` in parts of at most `size`, rounded up to whole multiples of `multiple`."""
    size = -(-size // multiple) * multiple
    for start in range(members.start, members.stop, size):
        yield range(start, min(start + size, members.stop))


def _tied(model: nn.Module, member: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The member's tensor for a `state_dict` entry, which for tied weights has more than one name."""
    if name in member:
        return member[name]
    for other, parameter in model.named_parameters():
        if parameter.data_ptr() == tensor.data_ptr() and other in member and parameter.shape == tensor.shape:
            return member[other]
    return tensor
