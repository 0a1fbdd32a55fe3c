"""What the GPU benchmark measures: layers and their populations, and what no way to compute them can do without."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

WIDTHS = (8192, 4096, 1024)
POPULATIONS = (1024, 64, 256, 4096, 8192)
RANKS = (1, 4, 16)
MLP_MEMBERS, MLP_WIDTH, MLP_ROWS = 65_536, 256, 16
FORWARDS = ("forward, drawn", "forward, Philox", "forward, stored")
"""Of the methods that are measured, those that are forward passes of a population."""


@dataclass(frozen=True)
class Case:
    """One layer and a population of it.

    Attributes:
        width: features in and out.
        members: of the population, in antithetic pairs.
        rank: of the perturbation.
        shared: whether the members share one input row.
    """

    width: int
    members: int
    rank: int
    shared: bool

    @property
    def name(self) -> str:
        kind = "shared" if self.shared else "own"
        target = "target " if (self.width, self.members, self.rank) == (8192, 1024, 1) else ""
        return f"{target}d={self.width} n={self.members} rank={self.rank} {kind}"

    @property
    def operations(self) -> dict[str, float]:
        """Floating-point operations of the matrix products that a method cannot do without."""
        matrix, noise = 2.0 * self.width**2, 4.0 * self.members * self.rank * self.width
        forward = (1 if self.shared else self.members) * matrix + noise
        update = self.members / 2 * self.rank * matrix
        return {
            "pure inference": self.members * matrix,
            "forward, drawn": forward,
            "forward, Philox": forward,
            "forward, stored": forward,
            "two products": self.members * matrix + update,
            "generation": forward + update,
        }

    @property
    def bytes(self) -> dict[str, float]:
        """Bytes that a method cannot but read or write once: weight, inputs, outputs, stored noise, direction."""
        weight, rows = 2.0 * self.width**2, 2.0 * self.members * self.width
        forward = weight + rows + (0 if self.shared else rows)
        noise = 2.0 * self.members * self.width * self.rank
        return {
            "pure inference": weight + 2 * rows,
            "forward, drawn": forward,
            "forward, Philox": forward,
            "forward, stored": forward + noise,
            "two products": 2 * weight + 2 * rows + noise,
            "generation": forward + 2 * weight,
        }

    @property
    def activations(self) -> tuple[float, float]:
        """Bytes of the inputs and of the outputs of a population."""
        row = 2.0 * self.width
        return (1 if self.shared else self.members) * row, self.members * row

    def beyond(self, taken: float) -> float:
        """What of the memory that a generation takes is no output, relative to weights and activations."""
        inputs, outputs = self.activations
        return (taken - outputs) / (2.0 * self.width**2 + inputs + outputs)


def all_cases() -> Iterator[Case]:
    """The target, then rank by rank, the widest layers first."""
    for rank, width, members, shared in itertools.product(RANKS, WIDTHS, POPULATIONS, (False, True)):
        yield Case(width, members, rank, shared)
