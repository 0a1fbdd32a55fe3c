"""Noise in memory: rows that hold the draws of several keys, low-rank factors, and the keys themselves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..vectorising import called
from .drawing import blocks_of, normals
from .launch import DTYPES, cdiv, launch, narrow_table, power_of_two
from .portable import narrow
from .threefry import fold_in as _fold_in_registers
from .threefry import key_at

__all__ = ["draw_factors", "draw_rows", "fold_in"]

# Numbers of a program.
_BLOCK = 1024


@triton.jit
def _fold_in_kernel(keys, data, out, size, draws, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    k0, k1 = key_at(keys, index // draws, inside)
    folded = tl.load(data + index % draws, mask=inside, other=0)
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
        int32, shape ``(draws, n_keys, 2)``, those of one key side by side: whoever takes the draws of one parameter
        finds them contiguous.
    """
    out = keys.new_empty(len(keys), len(data), 2)
    if out.numel():
        size = len(data) * len(keys)
        launch(
            _fold_in_kernel,
            (cdiv(size, _BLOCK),),
            *(keys.contiguous(), data.contiguous(), out, size, len(data)),
            device=keys.device,
            BLOCK=_BLOCK,
        )
    return out.transpose(0, 1)


@fold_in.register_fake
def _(keys, data):
    return keys.new_empty(keys.shape[0], data.shape[0], 2).transpose(0, 1)


