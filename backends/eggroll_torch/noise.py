"""The noise of all trained parameters, drawn for a chunk of members at a time.

The draws of every parameter lie side by side in one row for each draw, so a chunk is one call of the generator. The
last chunk is kept, and others as long as they are small together: a population whose noise fits draws it once, for
the forward pass and the update; a larger one draws it twice and needs no more memory.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from eggroll import EggrollConfig, perturbation, prng

from . import kernels, threefry
from .drawing import Draws, Rows, fold_in_each
from .parameters import ParameterNoise

__all__ = ["KEPT", "ChunkNoise", "DrawnFactors", "NoiseSource", "StoredFactors"]


@dataclass(frozen=True)
class StoredFactors:
    """The low-rank noise of one parameter for a chunk of members, in memory.

    Attributes:
        A: shape ``(draws, *stack, out_features, rank)``.
        B: shape ``(draws, *stack, in_features, rank)``.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class DrawnFactors:
    """The low-rank noise of a matrix for a chunk of members, which kernels draw where they need it.

    Attributes:
        keys: int32, shape ``(draws, 2)``.
        parameter: the matrix.
    """

    keys: Tensor
    parameter: ParameterNoise

    @property
    def A(self) -> Tensor:
        """See `StoredFactors`; for operations without such a kernel."""
        return self._stored.A

    @property
    def B(self) -> Tensor:
        """See `A`."""
        return self._stored.B

    @cached_property
    def _stored(self) -> StoredFactors:
        return _stored(self.parameter, _drawn_alone(self.parameter, self.keys))


@dataclass(frozen=True)
class ChunkNoise:
    """The unscaled noise of a chunk of consecutive members.

    Attributes:
        members: which members.
        host_signs: float32, shape ``(members,)``, on the host: nothing has to wait for the device.
        keys: int32, shape ``(draws, n_keys, 2)``, those of every layer of every parameter.
        noise: by parameter name: `LowRank` factors or a dense tensor, float32, with one leading entry for each draw.
            Of parameters whose noise kernels draw there is none.
    """

    members: range
    host_signs: Tensor
    keys: Tensor
    noise: dict[str, perturbation.LowRank | Tensor]

    @cached_property
    def signs(self) -> Tensor:
        """The same on the device."""
        return self.host_signs.to(self.keys.device, non_blocking=True)


# Numbers that are kept besides those of the last chunk (16 MiB).
KEPT = 1 << 22


