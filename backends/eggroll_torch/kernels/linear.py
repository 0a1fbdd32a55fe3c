"""A linear layer of all members of a chunk: ``x @ W.T + signs * scale * (x @ B) @ A.T + bias``, then an activation.

Two kernels. The first computes the projections ``p = x @ B`` of each draw, in float32. The second multiplies with the
shared weight and adds, before it writes a tile, the columns of ``signs * scale * p`` times those of ``A``, as further
steps of the same product. A tile's rows may belong to one draw or to many; the columns are those of all draws that
have rows in it, and a row is 0 in the columns of other draws. So every number of ``A`` is read, or drawn, once for a
tile, whatever the rows of a member and whether pairs share it. The noise of a bias is one more column for each draw,
drawn there: those of the other factor are the members' signs.

Where the members share their input the product with the weight is computed once, by the library, and the second
kernel reads it. So it is for float32 in full precision, which the library multiplies faster than Triton does, and for
large weights, where the library's lead is worth a second pass over the output. Sizes alone decide which: what happens
to be faster today would give other last bits tomorrow.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, activate
from .drawing import blocks_of, normals
from .factors import factor, pinned, spread
from .launch import DTYPES, Source, cdiv, dot_precision, drawn, launch, narrow_table, power_of_two, splits, stored
from .portable import INTERPRETED, narrow, product
from .threefry import key_at

__all__ = ["linear_of_members", "linear_of_members_drawn"]


@triton.jit
def _project_kernel(
    x, x_row, x_column, values, stride_draw, stride_feature, stride_column, first, table, out,
    rows, in_features, rank, length, all_rows,
    SHARED: tl.constexpr, DRAWN: tl.constexpr, PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr,
    DOT: tl.constexpr, MATMUL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``x @ B`` of some rows and columns of one draw, summed over one part, of `length`, of the input features."""
    blocks = tl.cdiv(rows, BLOCK_R)
    draw = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = tl.program_id(2) * COLUMNS
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, in_features)
    line = draw.to(tl.int64) * rows + row
    x_line = (row if SHARED else line).to(tl.int64) * x_row
    TIMES: tl.constexpr = 16 // COLUMNS if DOT and COLUMNS < 16 else 1
    if DOT:
        column = (first_column + tl.arange(0, COLUMNS))[:, None]
        sums = tl.zeros((BLOCK_R, COLUMNS * TIMES), tl.float32)
        for k in range(start, stop, BLOCK_K):
            feature = k + tl.arange(0, BLOCK_K)
            x_mask = (row < rows)[:, None] & (feature < stop)[None, :]
            x_tile = tl.load(x + x_line[:, None] + feature.to(tl.int64)[None, :] * x_column, mask=x_mask, other=0.0)
            B = factor(
                values, stride_draw, stride_feature, stride_column, first, table,
                draw, feature[None, :], blocks_of(k, BLOCK_K)[None, :], column, rank,
                (feature < stop)[None, :] & (column < rank), DRAWN, PRECISION, RNG, DTYPE,
            )  # fmt: skip
            B = spread(pinned(B, RNG), COLUMNS, BLOCK_K, TIMES)
            sums = product(x_tile, tl.trans(B), sums, MATMUL)
        projected = sums
    else:
        # Few rows: sums of products of each thread's own elements, until the end.
        column = (first_column + tl.arange(0, COLUMNS))[None, None, :]
        own = tl.zeros((BLOCK_R, BLOCK_K, COLUMNS), tl.float32)
        for k in range(start, stop, BLOCK_K):
            feature = (k + tl.arange(0, BLOCK_K))[None, :, None]
            x_mask = (row < rows)[:, None, None] & (feature < stop)
            x_place = x_line[:, None, None] + feature.to(tl.int64) * x_column
            x_tile = tl.load(x + x_place, mask=x_mask, other=0.0).to(tl.float32)
            if RNG == "philox":
                # Its blocks lie along the last axis.
                B = factor(
                    values, stride_draw, stride_feature, stride_column, first, table,
                    draw, 0, blocks_of(k, BLOCK_K)[None, :], (first_column + tl.arange(0, COLUMNS))[:, None], rank,
                    None, DRAWN, PRECISION, RNG, DTYPE,
                )  # fmt: skip
                B = tl.trans(B)[None, :, :]
            else:
                B = factor(
                    values, stride_draw, stride_feature, stride_column, first, table,
                    draw, feature, 0, column, rank, (feature < stop) & (column < rank),
                    DRAWN, PRECISION, RNG, DTYPE,
                )  # fmt: skip
            B = B.to(tl.float32)
            own = tl.fma(x_tile, B, own)
        projected = tl.sum(own, axis=1)
    place = tl.arange(0, COLUMNS * TIMES)
    column = first_column + place // TIMES
    wanted = (place % TIMES == 0) & (column < rank)
    lines = tl.program_id(1).to(tl.int64) * all_rows + line
    pointer = out + lines[:, None] * rank + column[None, :]
    tl.store(pointer, projected, mask=(row < rows)[:, None] & wanted[None, :])


