"""The noise of all trained parameters, drawn for a chunk of members at a time.

The draws of every parameter lie side by side in one row for each draw, so a chunk is one call of the generator. The
last chunk is kept, and others as long as they are small together: a population whose noise fits draws it once, for
the forward pass and the update; a larger one draws it twice and needs no more memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eggroll import EggrollConfig, perturbation, prng

from . import threefry
from .parameters import ParameterNoise

__all__ = ["KEPT", "ChunkNoise", "NoiseSource", "PopulationFactors"]


@dataclass(frozen=True)
class PopulationFactors:
    """The low-rank noise of one parameter for a chunk of members.

    Member ``i`` of the chunk uses draw ``i // (members / draws)``, and its weight is

        W_i = W + signs[i] * scale * A[draw] @ B[draw].T        scale = sigma / sqrt(rank)

    Attributes:
        A: shape ``(draws, *stack, out_features, rank)``.
        B: shape ``(draws, *stack, in_features, rank)``.
        signs: float32, shape ``(members,)``: +1, -1, or 0 for a member that is not perturbed.
        scale: ``sigma / sqrt(rank)``.
    """

    A: Tensor
    B: Tensor
    signs: Tensor
    scale: float


@dataclass(frozen=True)
class ChunkNoise:
    """The unscaled noise of a chunk of consecutive members.

    Attributes:
        members: which members.
        signs: float32, shape ``(members,)``.
        noise: by parameter name: `LowRank` factors or a dense tensor, float32, with one leading entry for each draw.
    """

    members: range
    signs: Tensor
    noise: dict[str, perturbation.LowRank | Tensor]


# Numbers that are kept besides those of the last chunk (16 MiB).
KEPT = 1 << 22


class NoiseSource:
    """Draws the noise of one generation, chunk by chunk, and keeps the last chunk and a few others.

    Args:
        parameters: what is perturbed.
        keys: the key of each parameter by name, uint32 of shape ``(2,)``.
        generation: which generation.
        config: the hyperparameters it is evaluated with.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterNoise],
        keys: dict[str, Tensor],
        generation: int,
        config: EggrollConfig,
    ):
        self.parameters = tuple(parameters)
        self.config = config
        self.generation = generation
        self.device = parameters[0].parameter.device
        self._generation_keys = _generation_keys(self.parameters, keys, generation, config).to(self.device)
        self._layout = _RowLayout(self.parameters, self.device)
        self._last: ChunkNoise | None = None
        self._kept: dict[range, ChunkNoise] = {}

    @property
    def members_per_draw(self) -> int:
        """2 for antithetic pairs, else 1. A chunk holds whole pairs."""
        return 2 if self.config.antithetic else 1

    @property
    def numbers_in_a_draw(self) -> int:
        """How long a row of noise is."""
        return sum(parameter.draw_size for parameter in self.parameters)

    def holds(self, members: range) -> bool:
        """Whether the noise of these members is there already."""
        return members in self._kept or (self._last is not None and self._last.members == members)

    @torch.no_grad()
    def chunk(self, members: range) -> ChunkNoise:
        """The noise of consecutive members that start at, and hold, whole pairs."""
        if members in self._kept:
            return self._kept[members]
        if self._last is not None and self._last.members == members:
            return self._last
        self._last = None  # drop the old chunk before the new one is drawn
        index = torch.arange(members.start, members.stop, dtype=torch.int32, device=self.device)
        draws, signs = perturbation.draws_and_signs(index, self.config)
        rows = threefry.fold_in(self._generation_keys, draws[:: self.members_per_draw, None])
        drawn = ChunkNoise(members, signs, self._layout.draw(rows))
        if sum(map(len, (*self._kept, members))) * self.numbers_in_a_draw <= KEPT * self.members_per_draw:
            self._kept[members] = drawn
        else:
            self._last = drawn
        return drawn

    def chunk_with(self, member: int) -> ChunkNoise:
        """A chunk that holds `member`: one that is there, or that of its draw alone."""
        if self._last is not None and member in self._last.members:
            return self._last
        for chunk in reversed(self._kept.values()):
            if member in chunk.members:
                return chunk
        start = member - member % self.members_per_draw
        return self.chunk(range(start, start + self.members_per_draw))

    def dense_scale(self, parameter: ParameterNoise) -> float:
        """What dense noise is multiplied with, apart from the sign."""
        return parameter.sigma

    def low_rank_scale(self, parameter: ParameterNoise) -> float:
        """What ``A @ B.T`` is multiplied with, apart from the sign."""
        return parameter.sigma / math.sqrt(parameter.rank)

    def factors(self, parameter: ParameterNoise, chunk: ChunkNoise) -> PopulationFactors:
        """The low-rank noise of a parameter in its own dtype."""
        noise = chunk.noise[parameter.name]
        assert isinstance(noise, perturbation.LowRank)
        dtype = parameter.parameter.dtype
        return PopulationFactors(noise.A.to(dtype), noise.B.to(dtype), chunk.signs, self.low_rank_scale(parameter))

    def dense(self, parameter: ParameterNoise, chunk: ChunkNoise) -> Tensor:
        """A parameter with dense noise as each member of the chunk sees it, shape ``(members, *shape)``."""
        noise = chunk.noise[parameter.name]
        assert isinstance(noise, Tensor)
        weight = parameter.parameter.detach()
        per_draw = noise.shape[0]
        signs = (chunk.signs * self.dense_scale(parameter)).view(per_draw, -1, *(1,) * weight.ndim)
        perturbed = weight + (signs * noise.unsqueeze(1)).to(weight.dtype)
        return perturbed.flatten(0, 1)

    def member_weight(
        self, parameter: ParameterNoise, chunk: ChunkNoise, index: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A parameter as one member of the chunk sees it, a tensor of its own, in `dtype` or the parameter's."""
        noise = chunk.noise[parameter.name]
        weight = parameter.parameter.detach()
        sign = float(chunk.signs[index])
        draw = index // self.members_per_draw
        # Sum in float32 at least and round once: a narrow dtype would lose most of a small sigma.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if isinstance(noise, Tensor):
            delta, scale = noise[draw], self.dense_scale(parameter)
        else:
            delta, scale = noise.A[draw] @ noise.B[draw].mT, self.low_rank_scale(parameter)
        return wide.add(delta.view(weight.shape), alpha=sign * scale).to(dtype or weight.dtype)


class _RowLayout:
    """Where in a row of noise each parameter's draw lies; every precision has rows of its own."""

    def __init__(self, parameters: Sequence[ParameterNoise], device: torch.device):
        by_precision: dict[prng.Precision, list[ParameterNoise]] = {}
        first_key: dict[str, int] = {}
        keys = 0
        for parameter in parameters:
            by_precision.setdefault(parameter.precision, []).append(parameter)
            first_key[parameter.name] = keys
            keys += parameter.layers
        self._blocks = []
        for precision, members in by_precision.items():
            layers = [
                (p.draw_size // p.layers, first_key[p.name] + layer) for p in members for layer in range(p.layers)
            ]
            rows = threefry.Rows([length for length, _ in layers], device)
            which = torch.tensor([key for _, key in layers], device=device)
            self._blocks.append((precision, members, rows, which))

    def draw(self, keys: Tensor) -> dict[str, perturbation.LowRank | Tensor]:
        """The noise by parameter name for rows of keys, int32 of shape ``(draws, n_keys, 2)``."""
        noise: dict[str, perturbation.LowRank | Tensor] = {}
        for precision, parameters, rows, which in self._blocks:
            drawn = rows.normals(keys.index_select(1, which), precision)
            sizes = [parameter.draw_size for parameter in parameters]
            for parameter, flat in zip(parameters, torch.split(drawn, sizes, dim=1), strict=True):
                shaped = flat.reshape(len(flat), *parameter.stack, *parameter.draw_shape)
                if parameter.kind == "dense":
                    noise[parameter.name] = shaped
                else:
                    in_features = parameter.layer[1]
                    noise[parameter.name] = perturbation.LowRank(
                        A=shaped[..., in_features:, :], B=shaped[..., :in_features, :]
                    )
        return noise


def _generation_keys(
    parameters: Sequence[ParameterNoise], keys: dict[str, Tensor], generation: int, config: EggrollConfig
) -> Tensor:
    """The key of every layer of every parameter in a generation, int32 of shape ``(n_keys, 2)``."""
    epoch = 0 if config.noise_lifetime is None else generation // config.noise_lifetime
    layers = [
        perturbation.stacked_keys(keys[parameter.name], parameter.stack).reshape(-1, 2).to(torch.int32)
        for parameter in parameters
    ]
    return threefry.fold_in(torch.cat(layers), torch.tensor(epoch, dtype=torch.int32))