class NoiseSource:
    """Draws the noise of one generation, chunk by chunk, and keeps the last chunk and a few others.

    Args:
        parameters: what is perturbed.
        keys: the key of each parameter by name, uint32 of shape ``(2,)``.
        generation: which generation.
        config: the hyperparameters it is evaluated with.

    Attributes:
        members_per_draw: 2 for antithetic pairs, else 1. A chunk holds whole pairs.
        stores_noise: whether a chunk has noise in memory, and not keys alone, which cost next to nothing.
        numbers_in_a_draw: how long a row of noise is, or of keys where no noise is stored.
        numbers_of_member: of all its noise, stored or not.
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
        self.device = parameters[0].parameter.device
        self._drawn = _drawn_by_kernels(parameters, self.device, config.rng)
        self._keys = keys
        self._first_key = dict(
            zip(
                (parameter.name for parameter in self.parameters),
                accumulate((parameter.layers for parameter in self.parameters), initial=0),
                strict=False,
            )
        )
        drawn = [p for p in self.parameters if p.name in self._drawn and p.kind == "low_rank"]
        factors = sum(p.draw_size * p.parameter.element_size() for p in drawn)
        self._bytes_of_factors = factors * config.draws
        self._draws_once = 0 < self._bytes_of_factors <= 4 * KEPT
        stored = [parameter for parameter in self.parameters if parameter.name not in self._drawn]
        self._layout = _RowLayout(stored, self._first_key, self.device)
        self.stores_noise = bool(stored)
        self.numbers_in_a_draw = sum(parameter.draw_size for parameter in stored) or 2 * sum(
            parameter.layers for parameter in self.parameters
        )
        self.numbers_of_member = sum(parameter.draw_size for parameter in self.parameters)
        self.members_per_draw = config.members_per_draw
        self._begin(generation)

    def in_generation(self, generation: int) -> "NoiseSource":
        """The noise of another generation: of the same parameters, with the same hyperparameters."""
        other = copy.copy(self)
        other._begin(generation)
        return other

    def _begin(self, generation: int) -> None:
        self.generation = generation
        keys = _generation_keys(self.parameters, self._keys, generation, self.config)
        self._generation_keys = keys.to(self.device, non_blocking=True)
        self._all_keys: Tensor | None = None
        self._factors: dict[str, StoredFactors] = {}
        self._last: ChunkNoise | None = None
        self._kept: dict[range, ChunkNoise] = {}

    def drawn_by_kernels(self, parameter: ParameterNoise) -> bool:
        """Whether kernels draw this parameter's noise, where they need it or, if it is little, into memory."""
        return parameter.name in self._drawn

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
        # Drop the old chunk, and what is a part of the new one, before that is drawn.
        self._last = None
        self._kept = {of: old for of, old in self._kept.items() if of.start < members.start or of.stop > members.stop}
        # On the host: a GPU would be handed five launches for it, and asked for signs later.
        index = np.arange(members.start, members.stop, dtype=np.int32)
        draws, signs = perturbation.draws_and_signs(index, self.config)
        draws = draws[:: self.members_per_draw]
        if self._draws_once:
            keys = self._keys_of_all[self._place(members)]
        else:
            data = torch.from_numpy(np.ascontiguousarray(draws)).to(self.device, non_blocking=True)
            keys = fold_in_each(self._generation_keys, data)
        drawn = ChunkNoise(members, torch.from_numpy(signs), keys, self._layout.draw(keys))
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

    def keys(self, parameter: ParameterNoise, chunk: ChunkNoise) -> Tensor:
        """The keys of a parameter that is one layer, int32 of shape ``(draws, 2)``."""
        return chunk.keys[:, self._first_key[parameter.name]]

    def noise(self, parameter: ParameterNoise, chunk: ChunkNoise) -> perturbation.LowRank | Tensor:
        """The noise of a parameter for a chunk, as `ChunkNoise.noise` has it, drawn if it is not there."""
        stored = chunk.noise.get(parameter.name)
        return _drawn_alone(parameter, self.keys(parameter, chunk)) if stored is None else stored

    def noise_of_draw(self, parameter: ParameterNoise, chunk: ChunkNoise, draw: int) -> perturbation.LowRank | Tensor:
        """The noise of a parameter for one draw of a chunk, without the leading axis."""
        noise = chunk.noise.get(parameter.name)
        if noise is None:
            noise, draw = _drawn_alone(parameter, self.keys(parameter, chunk)[draw : draw + 1]), 0
        return noise[draw] if isinstance(noise, Tensor) else perturbation.LowRank(noise.A[draw], noise.B[draw])

    def factors(self, parameter: ParameterNoise, chunk: ChunkNoise) -> StoredFactors | DrawnFactors:
        """The low-rank noise of a parameter in its own dtype."""
        if not self.drawn_by_kernels(parameter):
            return _stored(parameter, self.noise(parameter, chunk))
        if not self._draws_once:
            return DrawnFactors(self.keys(parameter, chunk), parameter)
        whole = self._factors_of_all(parameter)
        if len(chunk.members) == self.config.population_size:
            return whole
        these = self._place(chunk.members)
        return StoredFactors(whole.A[these], whole.B[these])

    def _place(self, members: range) -> slice:
        """Where the draws of a chunk are among all."""
        return slice(members.start // self.members_per_draw, -(-members.stop // self.members_per_draw))

    def _factors_of_all(self, parameter: ParameterNoise) -> StoredFactors:
        """The factors of all draws of a matrix in its own dtype, drawn by a kernel the first time."""
        if parameter.name not in self._factors:
            from .kernels.noise import draw_factors

            keys = self._keys_of_all[:, self._first_key[parameter.name]]
            out_features, in_features = parameter.layer
            how = parameter.precision, parameter.rng, parameter.parameter.dtype
            factors = draw_factors(keys, None, parameter.rank, in_features, out_features, *how)
            self._factors[parameter.name] = StoredFactors(*factors)
        return self._factors[parameter.name]

    def draw_factors_of_all(self) -> None:
        """Draws what kernels draw once for the whole population."""
        for parameter in self.parameters if self._draws_once else ():
            if parameter.kind == "low_rank" and self.drawn_by_kernels(parameter):
                self._factors_of_all(parameter)

    def memory(self, members: int) -> int:
        """Bytes of noise and keys held at once at most where chunks of this many members are drawn."""
        of_all = self.numbers_in_a_draw * self.config.draws
        of_chunk = self.numbers_in_a_draw * members // self.members_per_draw
        drawn_once = self._bytes_of_factors if self._draws_once else 0
        return 4 * min(of_all, KEPT + of_chunk) + drawn_once

    @property
    def _keys_of_all(self) -> Tensor:
        """The keys of all draws, as `ChunkNoise.keys`."""
        if self._all_keys is None:
            every_draw = torch.arange(self.config.draws, dtype=torch.int32, device=self.device)
            self._all_keys = fold_in_each(self._generation_keys, every_draw)
        return self._all_keys

    def dense_noise(self, parameter: ParameterNoise, chunk: ChunkNoise) -> Tensor:
        """What is added to a parameter for each member of the chunk, in its dtype; shape ``(members, *shape)``."""
        noise = self.noise(parameter, chunk)
        assert isinstance(noise, Tensor)
        signs = (chunk.signs * parameter.scale).view(noise.shape[0], -1, *(1,) * (noise.ndim - 1))
        return (signs * noise.unsqueeze(1)).to(parameter.parameter.dtype).flatten(0, 1)

    def member_weight(
        self, parameter: ParameterNoise, chunk: ChunkNoise, index: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A parameter as one member of the chunk sees it, a tensor of its own, in `dtype` or the parameter's."""
        noise = self.noise_of_draw(parameter, chunk, index // self.members_per_draw)
        weight = parameter.parameter.detach()
        sign = float(chunk.host_signs[index])
        # Sum in float32 at least and round once: a narrow dtype would lose most of a small sigma.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        delta = noise if isinstance(noise, Tensor) else noise.A @ noise.B.mT
        return wide.add(delta.view(weight.shape), alpha=sign * parameter.scale).to(dtype or weight.dtype)


class _RowLayout:
    """Where in a row of noise each parameter's draws lie; every precision has rows of its own.

    Args:
        parameters: whose noise is in the rows.
        first_key: by the name of a parameter which key is its first layer's.
        device: where the rows are drawn.
    """

    def __init__(self, parameters: Sequence[ParameterNoise], first_key: dict[str, int], device: torch.device):
        by_precision: dict[tuple[prng.Precision, prng.Rng], list[ParameterNoise]] = {}
        for parameter in parameters:
            by_precision.setdefault((parameter.precision, parameter.rng), []).append(parameter)
        self._blocks = []
        for (precision, rng), members in by_precision.items():
            draws = [(parameter, draw) for parameter in members for draw in parameter.draws]
            rows = Rows([Draws(parameter.layers, *draw) for parameter, draw in draws], device, rng)
            keys = [first_key[parameter.name] + layer for parameter, _ in draws for layer in range(parameter.layers)]
            which = torch.tensor(keys, device="cpu").to(device, non_blocking=True)
            self._blocks.append((precision, members, rows, which))

    def draw(self, keys: Tensor) -> dict[str, perturbation.LowRank | Tensor]:
        """The noise by parameter name for rows of keys, int32 of shape ``(draws, n_keys, 2)``."""
        noise: dict[str, perturbation.LowRank | Tensor] = {}
        for precision, parameters, rows, which in self._blocks:
            drawn = iter(rows.normals(keys.index_select(1, which), precision))
            for parameter in parameters:
                noise[parameter.name] = _shaped(parameter, [next(drawn) for _ in parameter.draws])
        return noise


def _drawn_by_kernels(parameters: Sequence[ParameterNoise], device: torch.device, rng: prng.Rng) -> frozenset[str]:
    """See `NoiseSource.drawn_by_kernels`."""
    if not kernels.status(device, rng).available:
        return frozenset()
    layers = [parameter for parameter in parameters if not parameter.stack and parameter.kernel is None]
    return frozenset(layer.name for layer in layers if layer.parameter.dtype in kernels.DTYPES)


def _drawn_alone(parameter: ParameterNoise, keys: Tensor) -> perturbation.LowRank | Tensor:
    """The noise of a parameter that is one layer, from its keys, int32 of shape ``(draws, 2)``."""
    draws = [Draws(1, *draw) for draw in parameter.draws]
    drawn = Rows(draws, keys.device, parameter.rng).normals(
        keys.unsqueeze(1).expand(-1, len(draws), -1), parameter.precision
    )
    return _shaped(parameter, drawn)


def _stored(parameter: ParameterNoise, noise: perturbation.LowRank | Tensor) -> StoredFactors:
    """Factors in the dtype of their parameter."""
    assert isinstance(noise, perturbation.LowRank)
    dtype = parameter.parameter.dtype
    return StoredFactors(noise.A.to(dtype), noise.B.to(dtype))


def _shaped(parameter: ParameterNoise, drawn: Sequence[Tensor]) -> perturbation.LowRank | Tensor:
    """A parameter's `draws`, each of shape ``(draws, layers, *draw.shape)``, as dense noise or as factors."""
    if parameter.kind == "dense":
        return drawn[0].reshape(len(drawn[0]), *parameter.stack, *parameter.layer)
    by_layer = [part.reshape(len(part), *parameter.stack, *part.shape[2:]) for part in drawn]
    return perturbation.factors_of(by_layer, parameter.layer[1])


def _generation_keys(
    parameters: Sequence[ParameterNoise], keys: dict[str, Tensor], generation: int, config: EggrollConfig
) -> Tensor:
    """The key of every layer of every parameter in a generation, int32 of shape ``(n_keys, 2)``."""
    epoch = perturbation.draw_epoch(generation, config)
    layers = [
        perturbation.stacked_keys(keys[parameter.name].numpy(), parameter.stack).reshape(-1, 2)
        for parameter in parameters
    ]
    return torch.from_numpy(threefry.folded(np.concatenate(layers), epoch).view(np.int32))
