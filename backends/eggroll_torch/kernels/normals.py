"""The normal transform in registers. The definition is `eggroll.prng.normal`."""

import math

import triton
import triton.language as tl

from eggroll import prng

from .portable import INTERPRETED

__all__ = ["normal_of_bits"]

_CENTRAL = tl.constexpr(prng.ERFINV_CENTRAL)
_TAIL = tl.constexpr(prng.ERFINV_TAIL)
_SQRT2 = tl.constexpr(prng.SQRT2)
_MINUS_LN2 = tl.constexpr(-math.log(2))


@triton.jit
def _log2(x):
    """One instruction of a GPU, off by up to 2**-22: of the result itself where that is beyond 1."""
    if INTERPRETED:
        found = tl.log2(x)
    else:
        found = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return found


@triton.jit
def normal_of_bits(bits, table, PRECISION: tl.constexpr):
    """Standard normal numbers, float32, of 32 random bits each.

    They equal the definition within 3 units in the last place, for every mantissa and whatever the errors of the
    instructions for logarithm and root, within the bounds that are documented for them. Fused multiply-adds are all
    explicit: `launch` forbids the compiler to make others.
    """
    if PRECISION == "float32":
        # With the mantissa k: f - 1.5 = (k - 2**22) / 2**23, and u = (4 k + 1 - 2**24) / 2**24, both exact.
        f = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
        u = tl.fma(f - 1.5, 2.0, 2.0**-24)
        # Where u is close to 1 the definition has rounded u * u before it subtracts, which shows in the tail.
        log2 = _log2(1.0 - u * u)
        x = tl.fma(log2, _MINUS_LN2, -2.5)
        central = tl.fma(x, _CENTRAL[0], _CENTRAL[1])
        # The instruction for a root is not exact either. In the tail it lies between 2.2 and 4.1: Newton's step with
        # the slope at 3 takes two thirds of the error away at least.
        w = log2 * _MINUS_LN2
        root = tl.sqrt(w)
        y = tl.fma(tl.fma(-root, root, w), 1.0 / 6.0, root) - 3.0
        tail = tl.fma(y, _TAIL[0], _TAIL[1])
        for power in tl.static_range(2, 8):
            central = tl.fma(central, x, _CENTRAL[power])
            tail = tl.fma(tail, y, _TAIL[power])
        central = tl.fma(central, x, _CENTRAL[8])
        # Rounded as the definition does.
        tail = tail * y + _TAIL[8]
        drawn = tl.where(w < 5.0, central, tail) * u * _SQRT2
    elif PRECISION == "bfloat16":
        drawn = tl.load(table + ((bits >> 1) & 127).to(tl.int32))
    else:
        drawn = tl.load(table + ((bits >> 6) & 1023).to(tl.int32))
    return drawn
