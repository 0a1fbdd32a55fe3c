"""Numbers in registers, of either generator. The definition is `eggroll.prng`."""

import triton
import triton.language as tl

from . import philox, threefry
from .normals import normal_of_bits

__all__ = ["bits", "blocks_of", "normals"]

_philox_block = philox.block
_threefry_block = threefry.block


@triton.jit
def blocks_of(start, WIDTH: tl.constexpr):
    """Which of Philox's blocks hold the elements `start` to ``start + WIDTH``, both multiples of 4."""
    return start // 4 + tl.arange(0, WIDTH // 4)


@triton.jit
def bits(k0, k1, counter, block, row, stream, RNG: tl.constexpr):
    """32 random bits for each number of the draws of keys, uint32.

    With Threefry of the elements `counter`; with Philox, for each of `block` along the last axis, of its four
    elements, of `row` and `stream`.
    """
    if RNG == "philox":
        w0, w1, w2, w3 = _philox_block(k0, k1, block, row, stream)
        drawn = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        x0, x1 = _threefry_block(k0, k1, counter.to(tl.uint32))
        drawn = x0 ^ x1
    return drawn


@triton.jit
def normals(k0, k1, counter, block, row, stream, table, PRECISION: tl.constexpr, RNG: tl.constexpr):
    """Standard normal numbers, float32, of the elements of `bits`.

    `PRECISION` is that of `eggroll.prng.normal`; for a narrow one `table` points at its normals.
    """
    return normal_of_bits(bits(k0, k1, counter, block, row, stream, RNG), table, PRECISION)
