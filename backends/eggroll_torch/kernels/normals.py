"""The normal transform in registers. The definition is `eggroll.prng.normal`."""

import triton
import triton.language as tl

from eggroll import prng

__all__ = ["normal_of_bits"]

_CENTRAL = tl.constexpr(prng.ERFINV_CENTRAL)
_TAIL = tl.constexpr(prng.ERFINV_TAIL)
_SQRT2 = tl.constexpr(prng.SQRT2)


@triton.jit
def normal_of_bits(bits, table, PRECISION: tl.constexpr):
    """Standard normal numbers, float32, of 32 random bits each.

    They equal the definition to a few units in the last place: the polynomial is evaluated with fused multiply-adds.
    """
    if PRECISION == "float32":
        # With the mantissa k: f - 1.5 = (k - 2**22) / 2**23, and u = (4 k + 1 - 2**24) / 2**24, both exact.
        f = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
        u = tl.fma(f - 1.5, 2.0, 2.0**-24)
        # Where u is close to 1 the definition has rounded u * u before it subtracts, which shows in the tail: this
        # must not become a fused multiply-add. `launch` forbids the compiler to make any; those here are explicit.
        w = -tl.log(1.0 - u * u)
        x = w - 2.5
        central = tl.fma(x, _CENTRAL[0], _CENTRAL[1])
        y = tl.sqrt(w) - 3.0
        tail = tl.fma(y, _TAIL[0], _TAIL[1])
        for power in tl.static_range(2, 9):
            central = tl.fma(central, x, _CENTRAL[power])
            tail = tl.fma(tail, y, _TAIL[power])
        drawn = tl.where(w < 5.0, central, tail) * u * _SQRT2
    elif PRECISION == "bfloat16":
        drawn = tl.load(table + ((bits >> 1) & 127).to(tl.int32))
    else:
        drawn = tl.load(table + ((bits >> 6) & 1023).to(tl.int32))
    return drawn
