"""The weights of an EGGROLL population: low-rank noise carried along, dense noise added."""

from typing import Any

import torch
from torch import Tensor

from .noise import NoiseSource
from .perturbed import Noise, PerturbedWeight, Policy

__all__ = ["EggrollWeights"]

_MEMBER = "member"


class EggrollWeights:
    """The members' weights of one generation, drawn chunk by chunk.

    Args:
        source: the noise of the generation.
        policy: what to do about operations without a low-rank rule.
    """

    def __init__(self, source: NoiseSource, policy: Policy):
        self.source = source
        self.policy = policy
        self.members_per_draw = source.members_per_draw

    def prepare(self, members: range) -> None:
        self.source.chunk(members)

    def batched(self, members: range) -> dict[str, Any]:
        chunk = self.source.chunk(members)
        dense = {
            parameter.name: self.source.dense(parameter, chunk)
            for parameter in self.source.parameters
            if parameter.kind == "dense"
        }
        return {_MEMBER: torch.arange(len(members), device=chunk.signs.device), "dense": dense}

    def bind(self, members: range, mine: dict[str, Any]) -> dict[str, Tensor]:
        chunk = self.source.chunk(members)
        bound: dict[str, Tensor] = dict(mine["dense"])
        for parameter in self.source.parameters:
            if parameter.kind == "low_rank":
                factors = self.source.factors(parameter, chunk)
                noise = Noise(
                    factors.A, factors.B, mine[_MEMBER], factors.signs, factors.scale, parameter.name, self.policy
                )
                bound[parameter.name] = PerturbedWeight.make(parameter.parameter.detach(), noise)
        return bound

    @torch.no_grad()
    def materialise(self, member: int) -> dict[str, Tensor]:
        chunk = self.source.chunk_with(member)
        index = member - chunk.members.start
        return {
            parameter.name: self.source.member_weight(parameter, chunk, index) for parameter in self.source.parameters
        }
