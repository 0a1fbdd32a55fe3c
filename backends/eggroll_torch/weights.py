"""The weights of an EGGROLL population: low-rank noise carried along, dense noise added."""

from collections.abc import Hashable

import torch
from torch import Tensor

from eggroll.perturbation import LowRank

from .autocast import without_autocast
from .noise import DrawnFactors, NoiseSource, StoredFactors
from .perturbed import DenseWeight, Noise, PerturbedWeight, Policy

__all__ = ["EggrollWeights"]


class EggrollWeights:
    """The members' weights of one generation, drawn chunk by chunk.

    Args:
        source: the noise of the generation.
        policy: what to do about operations without a low-rank rule.
        randomness_key: int32, shape ``(2,)``, on the CPU, the key of what is random in the model itself.
    """

    def __init__(self, source: NoiseSource, policy: Policy, randomness_key: Tensor):
        self.source = source
        self.policy = policy
        self.device = source.device
        self.randomness_key = randomness_key
        self.members_per_draw = source.members_per_draw
        self.numbers_in_a_draw = source.numbers_in_a_draw
        self._low_rank = [parameter for parameter in source.parameters if parameter.kind == "low_rank"]

    @property
    def signature(self) -> Hashable:
        return tuple((p.name, p.kind, p.kernel, p.rank, p.precision, p.rng) for p in self._low_rank)

    def prepare(self, members: range) -> None:
        self.source.chunk(members)

    def prepare_shared(self) -> None:
        self.source.draw_factors_of_all()

    def batched(self, members: range) -> dict[str, Tensor]:
        chunk = self.source.chunk(members)
        return {
            parameter.name: self.source.dense(parameter, chunk)
            for parameter in self.source.parameters
            if parameter.kind == "dense"
        }

    def shared(self, members: range) -> dict[str, list[Tensor]]:
        chunk = self.source.chunk(members)
        scales: dict[float, Tensor] = {}
        shared = {}
        for parameter in self._low_rank:
            factors, scale = self.source.factors(parameter, chunk), self.source.low_rank_scale(parameter)
            if scale not in scales:
                scales[scale] = chunk.signs * scale
            noise = [factors.keys] if isinstance(factors, DrawnFactors) else [factors.A, factors.B]
            shared[parameter.name] = [parameter.parameter.detach(), scales[scale], *noise]
        return shared

    def bind(self, place: Tensor, mine: dict[str, Tensor], shared: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        bound: dict[str, Tensor] = {
            name: DenseWeight.make(weight, name, self.policy) for name, weight in mine.items()
        }
        for parameter in self._low_rank if shared else ():
            weight, scales, *noise = shared[parameter.name]
            factors = StoredFactors(*noise) if len(noise) == 2 else DrawnFactors(noise[0], parameter)
            carried = Noise(factors, place, scales, parameter.name, self.policy, parameter.kernel)
            bound[parameter.name] = PerturbedWeight.make(weight, carried)
        return bound

    @torch.no_grad()
    def materialise(self, member: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        chunk = self.source.chunk_with(member)
        index = member - chunk.members.start
        with without_autocast(self.device):
            return {
                parameter.name: self.source.member_weight(parameter, chunk, index, dtype)
                for parameter in self.source.parameters
            }

    @torch.no_grad()
    def member_factors(self, member: int) -> dict[str, tuple[Tensor, Tensor]]:
        """``scale * A`` and ``B`` of one member, by the name of the parameter, float32."""
        chunk = self.source.chunk_with(member)
        index = member - chunk.members.start
        factors = {}
        for parameter in self.source.parameters:
            if parameter.kind == "low_rank":
                noise = self.source.noise_of_draw(parameter, chunk, index // self.members_per_draw)
                assert isinstance(noise, LowRank)
                scale = chunk.sign[index] * self.source.low_rank_scale(parameter)
                factors[parameter.name] = noise.A * scale, noise.B
        return factors
