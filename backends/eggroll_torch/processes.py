"""Several processes, each of which evaluates its share of the members; nothing but their fitness travels.

Noise follows from keys, so every process can sum the direction of all members by itself and take the same step.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .interrupts import uninterrupted

if distributed.is_available():
    # Its functions have the default group of the moment for a default argument, which keeps it alive: PyTorch imports
    # it with the first optimizer, as a rule after `init_process_group`. This package is imported before, as a rule.
    import torch.distributed.nn.functional

__all__ = ["Distributed", "Processes", "check_same"]

T = TypeVar("T")
Distributed = bool | Any
"""False, True for the default process group, or a `torch.distributed.ProcessGroup`."""


class Processes:
    """The processes of a run, of which this is one; alone it is the only one.

    The process group is not kept alive: gloo's threads end with the last reference to it, and where they outlive
    `destroy_process_group` they may meet an interpreter that is shutting down, which aborts the process.

    Args:
        wanted: whether there are others: False, True for those of the default process group, or a group.

    Attributes:
        rank: which one this is.
        count: how many there are.
    """

    def __init__(self, wanted: Distributed):
        self.rank, self.count = 0, 1
        self._reference: weakref.ref[Any] | None = None
        self._is_default = True
        if wanted is False:
            return
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("`distributed` needs torch.distributed.init_process_group() before")
        if wanted is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`distributed` must be a process group that this process belongs to")
        if wanted is not True and not isinstance(wanted, distributed.ProcessGroup):
            raise TypeError(f"`distributed` must be a bool or a torch.distributed.ProcessGroup, got {wanted!r}")
        group = distributed.group.WORLD if wanted is True else wanted
        self._reference, self._is_default = weakref.ref(group), group is distributed.group.WORLD
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)

    @property
    def _group(self) -> Any:
        group = self._reference and self._reference()
        if self._reference is not None and group is None:
            raise RuntimeError("the process group of this trainer has been destroyed")
        return group

    def __deepcopy__(self, memo: Any) -> "Processes":
        return self  # copies of a trainer are of the same process

    def __reduce__(self) -> Any:
        if not self._is_default:
            raise TypeError("a trainer on a process group other than the default one cannot be pickled")
        return Processes, (self._reference is not None,)

    def share(self, members: int, multiple: int) -> range:
        """The members that this process evaluates: about as many as the others, in whole multiples of `multiple`."""
        units = members // multiple
        if units < self.count:
            least = self.count * multiple
            raise ValueError(f"`population_size` must be at least {least} for {self.count} processes, got {members}")
        return range(units * self.rank // self.count * multiple, units * (self.rank + 1) // self.count * multiple)

    def of_all(self, what: str, attempt: Callable[[], T]) -> list[T]:
        """What `attempt` returns in every process, in their order; if it raises in one, all raise.

        Args:
            what: the call that this is a part of, the same in all processes.

        Raises:
            RuntimeError: it raised in another process, or another makes another call.
        """
        if self.count == 1:
            return [attempt()]
        try:
            mine = attempt()
        except BaseException as error:  # Ctrl-C too: the others would wait
            self._exchanged(what, None, error)
            raise
        return self._exchanged(what, mine, None)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A context whose body every process runs; if it raises in one, all raise, as of `of_all`."""
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            self._exchanged(what, None, error)
            raise
        self._exchanged(what, None, None)

    def _exchanged(self, what: str, mine: T, error: BaseException | None) -> list[T]:
        told: list[Any] = [None] * self.count
        with uninterrupted():
            distributed.all_gather_object(told, (what, mine, error and _in_words(error)), self._group)
        if error is None:
            for rank, (_, _, problem) in enumerate(told):
                if problem is not None:
                    raise RuntimeError(f"process {rank} of {self.count} failed with {problem}")
            calls = [call for call, _, _ in told]
            if len(set(calls)) > 1:
                raise RuntimeError(f"the processes must make the same calls, they make {', '.join(calls)}")
        return [theirs for _, theirs, _ in told]

    def same(self, **values: Any) -> None:
        """Raises where a value is not the same in every process.

        Raises:
            ValueError: names the value, and says what it is in each.
        """
        check_same(self.of_all("the constructor", lambda: values))

    @torch.no_grad()
    def copy_first_(self, model: nn.Module) -> None:
        """Gives a model the parameters and buffers of the first process, as `DistributedDataParallel` does.

        Raises:
            ValueError: the processes' models have others.
        """
        if self.count > 1:
            named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
            self.same(model=[(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named])
            source = distributed.get_global_rank(self._group, 0)
            for _, tensor in named:
                whole = tensor.detach().contiguous()
                distributed.broadcast(whole, source, self._group)
                tensor.detach().copy_(whole)


def check_same(everyone: list[dict[str, Any]]) -> None:
    """Raises where a value is not the same in all dictionaries, which are those of the processes.

    Raises:
        ValueError: names the value, and says what it is in each.
    """
    for name in everyone[0]:
        found = [theirs.get(name) for theirs in everyone]
        if any(other != found[0] for other in found):
            raise ValueError(f"`{name}` must be the same in every process, got {', '.join(map(repr, found))}")


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except Exception:  # of its own `__str__`
        return type(error).__name__