def _project(x: Tensor, source: Source, draws: int, rank: int) -> Tensor:
    """``x @ B`` for each draw: `x` of shape ``(rows, in)``, or ``(draws * rows, in)``; float32 ``(..., rank)``."""
    shared = x.ndim == 2
    rows = x.shape[-2] if shared else x.shape[0] * x.shape[1] // draws
    in_features = x.shape[-1]
    x = x if shared else x.flatten(0, 1)
    columns = power_of_two(rank, 1, 64)
    narrow_x, matmul = x.element_size() == 2, dot_precision(x.dtype)
    block_r = power_of_two(rows, 1, 64 if narrow_x else 32)
    # The tensor cores want 16 rows and 16 columns; what multiplies one number after the other wants no padding.
    dot = columns > 8 or (block_r > 8 and (narrow_x or matmul == "tf32"))
    if dot:
        block_r = max(block_r, 16)
        # Between two and sixteen numbers of B for each thread.
        block_k = max(128 if narrow_x else 32 if matmul == "ieee" else 64, 256 // columns)
        block_k = min(block_k, 2048 // columns)
    else:
        block_k = max(128, 2048 // block_r) // columns
    if INTERPRETED:
        block_k = power_of_two(in_features, 16, 32)
    blocks = draws * cdiv(rows, block_r)
    parts = splits(blocks, in_features, x.device)
    length = cdiv(cdiv(in_features, parts), block_k) * block_k
    out = x.new_empty(parts, draws * rows, rank, dtype=torch.float32)
    launch(
        _project_kernel,
        (blocks, parts, cdiv(rank, columns)),
        *(x, *x.stride(), *source.arguments, narrow_table(source.precision, source.values), out),
        *(rows, in_features, rank, length, draws * rows),
        device=x.device,
        SHARED=shared,
        DRAWN=source.drawn,
        PRECISION=source.precision,
        RNG=source.rng,
        DTYPE=DTYPES[x.dtype],
        DOT=dot,
        MATMUL=matmul,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        COLUMNS=columns,
        num_warps=4,
    )
    return out[0] if parts == 1 else out.sum(0)


@triton.jit
def _linear_kernel(
    x, x_row, x_column, weight, weight_row, weight_column, base, bias, bias_keys, bias_scales,
    values, stride_draw, stride_feature, stride_column, first, table, projected, signs, scale, out,
    all_rows, out_features, in_features, rows, rows_of_draw, rank, size,
    SHARED: tl.constexpr, DRAWN: tl.constexpr, PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr,
    PRODUCT: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, BIAS_NOISE: tl.constexpr,
    ACTIVATION: tl.constexpr, MATMUL: tl.constexpr, STEP: tl.constexpr, BIAS_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the output. `size` is for the choice of a configuration: `all_rows`, rounded."""
    tiles_m = tl.cdiv(all_rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    # Programs that run at the same time share rows of x and of the weight: eight rows of tiles, column by column.
    group = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * group, 8)
    tile_m = 8 * group + tl.program_id(0) % (8 * tiles_n) % height
    tile_n = tl.program_id(0) % (8 * tiles_n) // height
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_blocks = blocks_of(tile_n * BLOCK_N, BLOCK_N)[None, :]
    m_in = m < all_rows
    n_in = n < out_features
    line = m.to(tl.int64)

    if PRODUCT:
        k = tl.arange(0, BLOCK_K)
        # Rows outside are any rows: their products are not stored.
        x_tile = x + (line % all_rows)[:, None] * x_row + k.to(tl.int64)[None, :] * x_column
        w_tile = (
            weight + (n % out_features).to(tl.int64)[None, :] * weight_row + k.to(tl.int64)[:, None] * weight_column
        )
        x_step = tl.cast(BLOCK_K, tl.int64) * x_column
        w_step = tl.cast(BLOCK_K, tl.int64) * weight_column
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for done in range(0, in_features, BLOCK_K):
            if EVEN:
                left = tl.load(x_tile)
                right = tl.load(w_tile)
            else:
                left = tl.load(x_tile, mask=(k < in_features - done)[None, :], other=0.0)
                right = tl.load(w_tile, mask=(k < in_features - done)[:, None], other=0.0)
            sums = product(left, right, sums, MATMUL)
            x_tile += x_step
            w_tile += w_step
    else:
        base_line = (line % rows if SHARED else line) * out_features
        sums = tl.load(base + base_line[:, None] + n[None, :], mask=m_in[:, None] & n_in[None, :], other=0.0)
        sums = sums.to(tl.float32)

    TIMES: tl.constexpr = 16 // STEP if STEP < 16 else 1
    draw = m // rows_of_draw
    member = m // rows
    coefficient = tl.load(signs + member, mask=m_in, other=0.0)
    p_line = (draw.to(tl.int64) * rows + m % rows if SHARED else line) * rank
    last_draw = (tl.minimum((tile_m + 1) * BLOCK_M, all_rows) - 1) // rows_of_draw
    # Steps are counted from the first draw of all, not of the tile: which columns are added up together is the same
    # in tiles of every height, so what happens to be faster today does not show in the last bits.
    first_draw = tile_m * BLOCK_M // rows_of_draw
    for step in tl.range(first_draw * rank // STEP * STEP, (last_draw + 1) * rank, STEP, num_stages=1):
        # The columns are those of the draws of this tile, `rank` for each.
        place = step + tl.arange(0, STEP * TIMES) // TIMES
        column = place % rank
        live = tl.arange(0, STEP * TIMES) % TIMES == 0
        p_mask = m_in[:, None] & live[None, :] & (draw[:, None] == (place // rank)[None, :])
        left = tl.load(projected + p_line[:, None] + column[None, :], mask=p_mask, other=0.0) * scale
        left = narrow(left * coefficient[:, None], DTYPE)
        place = step + tl.arange(0, STEP)
        of_draw = tl.minimum(place // rank, last_draw)[:, None]
        column = (place % rank)[:, None]
        A = factor(
            values, stride_draw, stride_feature, stride_column, first, table,
            of_draw, n[None, :], n_blocks, column, rank, n_in[None, :], DRAWN, PRECISION, RNG, DTYPE,
        )  # fmt: skip
        if DRAWN:
            A = pinned(A, RNG)
        sums = product(left, spread(A, STEP, BLOCK_N, TIMES), sums, MATMUL)

    if BIAS_NOISE:
        COPIES: tl.constexpr = 16 // BIAS_STEP
        own_scale = tl.load(bias_scales + member, mask=m_in, other=0.0)
        sign = tl.where(own_scale > 0, 1.0, tl.where(own_scale < 0, -1.0, 0.0))
        members_of_draw = rows_of_draw // rows
        for step in tl.range(first_draw // BIAS_STEP * BIAS_STEP, last_draw + 1, BIAS_STEP, num_stages=1):
            place = step + tl.arange(0, 16) // COPIES
            mine = (tl.arange(0, 16) % COPIES == 0)[None, :] & (draw[:, None] == place[None, :])
            left = narrow(tl.where(mine, sign[:, None], 0.0), DTYPE)
            of_draw = tl.minimum(step + tl.arange(0, BIAS_STEP), last_draw)[:, None]
            size_of_draw = tl.zeros((BIAS_STEP, 1), tl.float32)
            for copy in range(members_of_draw):
                of_member = tl.load(bias_scales + of_draw * members_of_draw + copy)
                size_of_draw = tl.maximum(size_of_draw, tl.abs(of_member))
            k0, k1 = key_at(bias_keys, of_draw, of_draw >= 0)
            # Scaled before it is rounded, as the noise of a bias in memory is.
            Z = narrow(size_of_draw * normals(k0, k1, n[None, :], n_blocks, 0, 0, table, PRECISION, RNG), DTYPE)
            sums = product(left, spread(pinned(Z, RNG), BIAS_STEP, BLOCK_N, COPIES), sums, MATMUL)

    if BIAS == "shared":
        sums += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    elif BIAS == "own":
        own = member.to(tl.int64)[:, None] * out_features + n[None, :]
        sums += tl.load(bias + own, mask=m_in[:, None] & n_in[None, :], other=0.0).to(tl.float32)
    sums = activate(sums, ACTIVATION)
    place = line[:, None] * out_features + n[None, :]
    tl.store(out + place, narrow(sums, DTYPE), mask=m_in[:, None] & n_in[None, :])


# Rows, columns, warps and stages of a tile; the first two run alone on a multiprocessor, the others share it.
_TILES = (
    (128, 256, 8, 3),
    (256, 128, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 4, 3),
    (64, 256, 4, 3),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
    (32, 64, 4, 4),
)
# Input features from which on the library multiplies. Estimated: the second pass takes 424 / in_features of a product
# at 700 TFLOP/s and 3.3 TB/s, the library is about an eighth faster. `make bench-gpu` times both.
_LIBRARY_FROM = 4096
# Where the product is there already.
_TILE_OF_SUM = (64, 128, 8, 1)
_INTERPRETED_TILE = (32, 32, 1, 1)


def _configuration(tile: tuple[int, int, int, int], block_k: int) -> triton.Config:
    m, n, warps, stages = tile
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)


def _fitting(configurations: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """The configurations whose tiles are not mostly empty, and give the same bits.

    From 64 rows on the tensor cores of Hopper have other instructions, which do not add up as those for fewer do.
    """
    m, n = (max(32, power_of_two(arguments[name])) for name in ("all_rows", "out_features"))
    fitting = [c for c in configurations if c.kwargs["BLOCK_M"] <= m and c.kwargs["BLOCK_N"] <= n]
    high = [c for c in fitting if c.kwargs["BLOCK_M"] >= 64]
    return high or fitting or configurations[-1:]


@functools.cache
def _tuned(block_k: int) -> Any:
    """The kernel that finds its configuration by trying, once for each kind of call."""
    tiles = (_INTERPRETED_TILE,) if INTERPRETED else _TILES
    return triton.autotune(
        configs=[_configuration(tile, block_k) for tile in tiles],
        key=["size", "out_features", "in_features", "rank", "DRAWN", "BIAS_NOISE", "RNG", "STEP", "MATMUL"],
        prune_configs_by={"early_config_prune": _fitting},
    )(_linear_kernel)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Source,
    B: Source,
    draws: int,
    rank: int,
    signs: Tensor,
    scale: float,
    bias_keys: Tensor | None,
    bias_scales: Tensor | None,
    precision: str,
    rng: str,
    activation: str | None,
    fused: bool | None,
) -> Tensor:
    members, out_features = len(signs), len(weight)
    _check(x, weight, members, draws, activation)
    if (bias_keys is None) != (bias_scales is None):
        raise ValueError("`bias_keys` and `bias_scales` go together, got one of them")
    shared, (rows, in_features) = x.ndim == 2, x.shape[-2:]
    out = x.new_empty(members, rows, out_features)
    if out.numel() == 0:
        return out
    matmul = dot_precision(x.dtype)
    if shared or (x.dtype == torch.float32 and matmul == "ieee"):
        fused = False
    elif fused is None:
        fused = in_features < _LIBRARY_FROM
    lines = x if shared else x.flatten(0, 1)
    base = out
    if not fused:
        base = torch.mm(lines, weight.mT) if shared else torch.mm(lines, weight.mT, out=out.view(-1, out_features))
    rows_of_draw = members // draws * rows
    tile = _INTERPRETED_TILE if INTERPRETED else _TILE_OF_SUM
    block_m, block_n, warps, stages = (128, None, None, None) if fused else tile
    constants: dict[str, Any] = {
        "SHARED": shared,
        "DRAWN": A.drawn,
        "PRECISION": precision,
        "RNG": rng,
        "DTYPE": DTYPES[x.dtype],
        "PRODUCT": fused,
        "EVEN": in_features % 64 == 0,
        "BIAS": "none" if bias is None else "shared" if bias.ndim == 1 else "own",
        "BIAS_NOISE": bias_keys is not None,
        "ACTIVATION": activation,
        "MATMUL": matmul,
        "STEP": power_of_two(rank * -(-block_m // rows_of_draw), 1, 16),
        "BIAS_STEP": power_of_two(-(-block_m // rows_of_draw), 1, 16),
    }
    kernel: Any = _tuned(16 if INTERPRETED else 128 // x.element_size())
    if not fused:
        kernel = _linear_kernel
        constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 16, "num_warps": warps, "num_stages": stages}
    launch(
        kernel,
        lambda meta: (cdiv(members * rows, meta["BLOCK_M"]) * cdiv(out_features, meta["BLOCK_N"]),),
        *(lines, *lines.stride(), weight, *weight.stride(), base),
        *(x if given is None else given.contiguous() for given in (bias, bias_keys, bias_scales)),
        *(*A.arguments, narrow_table(precision, signs), _project(x, B, draws, rank), signs.contiguous(), scale, out),
        *(members * rows, out_features, in_features, rows, rows_of_draw, rank),
        power_of_two(members * rows),
        device=x.device,
        **constants,
    )
    return out


def _check(x: Tensor, weight: Tensor, members: int, draws: int, activation: str | None) -> None:
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise TypeError(
            f"`x` and `weight` must have one dtype of {', '.join(map(str, DTYPES))}, got {x.dtype} and {weight.dtype}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`x` must have the {weight.shape[1]} input features of `weight`, got shape {tuple(x.shape)}"
        )
    if (members or draws) and (draws == 0 or members % draws):
        raise ValueError(f"`signs` must have a multiple of the {draws} draws, got {members} members")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@torch.library.custom_op("eggroll::linear_of_members", mutates_args=())
def linear_of_members(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    scale: float,
    bias_keys: Tensor | None = None,
    bias_scales: Tensor | None = None,
    precision: str = "float32",
    rng: str = "threefry",
    activation: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """A linear layer of all members of a chunk, whose low-rank noise is in memory.

    Member ``i`` has draw ``d = i // (members / draws)`` and the weight ``W + signs[i] * scale * A[d] @ B[d].T``.

    Args:
        x: float32, bfloat16 or float16; shape ``(rows, in)``, shared by the members, or ``(members, rows, in)``.
        weight: the dtype of `x`, shape ``(out, in)``.
        bias: shape ``(out,)``, shared, or ``(members, out)``, or None.
        A: any float dtype, rounded to that of `x`; shape ``(draws, out, rank)``; any strides, as those of `B`.
        B: shape ``(draws, in, rank)``.
        signs: float32, shape ``(members,)``.
        scale: ``sigma / sqrt(rank)``.
        bias_keys: int32, shape ``(draws, 2)``: the bias of member ``i`` is then `bias`, or 0, plus
            ``bias_scales[i]`` times ``(out,)`` numbers that are drawn from ``bias_keys[d]`` and never in memory. What
            is added is rounded to the dtype of `x`, as `dense_of_members` rounds it to that of the bias.
        bias_scales: with `bias_keys`; float32, shape ``(members,)``, sigma of the bias times the sign. Within a draw
            they differ in sign alone, or are 0.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.
        activation: one of `ACTIVATIONS`, or None.
        fused: whether one kernel multiplies with the weight and adds the noise; by default it does unless the weight
            is large. The library multiplies where not, and always where inputs are shared or float32 is multiplied in
            full precision.

    Returns:
        The dtype of `x`, shape ``(members, rows, out)``.
    """
    draws, _, rank = A.shape
    how = bias_keys, bias_scales, precision, rng, activation, fused
    return _linear(x, weight, bias, stored(A), stored(B), draws, rank, signs, scale, *how)


@torch.library.custom_op("eggroll::linear_of_members_drawn", mutates_args=())
def linear_of_members_drawn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    rank: int,
    signs: Tensor,
    scale: float,
    bias_keys: Tensor | None = None,
    bias_scales: Tensor | None = None,
    precision: str = "float32",
    rng: str = "threefry",
    activation: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`linear_of_members` whose factors are drawn where they are needed, too, and never in memory.

    Args:
        keys: int32, shape ``(draws, 2)``, from which the factors are drawn as `eggroll.perturbation` lays them out;
            they are rounded to the dtype of `x`.
        rank: columns of each factor.

    Returns:
        The dtype of `x`, shape ``(members, rows, out)``.
    """
    keys = keys.contiguous()
    A, B = drawn(keys, x.shape[-1], precision, rng)
    how = bias_keys, bias_scales, precision, rng, activation, fused
    return _linear(x, weight, bias, A, B, len(keys), rank, signs, scale, *how)


@linear_of_members.register_fake
@linear_of_members_drawn.register_fake
def _(x, weight, bias, noise, rank_or_noise, signs, *rest):
    return x.new_empty(signs.shape[0], x.shape[-2], weight.shape[0])


def _more_rows(operation: Any) -> Any:
    """The rule of a `vmap` inside the model: what is vectorised over are further rows of every member."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(f"{operation} can be vectorised over `x` alone")
        x = x.movedim(in_dims[0], -3)
        out = operation(x.flatten(-3, -2), *rest)
        return out.unflatten(1, (info.batch_size, x.shape[-2])), 1

    return rule


linear_of_members.register_vmap(_more_rows(linear_of_members))
linear_of_members_drawn.register_vmap(_more_rows(linear_of_members_drawn))
