"""Fast draws in PyTorch, equal to `eggroll.prng` (integers to the bit, normals to a few ULP).

One call draws rows that hold the draws of many keys, so the noise of all parameters of a member is one row, and a
model of many small parameters is one call, too.

On a CPU the loops are compiled (`drawing_cpu`, by Numba), on a GPU they are kernels (`kernels.noise`). PyTorch's own
operations draw elsewhere, and where Numba or Triton cannot be imported.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eggroll import prng
from eggroll.config import RNGS, as_choice

from . import kernels, philox, threefry
from .vectorising import called

__all__ = ["LONGEST", "Draws", "Rows", "draw_uniforms", "fold_in_each"]

LONGEST = 2**31 - 1
"""Elements of one draw, which are counted in 32 bits."""

# Shapes of a row up to which its places are counted on the device: both factors of a matrix, or what a layer draws.
_COUNTED = 2


class Draws(NamedTuple):
    """Draws of one shape from keys that follow each other."""

    keys: int
    """How many."""
    shape: tuple[int, ...]
    """Of what is drawn from each."""
    stream: int = 0
    """See `eggroll.prng.bits`."""


class Rows:
    """Draws rows that hold, side by side, the draws of several keys.

    A row is cut into runs, each of which counts up from 0: with Threefry the draw of a key, with Philox each row of
    it, filled up to whole blocks.

    Args:
        draws: what is drawn from the keys in turn.
        device: where the rows are drawn.
        rng: the generator, see `eggroll.prng`.

    Raises:
        ValueError: for a draw of more than 2**31 - 1 elements, or another generator.
    """

    def __init__(self, draws: Sequence[Draws], device: torch.device, rng: prng.Rng = "threefry"):
        longest = max((math.prod(draw.shape) for draw in draws), default=0)
        if longest > LONGEST:
            raise ValueError(f"one draw must have at most 2**31 - 1 elements, got {longest}")
        self._rng = rng
        self._elements = 4 if as_choice("rng", rng, RNGS) == "philox" else 1  # of a block
        self._draws = tuple(draws)
        self._keys = sum(draw.keys for draw in draws)
        self._shapes = self._runs_of_keys()
        self._runs, self._bounds = _runs(self._draws, self._shapes)
        self._kernels = kernels.status(device, rng).available
        self._compiled = threefry.compiled_for_cpu() if device.type == "cpu" and not self._kernels else None
        if self._compiled is None:
            self._key_of, self._counter = self._places(device)

    @property
    def length(self) -> int:
        """Numbers in a row, those included that only fill up blocks."""
        return int(self._bounds[-1])

    def normals(self, keys: Tensor, precision: prng.Precision = "float32") -> list[Tensor]:
        """Standard normal numbers.

        Args:
            keys: int32, shape ``(rows, n_keys, 2)``.
            precision: the dtype to draw in, see `eggroll.prng.normal`.

        Returns:
            For each entry of `draws` float32, shape ``(rows, draws.keys, *draws.shape)``: views of the rows.
        """
        self._check(keys)
        if self._kernels:
            from .kernels.noise import draw_rows

            return self._parted(
                called(draw_rows, keys, self._key_of, self._counter, precision, torch.float32, self._rng)
            )
        if self._compiled is not None:
            return self._parted(self._compiled.draw(keys, self._bounds, self._runs, precision, self._rng))
        return self._parted(_normals(self._bits(keys), precision))

    def bits(self, keys: Tensor) -> list[Tensor]:
        """The 32 random bits of every element, int32; `keys` and shapes as for `normals`."""
        self._check(keys)
        return self._parted(self._bits(keys))

    def _bits(self, keys: Tensor) -> Tensor:
        if self._compiled is not None:
            return self._compiled.draw(keys, self._bounds, self._runs, "bits", self._rng)
        k0, k1 = (keys[..., word].index_select(1, self._key_of) for word in (0, 1))
        if self._rng == "threefry":
            return threefry.bits(k0, k1, self._counter)
        return philox.bits(k0, k1, *self._counter).flatten(1)

    def _runs_of_keys(self) -> list[tuple[int, int, int]]:
        """For each entry of `draws`: runs of a key, numbers in a run, and how many of those are elements."""
        if self._rng == "threefry":
            return [(1, math.prod(draw.shape), math.prod(draw.shape)) for draw in self._draws]
        columns = [draw.shape[-1] if draw.shape else 1 for draw in self._draws]
        rows = [math.prod(draw.shape[:-1]) for draw in self._draws]
        return [(count, -(-length // 4) * 4, length) for count, length in zip(rows, columns, strict=True)]

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of each block of a row whose key's it is, and its counter: one word of Threefry's, three of Philox's."""
        if 0 < len(self._draws) <= _COUNTED:
            return self._places_counted(device)
        starts = torch.from_numpy(self._bounds // self._elements).to(device, non_blocking=True)
        runs = torch.from_numpy(self._runs.view(np.int32)).to(device, non_blocking=True)
        blocks, total = starts.diff(), self.length // self._elements

        def of_block(values: Tensor) -> Tensor:
            return values.repeat_interleave(blocks, output_size=total)

        counter = torch.arange(total, device=device).sub_(of_block(starts[:-1])).to(torch.int32)
        if self._rng == "philox":
            counter = torch.stack([counter, of_block(runs[:, 1]), of_block(runs[:, 2])])
        return of_block(runs[:, 0]), counter

    def _places_counted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`_places`, counted on the device: a copy from the host's memory is not to be part of a CUDA graph."""
        key_of, counters, first_key = [], [], 0
        for draw, (rows, length, _) in zip(self._draws, self._shapes, strict=True):
            blocks = length // self._elements
            counter = torch.arange(draw.keys * rows * blocks, device=device)
            key, row = torch.full_like(counter, first_key), torch.zeros_like(counter)
            if draw.keys * rows > 1:
                run, counter = counter // max(blocks, 1), counter % max(blocks, 1)
                key, row = key + run // max(rows, 1), run % max(rows, 1)
            if self._rng == "philox":
                counter = torch.stack([counter, row, torch.full_like(counter, draw.stream)])
            key_of.append(key.to(torch.int32))
            counters.append(counter.to(torch.int32))
            first_key += draw.keys
        return torch.cat(key_of), torch.cat(counters, dim=-1)

    def _parted(self, rows: Tensor) -> list[Tensor]:
        sizes = [
            draw.keys * count * length for draw, (count, length, _) in zip(self._draws, self._shapes, strict=True)
        ]
        parts = []
        for draw, (count, length, elements), part in zip(
            self._draws, self._shapes, rows.split(sizes, dim=1), strict=True
        ):
            if elements < length:
                part = part.view(len(rows), draw.keys, count, length)[..., :elements]
            parts.append(part.view(len(rows), draw.keys, *draw.shape))
        return parts

    def _check(self, keys: Tensor) -> None:
        threefry.check_words("keys", keys)
        if keys.shape[1:] != (self._keys, 2):
            raise ValueError(f"`keys` must have shape (rows, {self._keys}, 2), got {tuple(keys.shape)}")


def _runs(draws: Sequence[Draws], shapes: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The key, the row and the stream of every run, and where it starts and the last one ends.

    Returns:
        uint32, shape ``(runs, 3)``, and int64, shape ``(runs + 1,)``.
    """
    keys, streams = (np.asarray([getattr(draw, name) for draw in draws], np.int64) for name in ("keys", "stream"))
    rows, lengths, _ = np.asarray(shapes, np.int64).reshape(-1, 3).T
    runs = keys * rows
    draw = np.arange(len(draws)).repeat(runs)
    key, row = np.divmod(np.arange(len(draw)) - (np.cumsum(runs) - runs)[draw], rows[draw])
    key += (np.cumsum(keys) - keys)[draw]
    return np.stack([key, row, streams[draw]], axis=1).astype(np.uint32), np.cumsum([0, *lengths[draw]])


def fold_in_each(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of each number into each key, on the device where they are.

    Args:
        keys: int32, shape ``(n_keys, 2)``.
        data: int32, shape ``(draws,)``.

    Returns:
        int32, shape ``(draws, n_keys, 2)``.
    """
    if kernels.status(keys.device).available:
        from .kernels.noise import fold_in

        return called(fold_in, keys, data)
    return threefry.fold_in(keys, data.unsqueeze(1))


def draw_uniforms(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1), the upper 24 bits of each draw: float32, shape ``(*keys.shape[:-1], *shape)``.

    Args:
        keys: int32, shape ``(..., 2)``.
    """
    (bits,) = Rows([Draws(1, tuple(shape))], keys.device).bits(keys.reshape(-1, 1, 2))
    uniforms = bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)
    return uniforms.view((*keys.shape[:-1], *shape))


def _normals(bits: Tensor, precision: prng.Precision) -> Tensor:
    """Normals from 32 random bits each; overwrites `bits`. See `eggroll.prng.normal`."""
    if precision != "float32":
        mantissa_bits = prng.MANTISSA_BITS[precision]
        shift = prng.MANTISSA_SHIFTS[precision]
        table = torch.from_numpy(prng.narrow_normals(precision)).to(bits.device)
        return table[bits.bitwise_right_shift_(shift).bitwise_and_((1 << mantissa_bits) - 1).long()]
    u = bits.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1).to(torch.float32)
    u.mul_(2.0**-22).sub_(1 - 2.0**-24)
    w = torch.mul(u, u).neg_().log1p_().neg_()
    in_tail = _polynomial(prng.ERFINV_TAIL, w.sqrt().sub_(3.0))
    normals = torch.where(w >= 5.0, in_tail, _polynomial(prng.ERFINV_CENTRAL, w - 2.5))
    return normals.mul_(u).mul_(prng.SQRT2)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.mul(x, coefficients[0]).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        value.mul_(x).add_(coefficient)
    return value
