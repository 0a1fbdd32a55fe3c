"""A tile of a low-rank factor, in registers: read from memory, or drawn."""

import triton
import triton.language as tl

from .portable import narrow
from .threefry import key_at, normal

__all__ = ["factor", "spread"]


@triton.jit
def factor(
    values, stride_draw, stride_feature, stride_column, first, table, draw, feature, column, rank, mask,
    DRAWN: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The elements ``[draw, feature, column]`` of a factor, in `DTYPE`; the three indices broadcast.

    What `mask` excludes is 0 where the factor is read, and any finite number where it is drawn.
    """
    if DRAWN:
        k0, k1 = key_at(values, draw, draw >= 0)
        tile = narrow(normal(k0, k1, (first + feature) * rank + column, table, PRECISION), DTYPE)
    else:
        place = draw.to(tl.int64) * stride_draw + feature.to(tl.int64) * stride_feature + column * stride_column
        tile = tl.load(values + place, mask=mask, other=0.0)
        # What needs no conversion can be copied to shared memory without passing through registers.
        if values.dtype.element_ty != DTYPE:
            tile = narrow(tile.to(tl.float32), DTYPE)
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
