"""A tile of a low-rank factor, in registers: read from memory, or drawn."""

import triton
import triton.language as tl

from .drawing import normals
from .portable import INTERPRETED, narrow
from .threefry import key_at

__all__ = ["factor", "pinned", "spread"]


@triton.jit
def factor(
    values, stride_draw, stride_feature, stride_column, first, table, draw, feature, block, column, rank, mask,
    DRAWN: tl.constexpr, PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The elements ``[draw, feature, column]`` of a factor, in `DTYPE`; the three indices broadcast.

    Philox draws for the features of each `block` along the last axis instead, see `drawing.blocks_of`. What `mask`
    excludes is 0 where the factor is read, and any finite number where it is drawn.
    """
    if DRAWN:
        k0, k1 = key_at(values, draw, draw >= 0)
        counter = (first + feature) * rank + column
        tile = narrow(normals(k0, k1, counter, block, column, first, table, PRECISION, RNG), DTYPE)
    else:
        place = draw.to(tl.int64) * stride_draw + feature.to(tl.int64) * stride_feature + column * stride_column
        tile = tl.load(values + place, mask=mask, other=0.0)
        # What needs no conversion can be copied to shared memory without passing through registers.
        if values.dtype.element_ty != DTYPE:
            tile = narrow(tile.to(tl.float32), DTYPE)
    return tile


@triton.jit
def pinned(tile, RNG: tl.constexpr):
    """A drawn tile itself, each number of which is drawn once.

    Philox is so cheap that the compiler, where the product wants a number in several threads, would draw it in each
    of them rather than hand it over: in a projection of rank 4 eight blocks a thread instead of one. It leaves alone
    what comes out of an instruction that might have effects; this one, a move, the assembler drops.
    """
    if RNG == "philox" and not INTERPRETED:
        if tile.dtype.primitive_bitwidth == 16:
            tile = tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [tile], tile.dtype, is_pure=False, pack=1)
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], tile.dtype, is_pure=False, pack=1)
    return tile


@triton.jit
def spread(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIMES: tl.constexpr):
    """A `ROWS` x `COLUMNS` tile in which each row is followed by copies of itself, `TIMES` in all.

    The tensor cores want 16 of them even where the noise has fewer; copies cost nothing, more draws would.
    """
    if TIMES > 1:
        tile = tl.broadcast_to(tile[:, None, :], (ROWS, TIMES, COLUMNS))
        tile = tl.reshape(tile, (ROWS * TIMES, COLUMNS))
    return tile
