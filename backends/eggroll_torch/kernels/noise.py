"""Noise in memory: rows that hold the draws of several keys, low-rank factors, and the keys themselves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, launch, narrow_table, power_of_two
from .portable import narrow
from .threefry import fold_in as _fold_in_registers
from .threefry import key_at, normal

__all__ = ["draw_factors", "draw_rows", "fold_in"]

# Numbers of a program.
_BLOCK = 1024


@triton.jit
def _fold_in_kernel(keys, data, out, draws, n_keys, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < draws.to(tl.int64) * n_keys
    k0, k1 = key_at(keys, index % n_keys, inside)
    folded = tl.load(data + index // n_keys, mask=inside, other=0)
    x0, x1 = _fold_in_registers(k0, k1, folded.to(tl.uint32, bitcast=True))
    tl.store(out + 2 * index, x0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out + 2 * index + 1, x1.to(tl.int32, bitcast=True), mask=inside)


@torch.library.custom_op("eggroll::fold_in", mutates_args=())
def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of each number into each key.

    Args:
        keys: int32, shape ``(n_keys, 2)``.
        data: int32, shape ``(draws,)``.

    Returns:
        int32, shape ``(draws, n_keys, 2)``.
    """
    out = keys.new_empty(len(data), *keys.shape)
    if out.numel():
        grid = (triton.cdiv(len(data) * len(keys), _BLOCK),)
        launch(
            _fold_in_kernel,
            grid,
            *(keys.contiguous(), data.contiguous(), out, len(data), len(keys)),
            device=keys.device,
            BLOCK=_BLOCK,
        )
    return out


@fold_in.register_fake
def _(keys, data):
    return keys.new_empty(data.shape[0], *keys.shape)


@triton.jit
def _rows_kernel(
    keys, key_of, counter, table, out, rows, length, n_keys,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_C)
    row = (tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < length)
    of_key = tl.load(key_of + column, mask=column < length, other=0)
    place = tl.load(counter + column, mask=column < length, other=0)
    k0, k1 = key_at(keys, row * n_keys + of_key, inside)
    drawn = normal(k0, k1, place, table, PRECISION)
    tl.store(out + row * length + column, narrow(drawn, DTYPE), mask=inside)


@torch.library.custom_op("eggroll::draw_rows", mutates_args=())
def draw_rows(
    keys: Tensor,
    key_of: Tensor,
    counter: Tensor,
    precision: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal rows that hold, side by side, the draws of several keys.

    Args:
        keys: int32, shape ``(rows, n_keys, 2)``.
        key_of: int32, shape ``(length,)``: whose draw each element of a row belongs to, in ``[0, n_keys)``.
        counter: int32, shape ``(length,)``: which element of that draw it is.
        precision: the dtype to draw in, see `eggroll.prng.normal`.
        dtype: what the numbers are rounded to.

    Returns:
        `dtype`, shape ``(rows, length)``.
    """
    rows, n_keys, _ = keys.shape
    length = len(counter)
    out = keys.new_empty(rows, length, dtype=dtype)
    if out.numel():
        columns = power_of_two(length, 1, _BLOCK)
        at_once = _BLOCK // columns
        launch(
            _rows_kernel,
            (triton.cdiv(length, columns) * triton.cdiv(rows, at_once),),
            *(keys.contiguous(), key_of.contiguous(), counter.contiguous(), narrow_table(precision, keys), out),
            *(rows, length, n_keys),
            device=keys.device,
            PRECISION=precision,
            DTYPE=DTYPES[dtype],
            BLOCK_R=at_once,
            BLOCK_C=columns,
        )
    return out


@draw_rows.register_fake
def _(keys, key_of, counter, precision="float32", dtype=torch.float32):
    return keys.new_empty(keys.shape[0], counter.shape[0], dtype=dtype)


@triton.jit
def _factors_kernel(
    keys, coefficients, table, out, draws, rank, features, in_features,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(features, BLOCK_C)
    row = (tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    feature = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    draw = row // rank
    k0, k1 = key_at(keys, draw, draw < draws)
    c = tl.load(coefficients + draw, mask=draw < draws, other=0.0)
    drawn = normal(k0, k1, feature * rank + row % rank, table, PRECISION)
    # Rounded twice where it is scaled: A is the same number as in the forward pass.
    drawn = narrow(drawn, DTYPE).to(tl.float32)
    scaled = tl.where(feature >= in_features, c * drawn, drawn)
    inside = (draw < draws) & (feature < features)
    tl.store(out + row.to(tl.int64) * features + feature, narrow(scaled, DTYPE), mask=inside)


def draw_factors(
    keys: Tensor, coefficients: Tensor, rank: int, in_features: int, out_features: int, precision: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The factors of the noise of some draws as the update wants them: `A` scaled, the features side by side.

    Args:
        keys: int32, shape ``(draws, 2)``, contiguous.
        coefficients: float32, shape ``(draws,)``, contiguous.

    Returns:
        ``coefficients * A``, of shape ``(draws, out_features, rank)``, and `B`, ``(draws, in_features, rank)``, in
        `dtype`: views of one tensor in which the stride of the features is 1.
    """
    draws, features = len(keys), in_features + out_features
    out = keys.new_empty(draws, rank, features, dtype=dtype)
    columns = power_of_two(features, 1, _BLOCK)
    at_once = _BLOCK // columns
    launch(
        _factors_kernel,
        (triton.cdiv(features, columns) * triton.cdiv(draws * rank, at_once),),
        *(keys, coefficients, narrow_table(precision, keys), out, draws, rank, features, in_features),
        device=keys.device,
        PRECISION=precision,
        DTYPE=DTYPES[dtype],
        BLOCK_R=at_once,
        BLOCK_C=columns,
    )
    B, A = out.mT.split([in_features, out_features], dim=1)
    return A, B
