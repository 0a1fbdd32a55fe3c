"""What Triton's interpreter does otherwise than a GPU, made equal.

The interpreter stores bfloat16 as its 16 bits: it multiplies the bits, and drops the lower half of a float32 where a
GPU rounds. The narrowing and the matrix products of all kernels go through here.
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "narrow", "product"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 `x` rounded to the nearest value of `DTYPE`, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        words = x.to(tl.uint32, bitcast=True)
        words = (words + 0x7FFF + ((words >> 16) & 1)) & 0xFFFF0000
        x = words.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``, the sum in float32; `PRECISION` is that of float32 factors: "ieee" or "tf32"."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
