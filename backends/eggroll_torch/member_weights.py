"""What a population asks of its members' weights."""

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor

from .policy import Policy

__all__ = ["MemberWeights"]


class MemberWeights(Protocol):
    """Where a population gets its members' weights from."""

    members_per_draw: int
    """A chunk of members starts at, and holds, whole multiples of this."""
    device: torch.device
    """Where the parameters are."""
    randomness_key: Tensor
    """int32, shape ``(2,)``, on the CPU: the key of what is random apart from the noise, such as dropout."""
    policy: Policy
    """What to do where the model cannot be vectorised as it is, and what was seen in the generation."""
    watched: list[str]
    """Names of the parameters of which it counts whether members use them."""
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
