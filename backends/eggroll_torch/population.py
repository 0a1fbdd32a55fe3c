"""The members of one generation, called like the model that they are perturbations of."""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.config import as_int

from .calls import Call, Collected, Outputs
from .chunking import Chunking, chunk_ranges
from .compiling import Compiler, left_as_it_is
from .forward import ForwardPass, Randomness, seeded_for
from .interrupts import uninterrupted
from .lora import adapter
from .member_weights import MemberWeights
from .swap import check_is_itself, swapped
from .threads import alone, lock

__all__ = ["Population"]


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
        return self._run(Call("__call__", args, kwargs, per_member, len(self)))

    def call(self, method: str, *args: Any, per_member: bool = False, **kwargs: Any) -> Any:
        """What a method of the model returns for every member, as `population(...)` does for the model itself.

        Args:
            method: its name, such as ``"encode"``.
        """
        if not callable(getattr(self._model, method, None)):
            raise AttributeError(f"`method` must be a method of {type(self._model).__name__}, got {method!r}")
        return self._run(Call(method, args, kwargs, per_member, len(self)))

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

    def chunk_size(self, *args: Any, per_member: bool = False, **kwargs: Any) -> int:
        """How many members such a call evaluates at a time."""
        call = Call("__call__", args, kwargs, per_member, len(self))
        if self._chunking.requested == "auto" and not call.tensors:
            return self._chunking.noise(len(self), self.weights.members_per_draw, self.weights.numbers_in_a_draw)
        return self._size(call)

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
        so do buffers, which the member can write to without the next one seeing it. Attributes of modules that were
        set to its tensors are what they were.
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
        with uninterrupted() as hold:  # but for the caller's code: PyTorch, too, is in another state for each member
            for part in self.chunks(size):
                weights.prepare(part.members)
                for index in range(len(part)):
                    with (
                        part.member(index) as model,
                        seeded_for(weights, self._randomness, part.members[index]),
                        weights.policy.watching(model, weights.watched),
                    ):
                        scores.append(hold.released(fitness_fn, model))
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

    def _size(self, call: Call) -> int:
        weights = self.weights

        def run(count: int) -> int:
            outputs = self._run_chunk(call, self._members[:count], Compiler(False))
            return sum(tensor.nbytes for tensor in outputs.tensors)

        if self._chunking.measures_next:  # what is drawn once for all members is no member's
            weights.prepare_shared()
        return self._chunking.forward(len(self), weights.members_per_draw, weights.device, run)

    @left_as_it_is
    @torch.no_grad()
    def _run(self, call: Call) -> Any:
        size = self._size(call)
        collected: Collected | None = None
        for members in chunk_ranges(self._members, size, self.weights.members_per_draw):
            outputs = self._run_chunk(call, members, self._compiler)
            if len(members) == len(self):
                return outputs.tree()
            if collected is None:
                collected = Collected(outputs, len(self))
            collected.put(outputs, members.start - self._members.start)
        assert collected is not None
        return collected.tree()

    @torch.no_grad()
    @alone
    def _run_chunk(self, call: Call, members: range, compiler: Compiler) -> Outputs:
        check_is_itself(self._model, "a population")
        first = members.start - self._members.start
        return ForwardPass(self._model, self.weights, self._randomness, call, members, first, compiler).run()


def _tied(model: nn.Module, member: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The member's tensor for a `state_dict` entry, which for tied weights has more than one name."""
    if name in member or not isinstance(tensor, Tensor):  # modules may have a state of their own kind
        return member.get(name, tensor)
    for other, parameter in model.named_parameters():
        if parameter.data_ptr() == tensor.data_ptr() and other in member and parameter.shape == tensor.shape:
            return member[other]
    return tensor
