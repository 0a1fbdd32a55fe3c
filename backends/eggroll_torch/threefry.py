"""Fast Threefry draws in PyTorch, equal to `eggroll.prng` (integers to the bit, normals to a few ULP).

`eggroll.prng` allocates a new array for each of the 130 operations of a block. Here they run in place, and one call
draws rows in which every element has its own key, so the noise of all parameters of a member is one row, and a model
of many small parameters is one call, too.

On a CPU the loops are compiled (`threefry_cpu`, by Numba), on a GPU they are kernels (`kernels.noise`). PyTorch's own
operations draw elsewhere, and where Numba or Triton cannot be imported.
"""

import functools
import logging
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from eggroll import prng

from . import kernels

__all__ = ["Rows", "draw_uniforms", "fold_in"]

_log = logging.getLogger("eggroll")


@functools.cache
def _compiled_for_cpu() -> ModuleType | None:
    """`threefry_cpu`, or None where Numba cannot be imported."""
    instead = "PyTorch's operations draw noise on CPUs, several times slower"
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        _log.info("%s: Numba is not installed", instead)
        return None
    except Exception as error:  # whatever it raises beside a NumPy or an LLVM that it does not know
        _log.warning("%s: Numba cannot be imported (%s: %s)", instead, type(error).__name__, error)
        return None
    from . import threefry_cpu

    return threefry_cpu


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of keys and numbers that broadcast, as int32 words.

    Args:
        keys: int32, shape ``(..., 2)``.
        data: int32, broadcastable against the leading axes of `keys`.

    Returns:
        int32, shape ``(..., 2)``.

    Raises:
        TypeError: of other dtypes, whose words the loops would misread.
    """
    _check_words("keys", keys)
    _check_words("data", data)
    shape = torch.broadcast_shapes(keys.shape[:-1], data.shape)
    keys, data = keys.expand(*shape, 2), data.expand(shape)
    compiled = _compiled_for_cpu() if keys.device.type == "cpu" else None
    if compiled is None:
        k0, k1 = (keys[..., word].contiguous() for word in (0, 1))
        return torch.stack(_block(k0, k1, data + k1), dim=-1)
    words = compiled.fold_in(keys.reshape(-1, 2).numpy().view(np.uint32), data.reshape(-1).numpy().view(np.uint32))
    return torch.from_numpy(words.view(np.int32)).view(*shape, 2)


class Rows:
    """Draws rows that hold, side by side, the draws of several keys.

    Args:
        lengths: elements drawn from each key.
        device: where the rows are drawn.

    Raises:
        ValueError: for a key of more than 2**31 - 1 elements.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        if max(lengths, default=0) >= 2**31:
            raise ValueError(f"one draw must have at most 2**31 - 1 elements, got {max(lengths)}")
        self._bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._kernels = kernels.status(device).available
        self._compiled = _compiled_for_cpu() if device.type == "cpu" and not self._kernels else None
        if self._compiled is None:
            counters = [torch.arange(length, dtype=torch.int32, device=device) for length in lengths]
            self._counter = torch.cat(counters or [torch.empty(0, dtype=torch.int32, device=device)])
            key_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
            self._key_of = key_of.to(device, torch.int32, non_blocking=True)

    @property
    def length(self) -> int:
        """Elements in a row."""
        return int(self._bounds[-1])

    def normals(self, keys: Tensor, precision: prng.Precision = "float32") -> Tensor:
        """Standard normal rows.

        Args:
            keys: int32, shape ``(rows, n_keys, 2)``.
            precision: the dtype to draw in, see `eggroll.prng.normal`.

        Returns:
            float32, shape ``(rows, length)``.
        """
        self._check(keys)
        if self._kernels:
            from .kernels.noise import draw_rows

            return draw_rows(keys, self._key_of, self._counter, precision)
        if self._compiled is not None:
            return self._compiled.draw(keys, self._bounds, precision)
        return _normals(self.bits(keys), precision)

    def bits(self, keys: Tensor) -> Tensor:
        """The 32 random bits of every element, int32; `keys` and shape as for `normals`."""
        self._check(keys)
        if self._compiled is not None:
            return self._compiled.draw(keys, self._bounds, "bits")
        k0, k1 = (keys[..., word].index_select(1, self._key_of) for word in (0, 1))
        x0, x1 = _block(k0, k1, k1 + self._counter)
        return x0.bitwise_xor_(x1)

    def _check(self, keys: Tensor) -> None:
        _check_words("keys", keys)
        if keys.shape[1:] != (len(self._bounds) - 1, 2):
            raise ValueError(f"`keys` must have shape (rows, {len(self._bounds) - 1}, 2), got {tuple(keys.shape)}")


def _check_words(name: str, words: Tensor) -> None:
    if words.dtype != torch.int32:
        raise TypeError(f"`{name}` must be int32, got {words.dtype}")


def draw_uniforms(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1), the upper 24 bits of each draw: float32, shape ``(*keys.shape[:-1], *shape)``.

    Args:
        keys: int32, shape ``(..., 2)``.
    """
    bits = Rows([math.prod(shape)], keys.device).bits(keys.reshape(-1, 1, 2))
    uniforms = bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)
    return uniforms.view(*keys.shape[:-1], *shape)


def _block(k0: Tensor, k1: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter ``(0, x1 - k1)``; overwrites `x1`. int32 wraps where uint32 would."""
    keys = (k0, k1, (k0 ^ k1).bitwise_xor_(prng.PARITY))
    x0 = k0.clone()
    scratch = torch.empty_like(x1)
    for group in range(5):
        for rotation in prng.ROTATIONS[group % 2]:
            x0.add_(x1)
            torch.bitwise_right_shift(x1, 32 - rotation, out=scratch)
            # int32 shifts right arithmetically: the mask makes the shift logical.
            scratch.bitwise_and_((1 << rotation) - 1)
            # x1 << rotation | scratch in one pass: the bits do not overlap.
            torch.add(scratch, x1, alpha=1 << rotation, out=x1)
            x1.bitwise_xor_(x0)
        x0.add_(keys[(group + 1) % 3])
        x1.add_(keys[(group + 2) % 3]).add_(group + 1)
    return x0, x1


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
