"""Convolutions with a perturbed kernel.

A kernel counts as the matrix ``(kernel[0], prod(kernel[1:]))``. A convolution with it is the shared convolution plus
one with the `rank` filters that the columns of ``B`` are, followed by a 1x1 by ``A``; a transposed convolution has
its channels the other way round, so ``A`` comes first.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import autocast_operands
from ..perturbed import EITHER, PerturbedWeight, ScaledWeight, plain, rule, times, unwrapped

CONVOLUTIONS: dict[Any, int] = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
}
TRANSPOSED: dict[Any, int] = {
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}


def _convolution(function: Any, spatial: int) -> Any:
    def apply(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        how = stride, padding, dilation, groups
        return _applied(function, spatial, input, weight, bias, how, groups, transposed=False)

    return apply


def _transposed_convolution(function: Any, spatial: int) -> Any:
    def apply(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        how = stride, padding, output_padding, groups, dilation
        return _applied(function, spatial, input, weight, bias, how, groups, transposed=True)

    return apply


def _applied(
    function: Any,
    spatial: int,
    input: Any,
    weight: Any,
    bias: Any,
    how: tuple[Any, ...],
    groups: int,
    transposed: bool,
) -> Any:
    if isinstance(weight, ScaledWeight):
        factor = weight.rows
        if factor is not None and factor.ndim:
            factor = factor.view(-1, *(1,) * spatial)
        if transposed:
            return function(times(input, factor), weight.weight, bias, *how)
        out = times(function(input, weight.weight, None, *how), factor)
        return out if bias is None else out + unwrapped(bias).to(out.dtype).view(-1, *(1,) * spatial)
    if not _covers(input, weight, bias, spatial):
        return NotImplemented
    x = input if input.ndim == spatial + 2 else input.unsqueeze(0)
    # A (channels of kernel[0], rank), B (the kernel's other axes, rank)
    x, W, bias, A, B = autocast_operands(x, plain(weight), bias, *weight.noise.of_member())
    rank = A.shape[1]
    filters = B.mT.reshape(rank, *weight.shape[1:]).repeat(groups, *(1,) * (spatial + 1))
    A = A.reshape(groups, -1, rank)

    def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return function(x, kernel, bias, *how)

    noise = convolved(_mix(x, A.mT), filters) if transposed else _mix(convolved(x, filters), A)
    out = noise.add_(convolved(x, W, bias))  # not the other way round: members may share the other one
    return out if input.ndim == spatial + 2 else out.squeeze(0)


for _function, _spatial in CONVOLUTIONS.items():
    rule(_function, of=EITHER)(_convolution(_function, _spatial))
for _transposed, _spatial in TRANSPOSED.items():
    rule(_transposed, of=EITHER)(_transposed_convolution(_transposed, _spatial))


def _covers(input: Tensor, weight: Any, bias: Any, spatial: int) -> bool:
    return (
        isinstance(weight, PerturbedWeight)
        and weight.noise.kernel == tuple(weight.shape)
        and not isinstance(input, PerturbedWeight)
        and not isinstance(bias, PerturbedWeight)
        and input.ndim in (spatial + 1, spatial + 2)
    )


def _mix(x: Tensor, matrices: Tensor) -> Tensor:
    """A 1x1 convolution in groups: `x` ``(n, groups * a, *spatial)``, `matrices` ``(groups, b, a)``."""
    groups, b, a = matrices.shape
    flat = x.reshape(x.shape[0], groups, a, math.prod(x.shape[2:]))
    return (matrices @ flat).reshape(x.shape[0], groups * b, *x.shape[2:])
