"""The activations that a linear kernel applies before it writes."""

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "activate"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")


@triton.jit
def _tanh(x):
    # exp of a negative number does not overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """An activation of float32 `x` by name: one of `ACTIVATIONS`, or None for `x` itself."""
    if NAME == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "silu":
        x = x * (0.5 + 0.5 * _tanh(0.5 * x))
    elif NAME == "tanh":
        x = _tanh(x)
    return x
