"""Fast Threefry draws in PyTorch, equal to `eggroll.prng` (integers to the bit, normals to a few ULP).

`eggroll.prng` allocates a new array for each of the 130 operations of a block. Here they run in place, and one call
draws rows in which every element has its own key, so the noise of all parameters of a member is one row and a model
of many small parameters costs no more than one large one.

On a CPU the rounds run in NumPy, whose unsigned integers shift logically and whose calls cost a quarter of PyTorch's,
in blocks, one thread for each of PyTorch's. Elsewhere they run in PyTorch's int32.
"""

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from eggroll import prng

from . import kernels

__all__ = ["Rows", "draw_uniforms", "fold_in"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Words of a block: by measurement the fastest on two cores, large enough that threads rarely wait for each other.
_BLOCK = 1 << 18


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of keys and numbers that broadcast, as int32 words.

    Args:
        keys: int32, shape ``(..., 2)``.
        data: int32, broadcastable against the leading axes of `keys`.

    Returns:
        int32, shape ``(..., 2)``.
    """
    k0, k1, data = torch.broadcast_tensors(keys[..., 0], keys[..., 1], data)
    if keys.device.type != "cpu":
        return torch.stack(_block(k0.contiguous(), k1.contiguous(), data + k1), dim=-1)
    words = np.empty((6, data.numel()), np.uint32)
    words[1], words[3], words[4] = (part.reshape(-1).numpy().view(np.uint32) for part in (data, k0, k1))
    words[1] += words[4]
    _block_of_words(words)
    return torch.from_numpy(words[:2].view(np.int32)).mT.contiguous().view(*data.shape, 2)


class Rows:
    """Draws rows that hold, side by side, the draws of several keys.

    Args:
        lengths: elements drawn from each key.
        device: where the rows are drawn.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self._bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tolist()
        counters = [np.arange(length, dtype=np.uint32) for length in lengths]
        self._counter = np.concatenate(counters) if counters else np.empty(0, np.uint32)
        self.device = device
        self._kernels = kernels.status(device).available
        if device.type != "cpu" or self._kernels:
            self._counter_there = torch.from_numpy(self._counter.view(np.int32)).to(device)
            key_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self._key_of_there = key_of.to(device, torch.int32)

    @property
    def length(self) -> int:
        """Elements in a row."""
        return len(self._counter)

    def normals(self, keys: Tensor, precision: prng.Precision = "float32") -> Tensor:
        """Standard normal rows.

        Args:
            keys: int32, shape ``(rows, n_keys, 2)``.
            precision: the dtype to draw in, see `eggroll.prng.normal`.

        Returns:
            float32, shape ``(rows, length)``.
        """
        if self._kernels:
            from .kernels.noise import draw_rows

            return draw_rows(keys, self._key_of_there, self._counter_there, precision)
        return self.draw(keys, lambda bits: _normals(bits, precision))

    def draw(self, keys: Tensor, floats: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of what `floats` makes of the elements' 32 random bits, which come as int32 and may be overwritten."""
        rows = keys.shape[0]
        if self.device.type != "cpu":
            k0, k1 = (keys[..., word].index_select(1, self._key_of_there) for word in (0, 1))
            x0, x1 = _block(k0, k1, k1 + self._counter_there)
            return floats(x0.bitwise_xor_(x1))
        out = torch.empty(rows, self.length, dtype=torch.float32)
        words = keys.contiguous().numpy().view(np.uint32)
        columns = max(1, min(self.length, _BLOCK))
        threads = torch.get_num_threads()
        block_rows = max(1, _BLOCK // columns)
        # As many blocks as keep all threads busy to the end.
        block_rows = -(-rows // (threads * -(-rows // (threads * block_rows)))) if rows else 1

        def fill(corner: tuple[int, int]) -> None:
            row, column = corner
            bits = self._bits(words[row : row + block_rows], column, min(column + columns, self.length))
            block = out[row : row + block_rows, column : column + columns]
            block.copy_(floats(torch.from_numpy(bits.view(np.int32))))

        corners = [(row, column) for row in range(0, rows, block_rows) for column in range(0, self.length, columns)]
        if len(corners) > 1 and threads > 1:
            list(_threads(threads).map(fill, corners))
        else:
            for corner in corners:
                fill(corner)
        return out

    def _bits(self, words: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The bits of some columns for rows of keys, uint32, in NumPy, until this thread's next call."""
        block = _scratch(6, (len(words), stop - start))
        k0, k1 = block[3:5]
        for key, (first, last) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            here = slice(max(first, start) - start, min(last, stop) - start)
            if here.start < here.stop:
                k0[:, here] = words[:, key, :1]
                k1[:, here] = words[:, key, 1:]
        np.add(k1, self._counter[start:stop], out=block[1])
        _block_of_words(block)
        return np.bitwise_xor(block[0], block[1], out=block[0])


class _Memory(threading.local):
    """What a thread draws in: memory fresh from the system costs as much time as the numbers that it is for."""

    words = np.empty(0, np.uint32)


_memory = _Memory()


def _scratch(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """`count` uint32 arrays of a shape, the same at every call in a thread."""
    size = math.prod(shape)
    if _memory.words.size < count * size:
        _memory.words = np.empty(count * size, np.uint32)
    return _memory.words[: count * size].reshape(count, *shape)


def draw_uniforms(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1), the upper 24 bits of each draw: float32, shape ``(*keys.shape[:-1], *shape)``.

    Args:
        keys: int32, shape ``(..., 2)``.
    """
    rows = Rows([math.prod(shape)], keys.device).draw(
        keys.reshape(-1, 1, 2),
        lambda bits: bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24),
    )
    return rows.view(*keys.shape[:-1], *shape)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread; but threads that start from now on would have one, too
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="eggroll-noise", initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(count)
    return pool


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but none of its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _block_of_words(words: np.ndarray) -> None:
    """`_block` in place, in NumPy.

    Args:
        words: uint32, shape ``(6, ...)``. On entry 1, 3 and 4 are `x1`, `k0` and `k1`; on return 0 and 1 are the
            words of the block.
    """
    x0, x1, scratch, *keys = words
    np.bitwise_xor(keys[0], keys[1], out=keys[2])
    np.bitwise_xor(keys[2], np.uint32(_PARITY), out=keys[2])
    np.copyto(x0, keys[0])
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            np.add(x0, x1, out=x0)
            np.right_shift(x1, np.uint32(32 - rotation), out=scratch)
            np.left_shift(x1, np.uint32(rotation), out=x1)
            np.bitwise_or(x1, scratch, out=x1)
            np.bitwise_xor(x1, x0, out=x1)
        np.add(x0, keys[(group + 1) % 3], out=x0)
        np.add(x1, keys[(group + 2) % 3], out=x1)
        np.add(x1, np.uint32(group + 1), out=x1)


def _block(k0: Tensor, k1: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter ``(0, x1 - k1)``; overwrites `x1`. int32 wraps where uint32 would."""
    keys = (k0, k1, (k0 ^ k1).bitwise_xor_(_PARITY))
    x0 = k0.clone()
    scratch = torch.empty_like(x1)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
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
        shift = {"bfloat16": 1, "float16": 6}[precision]
        table = torch.from_numpy(prng.narrow_normals(precision)).to(bits.device)
        return table[bits.bitwise_right_shift_(shift).bitwise_and_((1 << mantissa_bits) - 1).long()]
    u, w, normals = _three_floats(bits)
    u.copy_(bits.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1)).mul_(2.0**-22).sub_(1 - 2.0**-24)
    torch.mul(u, u, out=w).neg_().log1p_().neg_()
    if w.device.type == "cpu":
        # One draw in 300 lies in the tail: evaluate its polynomial there alone.
        tail = torch.from_numpy(np.flatnonzero(w.numpy() >= 5.0))
        in_tail = _polynomial(prng.ERFINV_TAIL, w.view(-1)[tail].sqrt_().sub_(3.0))
        _polynomial(prng.ERFINV_CENTRAL, w.sub_(2.5), out=normals).view(-1)[tail] = in_tail
    else:
        # Finding them would wait for the device.
        in_tail = _polynomial(prng.ERFINV_TAIL, w.sqrt().sub_(3.0))
        _polynomial(prng.ERFINV_CENTRAL, w - 2.5, out=normals)
        normals = torch.where(w >= 5.0, in_tail, normals)
    return normals.mul_(u).mul_(prng.SQRT2)


def _three_floats(bits: Tensor) -> list[Tensor]:
    """Three float32 tensors like `bits`; on a CPU from where this thread drew it, which it is the first of."""
    if bits.device.type != "cpu":
        return [torch.empty_like(bits, dtype=torch.float32) for _ in range(3)]
    return [torch.from_numpy(words.view(np.float32)) for words in _scratch(6, tuple(bits.shape))[1:4]]


def _polynomial(coefficients: tuple[float, ...], x: Tensor, out: Tensor | None = None) -> Tensor:
    value = torch.mul(x, coefficients[0], out=out).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        value.mul_(x).add_(coefficient)
    return value
