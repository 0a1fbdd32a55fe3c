"""Philox-4x32-10 in registers, equal to the bit to its definition, `eggroll.philox`."""

import triton
import triton.language as tl

from eggroll import philox

__all__ = ["block"]

_M0 = tl.constexpr(philox.MULTIPLIERS[0])
_M1 = tl.constexpr(philox.MULTIPLIERS[1])
_W0 = tl.constexpr(philox.WEYL[0])
_W1 = tl.constexpr(philox.WEYL[1])
_ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def block(k0, k1, c0, c1, c2):
    """The four words of the blocks of keys, uint32, at the counters ``(c0, c1, c2, 0)``; everything broadcasts."""
    c0 = c0.to(tl.uint32)
    c3 = tl.zeros_like(c0)
    c1 = c3 + c1  # numbers of any integer type, those too that are known when the kernel is compiled
    c2 = c3 + c2
    for _ in tl.static_range(_ROUNDS):
        high0 = tl.umulhi(c0, _M0)
        high1 = tl.umulhi(c2, _M1)
        low0 = c0 * _M0
        low1 = c2 * _M1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3
