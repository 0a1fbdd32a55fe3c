"""How many members are evaluated, drawn and summed at a time."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from eggroll.config import as_size

from .memory import PeakMemory, free_memory

__all__ = ["ChunkSize", "Chunking", "chunk_ranges"]

ChunkSize = int | Literal["auto"] | None

# A chunk whose tensors stay below this is faster on a CPU than a larger one, whose every tensor is mapped anew.
_CPU_BYTES = 24 << 20
# Of the free memory: the rest is for what is not measured, such as the workspaces of libraries.
_SHARE = 0.5
# Noise that is drawn at a time where nothing else decides, in numbers (64 MiB).
_NOISE = 1 << 24


class Chunking:
    """The chunk size of a trainer, which ``"auto"`` finds out in its first forward pass.

    Args:
        requested: members at a time; None for all of a population; ``"auto"`` to measure.
    """

    def __init__(self, requested: ChunkSize):
        self.requested: ChunkSize = as_size("chunk_size", requested)
        self._measured: int | None = None

    @property
    def measures_next(self) -> bool:
        """Whether the next forward pass of enough members is measured."""
        return self.requested == "auto" and self._measured is None

    def forward(self, members: int, multiple: int, device: torch.device, run: Callable[[int], int]) -> int:
        """Members at a time in a forward pass.

        Args:
            members: of the population.
            multiple: members that share a draw.
            device: whose memory counts.
            run: runs the first members, given how many, and returns the bytes of their outputs.
        """
        if self.requested != "auto":
            return min(members, -(-(self.requested or members) // multiple) * multiple)
        if self._measured is None:
            if members <= multiple:
                return members  # too few to measure
            self._measured = self._measure(members, multiple, device, run)
        return _evenly(members, self._measured, multiple)

    def noise(self, members: int, multiple: int, numbers_in_a_draw: int) -> int:
        """Members whose noise is drawn at a time for the update, or to evaluate them one by one."""
        decided = self.requested
        if decided == "auto":  # the chunks of the forward pass, whose noise may still be there
            decided = None if self._measured is None else _evenly(members, self._measured, multiple)
        return min(decided or members, members, max(1, _NOISE // numbers_in_a_draw) * multiple)

    @staticmethod
    def _measure(members: int, multiple: int, device: torch.device, run: Callable[[int], int]) -> int:
        few, more = multiple, min(4 * multiple, members)
        peaks = []
        for count in (few, more):
            with PeakMemory() as memory:
                outputs = run(count)
            peaks.append(memory.peak)
        for_a_member = max(1.0, (peaks[1] - peaks[0]) / (more - few))
        of_all_outputs = outputs * members / more  # which are collected
        available = _SHARE * (free_memory(device) - of_all_outputs) - peaks[0]
        if device.type == "cpu":
            available = min(available, _CPU_BYTES)
        return max(multiple, int(available / for_a_member) // multiple * multiple)


def _evenly(members: int, most: int, multiple: int) -> int:
    """At most `most` members at a time, of as many chunks as that takes, in chunks of one size."""
    if members <= most:
        return members
    chunks = -(-members // most)
    return min(most, -(-members // (chunks * multiple)) * multiple)


def chunk_ranges(members: range, size: int, multiple: int) -> Iterator[range]:
    """`members` in parts of at most `size`, rounded up to whole multiples of `multiple`."""
    size = -(-size // multiple) * multiple
    for start in range(members.start, members.stop, size):
        yield range(start, min(start + size, members.stop))
