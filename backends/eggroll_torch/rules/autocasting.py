"""What `torch.vmap` keeps autocast from: products with a bias, convolutions, PReLU.

In their own dtypes they would be slower, or refused where layers before have given theirs to the input.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..autocast import autocast_operands, autocasts
from ..member_mode import FUNCTIONS
from ..perturbed import LowRankWeight, unwrapped
from .convolution import CONVOLUTIONS, TRANSPOSED

__all__ = ["linear"]


def _in_dtype_of_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its operands cast; rules for weights do that themselves."""

    def answer(input, weight, bias=None, *args, **kwargs):
        operands = input, weight, bias
        if autocasts(input.device) and not any(isinstance(operand, LowRankWeight) for operand in operands):
            operands = autocast_operands(*map(unwrapped, operands))
        return function(*operands, *args, **kwargs)

    return answer


def _prelu(input, weight):
    return torch.prelu(*autocast_operands(unwrapped(input), unwrapped(weight)))


_PRODUCTS = (*CONVOLUTIONS, *TRANSPOSED, torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm)
FUNCTIONS |= {function: _in_dtype_of_autocast(function) for function in _PRODUCTS}
FUNCTIONS |= {torch.prelu: _prelu, torch.Tensor.prelu: _prelu, F.prelu: _prelu}
linear = FUNCTIONS[F.linear] = _in_dtype_of_autocast(F.linear)
