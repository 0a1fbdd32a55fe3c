"""The weights of an EGGROLL population: low-rank noise carried along, dense noise added, or left to kernels."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eggroll.perturbation import LowRank

from .autocast import without_autocast
from .noise import ChunkNoise, DrawnFactors, NoiseSource, StoredFactors
from .parameters import ParameterNoise
from .perturbed import DenseNoise, DenseWeight, Noise, PerturbedWeight
from .policy import Policy

__all__ = ["EggrollWeights"]

# Numbers of noise of a chunk up to which it is kept ready for further calls (4 MiB): those of small policies, say,
# that play for hundreds of steps. Otherwise it would take longer to make it ready in each than to use it.
_KEPT = 1 << 20


@dataclass
class _Prepared:
    """The noise of a chunk, ready for use: nothing that depends on the values of parameters.

    Attributes:
        chunk: the noise that it is made of.
        dense: by name the dense noise of each member as it is added to the parameter, once it was needed.
        shared: by name the scales of all members, then the factors or keys, once they were needed.
    """

    chunk: ChunkNoise
    dense: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, list[Tensor]] = field(default_factory=dict)


class EggrollWeights:
    """The members' weights of one generation, drawn chunk by chunk; see `MemberWeights`.

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
        self.watched = [parameter.name for parameter in source.parameters]
        # Parameters of which each member has a copy, and those that carry the noise of all along, as factors or keys.
        self._formed = [p for p in source.parameters if p.kind == "dense" and not source.drawn_by_kernels(p)]
        self._carrying = [p for p in source.parameters if p.kind == "low_rank" or source.drawn_by_kernels(p)]
        self._prepared: _Prepared | None = None

    @cached_property
    def signature(self) -> Hashable:
        return tuple((p.name, p.kind, p.kernel, p.rank, p.precision, p.rng) for p in self._carrying)

    def prepare(self, members: range) -> None:
        self.source.chunk(members)

    def prepare_shared(self) -> None:
        self.source.draw_factors_of_all()

    def batched(self, members: range) -> dict[str, Tensor]:
        prepared = self._of_chunk(members)
        return {parameter.name: self._with_dense_noise(parameter, prepared) for parameter in self._formed}

    def shared(self, members: range) -> dict[str, list[Tensor]]:
        prepared = self._of_chunk(members)
        noise = prepared.shared = prepared.shared or self._shared_noise(prepared.chunk)
        return {p.name: [p.parameter.detach(), *noise[p.name]] for p in self._carrying}

    def _of_chunk(self, members: range) -> _Prepared:
        if self._prepared is not None and self._prepared.chunk.members == members:
            return self._prepared
        prepared = _Prepared(self.source.chunk(members))
        if len(members) * self.source.numbers_of_member <= _KEPT:
            self._prepared = prepared
        return prepared

    def _shared_noise(self, chunk: ChunkNoise) -> dict[str, list[Tensor]]:
        """See `_Prepared`."""
        source, noise, scales = self.source, {}, {}
        for parameter in self._carrying:
            scale = parameter.scale
            if parameter.kind == "dense":
                drawn = [source.keys(parameter, chunk)]
            else:
                factors = source.factors(parameter, chunk)
                drawn = [factors.keys] if isinstance(factors, DrawnFactors) else [factors.A, factors.B]
            if scale not in scales:
                scales[scale] = (chunk.host_signs * scale).to(self.device, non_blocking=True)
            noise[parameter.name] = [scales[scale], *drawn]
        return noise

    def _with_dense_noise(self, parameter: ParameterNoise, prepared: _Prepared) -> Tensor:
        """A parameter with dense noise as each member of the chunk sees it, shape ``(members, *shape)``."""
        noise = prepared.dense.get(parameter.name)
        if noise is None:
            noise = self.source.dense_noise(parameter, prepared.chunk)
            if prepared is self._prepared:
                prepared.dense[parameter.name] = noise
        return parameter.parameter.detach() + noise

    def bind(self, place: Tensor, mine: dict[str, Tensor], shared: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        bound: dict[str, Tensor] = {
            name: DenseWeight.make(weight, name, self.policy) for name, weight in mine.items()
        }
        for parameter in self._carrying:
            weight, scales, *noise = shared[parameter.name]
            if parameter.kind == "dense":
                drawn = DenseNoise(noise[0], parameter.precision, parameter.rng, place, scales)
                bound[parameter.name] = DenseWeight.make(weight, parameter.name, self.policy, drawn)
                continue
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
                scale = float(chunk.host_signs[index]) * parameter.scale
                factors[parameter.name] = noise.A * scale, noise.B
        return factors
