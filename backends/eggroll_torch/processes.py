"""Several processes, each of which evaluates its share of the members; nothing but their fitness travels.

Noise follows from keys, so every process can sum the direction of all members by itself and take the same step.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed, nn

__all__ = ["Distributed", "Processes"]

T = TypeVar("T")
Distributed = bool | Any
"""False, True for the default process group, or a `torch.distributed.ProcessGroup`."""


class Processes:
    """The processes of a run, of which this is one; alone it is the only one.

    Args:
        wanted: whether there are others: False, True for those of the default process group, or a group.

    Attributes:
        rank: which one this is.
        count: how many there are.
    """

    def __init__(self, wanted: Distributed):
        self.rank, self.count = 0, 1
        self._group: Any = None
        if wanted is False:
            return
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("`distributed` needs torch.distributed.init_process_group() before")
        if wanted is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`distributed` must be a process group that this process belongs to")
        if wanted is not True and not isinstance(wanted, distributed.ProcessGroup):
            raise TypeError(f"`distributed` must be a bool or a torch.distributed.ProcessGroup, got {wanted!r}")
        self._group = distributed.group.WORLD if wanted is True else wanted
        self.rank, self.count = distributed.get_rank(self._group), distributed.get_world_size(self._group)

    def __deepcopy__(self, memo: Any) -> "Processes":
        return self  # copies of a trainer are of the same process

    def share(self, members: int, multiple: int) -> range:
        """The members that this process evaluates: about as many as the others, in whole multiples of `multiple`."""
        units = members // multiple
        if units < self.count:
            least = self.count * multiple
            raise ValueError(f"`population_size` must be at least {least} for {self.count} processes, got {members}")
        return range(units * self.rank // self.count * multiple, units * (self.rank + 1) // self.count * multiple)

    def of_all(self, attempt: Callable[[], T]) -> list[T]:
        """What `attempt` returns in every process, in their order; if it raises in one, all raise.

        Raises:
            RuntimeError: it raised in another process.
        """
        if self.count == 1:
            return [attempt()]
        mine, error = None, None
        try:
            mine = attempt()
        except Exception as problem:
            error = problem
        told: list[Any] = [None] * self.count
        problem_in_words = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(told, (mine, problem_in_words), self._group)
        if error is not None:
            raise error
        for rank, (_, problem_there) in enumerate(told):
            if problem_there is not None:
                raise RuntimeError(f"process {rank} of {self.count} failed with {problem_there}")
        return [theirs for theirs, _ in told]

    def together(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns here; if it raises in one process, all raise, as of `of_all`."""
        found: list[T] = []
        self.of_all(lambda: found.append(attempt()))
        return found[0]

    def same(self, **values: Any) -> None:
        """Raises where a value is not the same in every process.

        Raises:
            ValueError: names the argument and its values.
        """
        everyone = self.of_all(lambda: values)
        for name in values:
            found = [theirs[name] for theirs in everyone]
            if any(other != found[0] for other in found):
                raise ValueError(f"`{name}` must be the same in every process, got {', '.join(map(repr, found))}")

    def of_first(self, value: T) -> T:
        """The value of the first process."""
        return self.of_all(lambda: value)[0]

    @torch.no_grad()
    def copy_first_(self, model: nn.Module) -> None:
        """Gives a model the parameters and buffers of the first process, as `DistributedDataParallel` does."""
        if self.count > 1:
            source = distributed.get_global_rank(self._group, 0)
            for tensor in (*model.parameters(), *model.buffers()):
                whole = tensor.detach().contiguous()
                distributed.broadcast(whole, source, self._group)
                tensor.detach().copy_(whole)
