"""Dense noise, of vectors and of whatever is not a matrix: added to a parameter, or summed over the draws."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..totals import add_, scale_
from .drawing import blocks_of, normals
from .launch import DTYPES, cdiv, launch, narrow_table, power_of_two, splits
from .portable import narrow
from .threefry import key_at

__all__ = ["add_dense_sum_drawn_", "dense_of_members"]

# Numbers of a program.
_BLOCK = 1024


@triton.jit
def _members_kernel(
    weight, keys, scales, table, out, draws, size, copies,
    PRECISION: tl.constexpr, RNG: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK_C)
    draw = (tl.program_id(0) // blocks * BLOCK_D + tl.arange(0, BLOCK_D))[:, None]
    start = tl.program_id(0) % blocks * BLOCK_C
    column = start + tl.arange(0, BLOCK_C)[None, :]
    inside = (draw < draws) & (column < size)
    k0, k1 = key_at(keys, draw, draw < draws)
    drawn = normals(k0, k1, column, blocks_of(start, BLOCK_C)[None, :], 0, 0, table, PRECISION, RNG)
    parameter = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    for copy in range(copies):
        member = draw * copies + copy
        scale = tl.load(scales + member, mask=draw < draws, other=0.0)
        noise = narrow(scale * drawn, DTYPE).to(tl.float32)
        tl.store(out + member.to(tl.int64) * size + column, narrow(parameter + noise, DTYPE), mask=inside)


@torch.library.custom_op("eggroll::dense_of_members", mutates_args=())
def dense_of_members(
    weight: Tensor, keys: Tensor, scales: Tensor, precision: str = "float32", rng: str = "threefry"
) -> Tensor:
    """A parameter with dense noise as each member sees it: ``weight + scales[i] * noise[i // copies]``.

    Args:
        weight: float32, bfloat16 or float16, any shape.
        keys: int32, shape ``(draws, 2)``.
        scales: float32, shape ``(members,)``, sigma times the sign; each draw is that of ``copies = members / draws``
            members.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.

    Returns:
        The dtype of `weight`, shape ``(members, *weight.shape)``; the noise is rounded to it before it is added.
    """
    out = weight.new_empty(len(scales), *weight.shape)
    if out.numel():
        draws, size = len(keys), weight.numel()
        columns = power_of_two(size, 4, _BLOCK)
        at_once = _BLOCK // columns
        launch(
            _members_kernel,
            (cdiv(size, columns) * cdiv(draws, at_once),),
            *(weight.contiguous(), keys.contiguous(), scales.contiguous(), narrow_table(precision, keys), out),
            *(draws, size, len(scales) // draws),
            device=weight.device,
            PRECISION=precision,
            RNG=rng,
            DTYPE=DTYPES[weight.dtype],
            BLOCK_D=at_once,
            BLOCK_C=columns,
        )
    return out


@dense_of_members.register_fake
def _(weight, keys, scales, precision="float32", rng="threefry"):
    return weight.new_empty(scales.shape[0], *weight.shape)


@triton.jit
def _dense_sum_kernel(
    keys, coefficients, table, out, draws, size, length,
    PRECISION: tl.constexpr, RNG: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``sum_d c_d * noise_d`` of some elements over one part, of `length`, of the draws."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    block = blocks_of(tl.program_id(0) * BLOCK_C, BLOCK_C)[None, :]
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, draws)
    sums = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_D):
        draw = first + tl.arange(0, BLOCK_D)[:, None]
        k0, k1 = key_at(keys, draw, draw < stop)
        c = tl.load(coefficients + draw, mask=draw < stop, other=0.0)
        sums += c * normals(k0, k1, column, block, 0, 0, table, PRECISION, RNG)
    place = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pointer = out + tl.program_id(1).to(tl.int64) * size + place
    tl.store(pointer, tl.sum(sums, axis=0), mask=place < size)


@torch.library.custom_op("eggroll::add_dense_sum_drawn_", mutates_args={"total"})
def add_dense_sum_drawn_(
    total: Tensor,
    coefficients: Tensor,
    keys: Tensor,
    precision: str = "float32",
    rng: str = "threefry",
    alpha: float = 1.0,
    beta: float = 1.0,
) -> None:
    """``total = beta * total + alpha * sum_d c_d * noise_d``, in float32 and in a fixed order.

    Args:
        total: float32, or a narrower dtype, to which the result is then rounded; any shape and strides.
        coefficients: float32, shape ``(draws,)``.
        keys: int32, shape ``(draws, 2)``.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.
        alpha: see above.
        beta: with 0 what `total` holds does not matter, as in `torch.addmm`.
    """
    draws, size = len(keys), total.numel()
    if draws == 0 or size == 0:
        scale_(total, beta)
        return
    columns = power_of_two(size, 4, 256)
    at_once = _BLOCK // columns
    blocks = cdiv(size, columns)
    parts = splits(blocks, draws * columns, total.device)
    length = cdiv(cdiv(draws, parts), at_once) * at_once
    partial = total.new_empty(parts, size, dtype=torch.float32)
    launch(
        _dense_sum_kernel,
        (blocks, parts),
        *(keys.contiguous(), coefficients.float().contiguous(), narrow_table(precision, keys), partial),
        *(draws, size, length),
        device=total.device,
        PRECISION=precision,
        RNG=rng,
        BLOCK_D=at_once,
        BLOCK_C=columns,
    )
    add_(total, partial.sum(0).view(total.shape), alpha, beta)


@add_dense_sum_drawn_.register_fake
def _(total, coefficients, keys, precision="float32", rng="threefry", alpha=1.0, beta=1.0):
    return None
