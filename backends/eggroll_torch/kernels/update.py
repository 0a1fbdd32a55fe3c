"""The low-rank update, ``beta * total + alpha * sum_d c_d * A_d @ B_d.T``: one product over draws and columns.

The sum over the draws is split where the matrix alone does not fill the device; the parts are written side by side
and added in a fixed order, so a run gives the same bits every time.

Noise that is not in memory is drawn in the loader where every number is needed by one tile only. A larger matrix has
many tiles that need the same number: it would be drawn for each of them, at a hundred instructions a time. There the
noise of a chunk of draws is drawn once, into a buffer smaller than the matrix.

Large sums in the dtype of the factors are the library's: few terms between long reads and writes, which it overlaps
better than Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..totals import add_, scale_
from .drawing import blocks_of
from .factors import factor, pinned
from .launch import DTYPES, Source, cdiv, dot_precision, drawn, launch, narrow_table, power_of_two, splits, stored
from .noise import draw_factors
from .portable import INTERPRETED, narrow, product

__all__ = ["add_low_rank_sum_", "add_low_rank_sum_drawn_"]

# The buffer for noise, bytes: those of half the elements of the total in float32, or what is small anyway. Sums that
# need more than one buffer read and write all of the total for each.
_BYTES_FOR_AN_ELEMENT = 2
_SMALL_BUFFER = 16 << 20
# Features in and out from which on the library multiplies or, where it cannot, a narrow product is worth the largest
# tiles. Estimated: at 8192 features and 512 terms it takes 120 to 140 microseconds, and those tiles 150 to 200, since
# all that they read comes through the L2 cache. `make bench-gpu` times both.
_LARGE = 2048


@triton.jit
def _update_kernel(
    total, coefficients,
    A_values, A_draw, A_feature, A_column, A_first, B_values, B_draw, B_feature, B_column, B_first, table,
    out_features, in_features, rank, terms, length, alpha, beta,
    SCALED: tl.constexpr, DRAWN: tl.constexpr, PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr,
    MATMUL: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the total, summed over one part, of `length`, of the draws' columns; `beta` if `ACCUMULATE`."""
    tiles_m = tl.cdiv(out_features, BLOCK_M)
    tiles_n = tl.cdiv(in_features, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * group, 8)
    first_m = (8 * group + tl.program_id(0) % (8 * tiles_n) % height) * BLOCK_M
    first_n = tl.program_id(0) % (8 * tiles_n) // height * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    m_in = m < out_features
    n_in = n < in_features
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, terms)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        term = (k + tl.arange(0, BLOCK_K))[:, None]
        live = (term < stop) | EVEN
        draw = tl.minimum(term, stop - 1) // rank
        column = term % rank
        # With the features along the rows of a tile neighbours in memory are neighbours in the tile.
        A = factor(
            A_values, A_draw, A_feature, A_column, A_first, table,
            draw, m[None, :], blocks_of(first_m, BLOCK_M)[None, :], column, rank, live & m_in[None, :],
            DRAWN, PRECISION, RNG, DTYPE,
        )  # fmt: skip
        B = factor(
            B_values, B_draw, B_feature, B_column, B_first, table,
            draw, n[None, :], blocks_of(first_n, BLOCK_N)[None, :], column, rank, live & n_in[None, :],
            DRAWN, PRECISION, RNG, DTYPE,
        )  # fmt: skip
        A = pinned(A, RNG)
        B = pinned(B, RNG)
        if SCALED:
            c = tl.load(coefficients + draw, mask=live, other=0.0)
            A = narrow(A.to(tl.float32) * c, DTYPE)
        sums = product(tl.trans(A), B, sums, MATMUL)
    place = (tl.program_id(1).to(tl.int64) * out_features + m)[:, None] * in_features + n[None, :]
    inside = m_in[:, None] & n_in[None, :]
    sums = sums * alpha
    if ACCUMULATE:
        sums += tl.load(total + place, mask=inside, other=0.0).to(tl.float32) * beta
    tl.store(total + place, narrow(sums, total.dtype.element_ty), mask=inside)


