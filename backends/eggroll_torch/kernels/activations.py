"""The activations that a linear kernel applies before it writes."""

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "activate"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")


@triton.jit
def _sigmoid(x):
    # exp of a negative number does not overflow.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    # 1 - e has no digits left of a small number. The coefficients are those of tanhf in the Cephes library.
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, large)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """An activation of float32 `x` by name: one of `ACTIVATIONS`, or None for `x` itself."""
    if NAME == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is the sigmoid of 2 z.
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        x = x * _sigmoid(x)
    elif NAME == "tanh":
        x = _tanh(x)
    return x
