"""Fast Threefry draws in PyTorch, equal to `eggroll.prng` (integers to the bit, normals to a few ULP).

`eggroll.prng` allocates a new array for each of the 130 operations of a block. Here they run in place, on blocks of
elements that stay in the cache, and one call draws a whole row of different keys: the noise of every parameter of a
member is one row, so a model of many small parameters costs no more than one large one.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eggroll import prng

__all__ = ["draw_normals", "draw_uniforms", "fold_in"]

# Two int32 words and a scratch one of this many elements stay in the second-level cache of two cores.
_BLOCK = 1 << 17


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of keys and numbers that broadcast, as int32 words.

    Args:
        keys: int32, shape ``(..., 2)``.
        data: int32, broadcastable against the leading axes of `keys`.

    Returns:
        int32, shape ``(..., 2)``.
    """
    k0, k1, data = torch.broadcast_tensors(keys[..., 0], keys[..., 1], data)
    x0, x1 = _block(k0.contiguous(), k1.contiguous(), data + k1)
    return torch.stack([x0, x1], dim=-1)


def draw_normals(keys: Tensor, key_of: Tensor, counter: Tensor, precision: prng.Precision = "float32") -> Tensor:
    """Standard normal rows in which every element has its own key and counter.

    Args:
        keys: int32, shape ``(rows, n_keys, 2)``.
        key_of: int64, shape ``(row_length,)``, which of the row's keys an element is drawn from.
        counter: int32, shape ``(row_length,)``, the index of the element in the draw of its key.
        precision: the dtype to draw in, see `eggroll.prng.normal`.

    Returns:
        float32, shape ``(rows, row_length)``.
    """
    return _draw(keys, key_of, counter, lambda bits: _normal_(bits, precision))


def draw_uniforms(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers on [0, 1), the upper 24 bits of each draw: float32, shape ``(*keys.shape[:-1], *shape)``.

    Args:
        keys: int32, shape ``(..., 2)``.
    """
    size = math.prod(shape)
    rows = _draw(
        keys.reshape(-1, 1, 2),
        torch.zeros(size, dtype=torch.int64, device=keys.device),
        torch.arange(size, dtype=torch.int32, device=keys.device),
        lambda bits: bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24),
    )
    return rows.view(*keys.shape[:-1], *shape)


def _draw(keys: Tensor, key_of: Tensor, counter: Tensor, floats: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows of float32 made, block by block, from the bits of every element's key and counter."""
    rows, length = keys.shape[0], key_of.shape[0]
    out = torch.empty(rows, length, dtype=torch.float32, device=keys.device)
    block = _BLOCK if keys.device.type == "cpu" else max(rows * length, 1)
    columns = min(length, block)
    block_rows = max(1, block // max(columns, 1))
    for row in range(0, rows, block_rows):
        row_keys = keys[row : row + block_rows]
        for column in range(0, length, columns):
            here = slice(column, column + columns)
            k0 = row_keys[..., 0].index_select(1, key_of[here])
            k1 = row_keys[..., 1].index_select(1, key_of[here])
            x0, x1 = _block(k0, k1, k1 + counter[here])
            out[row : row + block_rows, here] = floats(x0.bitwise_xor_(x1))
    return out


def _block(k0: Tensor, k1: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter ``(0, x1 - k1)``; overwrites `x1`. int32 wraps where uint32 would."""
    k2 = (k0 ^ k1).bitwise_xor_(0x1BD11BDA)
    keys = (k0, k1, k2)
    x0 = k0.clone()
    scratch = torch.empty_like(x1)
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
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


def _normal_(bits: Tensor, precision: prng.Precision) -> Tensor:
    """Normals from 32 random bits each; overwrites `bits`. See `eggroll.prng.normal`."""
    if precision != "float32":
        mantissa_bits = prng.MANTISSA_BITS[precision]
        shift = {"bfloat16": 1, "float16": 6}[precision]
        table = torch.from_numpy(prng.narrow_normals(precision)).to(bits.device)
        return table[bits.bitwise_right_shift_(shift).bitwise_and_((1 << mantissa_bits) - 1).long()]
    mantissas = bits.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1)
    u = mantissas.mul_(4).sub_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)
    w = torch.mul(u, u).neg_().log1p_().neg_()
    normals = _polynomial(prng.ERFINV_CENTRAL, w - 2.5)
    # One draw in 300 lies in the tail: evaluate its polynomial there alone.
    tail = (w >= 5.0).flatten().nonzero().squeeze(1)
    normals.view(-1)[tail] = _polynomial(prng.ERFINV_TAIL, w.flatten()[tail].sqrt_().sub_(3.0))
    return normals.mul_(u).mul_(prng.SQRT2)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = (x * coefficients[0]).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        value.mul_(x).add_(coefficient)
    return value