def _add_sum_(
    total: Tensor,
    coefficients: Tensor | None,
    A: Source,
    B: Source,
    draws: int,
    rank: int,
    dtype: torch.dtype,
    alpha: float,
    beta: float,
) -> None:
    out_features, in_features = total.shape
    terms = draws * rank
    block_m, block_n, block_k, warps, stages = _tile(
        out_features, in_features, coefficients is not None, A.drawn, dtype
    )
    tiles = cdiv(out_features, block_m) * cdiv(in_features, block_n)
    parts = splits(tiles, terms, total.device)
    length = cdiv(cdiv(terms, parts), block_k) * block_k
    partial = total if parts == 1 else total.new_empty(parts, *total.shape, dtype=torch.float32)
    launch(
        _update_kernel,
        (tiles, parts),
        *(partial, A.values if coefficients is None else coefficients, *A.arguments, *B.arguments),
        *(narrow_table(A.precision, A.values), out_features, in_features, rank, terms, length),
        *((alpha, beta) if parts == 1 else (1.0, 0.0)),
        device=total.device,
        SCALED=coefficients is not None,
        DRAWN=A.drawn,
        PRECISION=A.precision,
        RNG=A.rng,
        DTYPE=DTYPES[dtype],
        MATMUL=dot_precision(dtype),
        ACCUMULATE=beta != 0 and parts == 1,
        EVEN=terms % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    if parts > 1:
        add_(total, partial.sum(0), alpha, beta)


def _tile(
    out_features: int, in_features: int, scaled: bool, drawn: bool, dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile, terms of a step, warps and stages."""
    if INTERPRETED:
        return 32, 32, 16, 1, 1
    m, n = power_of_two(out_features, 32, 128), power_of_two(in_features, 32, 128)
    if drawn:
        return m, n, 16 if dtype == torch.float32 else 32, 8 if m * n > 4096 else 4, 1
    if dtype == torch.float32:
        return min(m, 64), min(n, 64), 32, 4, 3
    if not scaled and min(out_features, in_features) >= _LARGE:
        return 128, 256, 64, 8, 3
    # Scaled factors pass through registers, and what is not stored side by side needs an address for every number.
    return m, n, 32 if scaled else 64, 8 if m * n > 8192 else 4, 3


def _add_scaled_(
    total: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, alpha: float, beta: float, fused: bool | None
) -> None:
    """``total = beta * total + alpha * sum_d A_d @ B_d.T``, of factors in memory, `A` with features side by side."""
    draws, _, rank = A.shape
    if _is_fused(total, dtype, fused):
        _add_sum_(total, None, stored(A), stored(B), draws, rank, dtype, alpha, beta)
    else:
        total.addmm_(A.mT.flatten(0, 1).mT, B.to(dtype).mT.flatten(0, 1), alpha=alpha, beta=beta)


def _is_fused(total: Tensor, dtype: torch.dtype, fused: bool | None) -> bool:
    """Whether a kernel multiplies, as it was asked for or by size. The library knows no total of another dtype."""
    return total.dtype != dtype or (min(total.shape) < _LARGE if fused is None else fused)


def _scaled(A: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """``coefficients * A``, rounded once, with the features side by side."""
    draws, out_features, rank = A.shape
    scaled = A.new_empty(draws, rank, out_features, dtype=dtype).mT
    return torch.mul(A.to(dtype), coefficients.float().view(-1, 1, 1), out=scaled)


def _one_tile(total: Tensor, dtype: torch.dtype) -> bool:
    out_features, in_features = total.shape
    m, n, *_ = _tile(out_features, in_features, True, True, dtype)
    return out_features <= m and in_features <= n


def _check(total: Tensor, dtype: torch.dtype) -> None:
    if total.ndim != 2 or not total.is_contiguous() or total.dtype not in DTYPES:
        raise ValueError(
            "`total` must be a contiguous matrix of float32, bfloat16 or float16, got "
            f"{total.dtype} of shape {tuple(total.shape)} and strides {total.stride()}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


@torch.library.custom_op("eggroll::add_low_rank_sum_", mutates_args={"total"})
def add_low_rank_sum_(
    total: Tensor,
    coefficients: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    fused: bool | None = None,
) -> None:
    """``total = beta * total + alpha * sum_d c_d * A_d @ B_d.T`` in float32, from factors in memory.

    Args:
        total: shape ``(out, in)``, contiguous; float32, or a narrower dtype, to which the result is then rounded.
        coefficients: float32, shape ``(draws,)``.
        A: any float dtype and strides, shape ``(draws, out, rank)``.
        B: likewise, shape ``(draws, in, rank)``.
        dtype: what ``c * A`` and `B` are rounded to before they are multiplied; by default that of `A`.
        alpha: see above.
        beta: with 0 what `total` holds does not matter, as in `torch.addmm`.
        fused: whether a kernel multiplies; by default unless `total` is large. The library multiplies where not, but
            only if `total` has the dtype of the factors.
    """
    dtype = A.dtype if dtype is None else dtype
    _check(total, dtype)
    draws, _, rank = A.shape
    if total.numel() and draws:
        # Scaled beforehand what the library multiplies, or a kernel can copy past the registers.
        large = min(total.shape) >= _LARGE and dtype != torch.float32
        if large or not _is_fused(total, dtype, fused):
            _add_scaled_(total, _scaled(A, coefficients, dtype), B, dtype, alpha, beta, fused)
        else:
            c = coefficients.float().contiguous()
            _add_sum_(total, c, stored(A), stored(B), draws, rank, dtype, alpha, beta)
    else:
        scale_(total, beta)


@torch.library.custom_op("eggroll::add_low_rank_sum_drawn_", mutates_args={"total"})
def add_low_rank_sum_drawn_(
    total: Tensor,
    coefficients: Tensor,
    keys: Tensor,
    rank: int,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    rng: str = "threefry",
    alpha: float = 1.0,
    beta: float = 1.0,
    fused: bool | None = None,
) -> None:
    """`add_low_rank_sum_` whose noise is drawn from its keys, into a buffer no larger than `total` in 16 bits.

    A small matrix needs no buffer; 16 MiB are given to any other.

    Args:
        keys: int32, shape ``(draws, 2)``, from which the factors are drawn as `eggroll.perturbation` lays them out.
        rank: columns of each factor.
        dtype: what the factors are rounded to before they are multiplied.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.
        alpha, beta: see there.
        fused: see there; what needs no buffer is a kernel's.
    """
    _check(total, dtype)
    out_features, in_features = total.shape
    draws = len(keys)
    keys, coefficients = keys.contiguous(), coefficients.float().contiguous()
    if total.numel() == 0 or draws == 0:
        scale_(total, beta)
        return
    if _one_tile(total, dtype):
        sources = drawn(keys, in_features, precision, rng)
        _add_sum_(total, coefficients, *sources, draws, rank, dtype, alpha, beta)
        return
    room = max(_SMALL_BUFFER, _BYTES_FOR_AN_ELEMENT * total.numel())
    step = max(1, room // ((in_features + out_features) * rank * dtype.itemsize))
    # A narrow total would be rounded after every buffer.
    wide = step < draws and total.dtype != torch.float32
    summed = torch.zeros_like(total, dtype=torch.float32) if wide else total
    for start in range(0, draws, step):
        here = slice(start, start + step)
        A, B = draw_factors(keys[here], coefficients[here], rank, in_features, out_features, precision, rng, dtype)
        scales = (1.0, 1.0) if wide else (alpha, 1.0 if start else beta)
        _add_scaled_(summed, A, B, dtype, *scales, fused)
    if wide:
        add_(total, summed, alpha, beta)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What operations do that only write into an argument, as far as shapes go."""


add_low_rank_sum_.register_fake(_nothing)
add_low_rank_sum_drawn_.register_fake(_nothing)