@triton.jit
def _rows_kernel(
    keys, key_of, counter, table, out, rows, length, n_keys,
    PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_C)
    row = (tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    start = tl.program_id(0) % blocks * BLOCK_C
    column = start + tl.arange(0, BLOCK_C)[None, :]
    # What is drawn with one counter: a number with Threefry, four of them with Philox.
    if RNG == "philox":
        unit = blocks_of(start, BLOCK_C)[None, :]
        units = length // 4
    else:
        unit = column
        units = length
    there = unit < units
    of_key = tl.load(key_of + unit, mask=there, other=0)
    k0, k1 = key_at(keys, row * n_keys + of_key, (row < rows) & there)
    c0 = tl.load(counter + unit, mask=there, other=0)
    c1 = c0
    c2 = c0
    if RNG == "philox":
        c1 = tl.load(counter + units + unit, mask=there, other=0)
        c2 = tl.load(counter + 2 * units + unit, mask=there, other=0)
    drawn = normals(k0, k1, c0, c0, c1, c2, table, PRECISION, RNG)
    tl.store(out + row * length + column, narrow(drawn, DTYPE), mask=(row < rows) & (column < length))


@torch.library.custom_op("eggroll::draw_rows", mutates_args=())
def draw_rows(
    keys: Tensor,
    key_of: Tensor,
    counter: Tensor,
    precision: str = "float32",
    dtype: torch.dtype = torch.float32,
    rng: str = "threefry",
) -> Tensor:
    """Standard normal rows that hold, side by side, the draws of several keys.

    Args:
        keys: int32, shape ``(rows, n_keys, 2)``.
        key_of: int32, shape ``(n,)``: whose draw each element of a row belongs to, in ``[0, n_keys)``. With Philox of
            each block of four elements.
        counter: int32, shape ``(n,)``: which element of that draw it is. With Philox ``(3, n)``: the first three
            words of each block's counter, see `eggroll.prng`.
        precision: the dtype to draw in, see `eggroll.prng.normal`.
        dtype: what the numbers are rounded to.
        rng: the generator.

    Returns:
        `dtype`, shape ``(rows, n)``, with Philox ``(rows, 4 * n)``.
    """
    rows, n_keys, _ = keys.shape
    length = _length(key_of, rng)
    out = keys.new_empty(rows, length, dtype=dtype)
    if out.numel():
        columns = power_of_two(length, 4, _BLOCK)
        at_once = _BLOCK // columns
        launch(
            _rows_kernel,
            (cdiv(length, columns) * cdiv(rows, at_once),),
            *(keys.contiguous(), key_of.contiguous(), counter.contiguous(), narrow_table(precision, keys), out),
            *(rows, length, n_keys),
            device=keys.device,
            PRECISION=precision,
            RNG=rng,
            DTYPE=DTYPES[dtype],
            BLOCK_R=at_once,
            BLOCK_C=columns,
        )
    return out


@draw_rows.register_fake
def _(keys, key_of, counter, precision="float32", dtype=torch.float32, rng="threefry"):
    return keys.new_empty(keys.shape[0], _length(key_of, rng), dtype=dtype)


def _length(key_of: Tensor, rng: str) -> int:
    return key_of.shape[0] * (4 if rng == "philox" else 1)


@triton.jit
def _factors_kernel(
    keys, coefficients, table, out, draws, rank, features, in_features,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The tiles of B, then those of A.
    tiles_B = tl.cdiv(in_features, BLOCK_C)
    tiles = tiles_B + tl.cdiv(features - in_features, BLOCK_C)
    of_A = tl.program_id(0) % tiles >= tiles_B
    start = (tl.program_id(0) % tiles - tl.where(of_A, tiles_B, 0)) * BLOCK_C
    first = tl.where(of_A, in_features, 0)
    feature = first + start + tl.arange(0, BLOCK_C)[None, :]
    end = tl.where(of_A, features, in_features)
    row = (tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    draw = row // rank
    k0, k1 = key_at(keys, draw, draw < draws)
    stream = tl.where(of_A, 1, 0)
    counter = feature * rank + row % rank
    block = blocks_of(start, BLOCK_C)[None, :]
    drawn = normals(k0, k1, counter, block, row % rank, stream, table, PRECISION, RNG)
    drawn = narrow(drawn, DTYPE)
    if SCALED:
        # Rounded twice: A is the same number as in the forward pass.
        c = tl.load(coefficients + draw, mask=draw < draws, other=0.0)
        drawn = narrow(tl.where(of_A, c, 1.0) * drawn.to(tl.float32), DTYPE)
    inside = (draw < draws) & (feature < end)
    tl.store(out + row.to(tl.int64) * features + feature, drawn, mask=inside)


def draw_factors(
    keys: Tensor,
    coefficients: Tensor | None,
    rank: int,
    in_features: int,
    out_features: int,
    precision: str,
    rng: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The factors of the noise of some draws, in memory, the features side by side.

    Args:
        keys: int32, shape ``(draws, 2)``.
        coefficients: float32, shape ``(draws,)``, what `A` is multiplied with; or None.

    Returns:
        `A`, of shape ``(draws, out_features, rank)``, and `B`, ``(draws, in_features, rank)``, in `dtype`: views of
        one tensor in which the stride of the features is 1.
    """
    how = rank, in_features, out_features, precision, rng, dtype
    both = called(draw_both_factors, keys, coefficients, *how)
    B, A = both.mT.split([in_features, out_features], dim=1)
    return A, B


@torch.library.custom_op("eggroll::draw_both_factors", mutates_args=())
def draw_both_factors(
    keys: Tensor,
    coefficients: Tensor | None,
    rank: int,
    in_features: int,
    out_features: int,
    precision: str,
    rng: str,
    dtype: torch.dtype,
) -> Tensor:
    """`draw_factors` as one tensor, shape ``(draws, rank, in_features + out_features)``: `B`, then `A`."""
    draws, features = len(keys), in_features + out_features
    out = keys.new_empty(draws, rank, features, dtype=dtype)
    columns = power_of_two(max(in_features, out_features), 4, _BLOCK)
    at_once = _BLOCK // columns
    tiles = cdiv(in_features, columns) + cdiv(out_features, columns)
    if out.numel() == 0:
        return out
    keys = keys.contiguous()
    launch(
        _factors_kernel,
        (tiles * cdiv(draws * rank, at_once),),
        *(keys, keys if coefficients is None else coefficients.contiguous(), narrow_table(precision, keys), out),
        *(draws, rank, features, in_features),
        device=keys.device,
        SCALED=coefficients is not None,
        PRECISION=precision,
        RNG=rng,
        DTYPE=DTYPES[dtype],
        BLOCK_R=at_once,
        BLOCK_C=columns,
    )
    return out


@draw_both_factors.register_fake
def _(keys, coefficients, rank, in_features, out_features, precision, rng, dtype):
    return keys.new_empty(keys.shape[0], rank, in_features + out_features, dtype=dtype)
