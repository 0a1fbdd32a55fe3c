"""Threefry-2x32-20 and the normal transform in registers. The definition is `eggroll.prng`.

Integers equal the definition to the bit; normals to a few units in the last place, because the polynomial is
evaluated with fused multiply-adds here.
"""

import triton
import triton.language as tl

from eggroll import prng

__all__ = ["block", "fold_in", "key_at", "normal"]

_PARITY = tl.constexpr(prng.PARITY)
_CENTRAL = tl.constexpr(prng.ERFINV_CENTRAL)
_TAIL = tl.constexpr(prng.ERFINV_TAIL)
_SQRT2 = tl.constexpr(prng.SQRT2)


@triton.jit
def key_at(keys, index, mask):
    """The two words of some keys, uint32: `keys` points at int32 ``(n, 2)``, `index` says which of the n."""
    k0 = tl.load(keys + 2 * index, mask=mask, other=0)
    k1 = tl.load(keys + 2 * index + 1, mask=mask, other=0)
    return k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)


@triton.jit
def block(k0, k1, counter):
    """Both words of the block of a key at the counter ``(0, counter)``, all uint32."""
    k2 = k0 ^ k1 ^ _PARITY
    x0 = k0
    x1 = counter + k1
    for group in tl.static_range(5):
        x0 += x1
        x1 = ((x1 << (17 if group % 2 else 13)) | (x1 >> (15 if group % 2 else 19))) ^ x0
        x0 += x1
        x1 = ((x1 << (29 if group % 2 else 15)) | (x1 >> (3 if group % 2 else 17))) ^ x0
        x0 += x1
        x1 = ((x1 << (16 if group % 2 else 26)) | (x1 >> (16 if group % 2 else 6))) ^ x0
        x0 += x1
        x1 = ((x1 << (24 if group % 2 else 6)) | (x1 >> (8 if group % 2 else 26))) ^ x0
        k0, k1, k2 = k1, k2, k0
        x0 += k0
        x1 += k1 + (group + 1)
    return x0, x1


@triton.jit
def fold_in(k0, k1, data):
    """The two words of the key derived from a key and a number, all uint32."""
    return block(k0, k1, data)


@triton.jit
def normal(k0, k1, counter, table, PRECISION: tl.constexpr):
    """Standard normal numbers, float32: element `counter` of the draw of the key ``(k0, k1)``.

    `PRECISION` is that of `eggroll.prng.normal`; for a narrow one `table` points at its normals.
    """
    x0, x1 = block(k0, k1, counter.to(tl.uint32))
    bits = x0 ^ x1
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
