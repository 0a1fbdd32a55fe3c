"""Threefry-2x32-20 in registers, equal to the bit to its definition, `eggroll.prng`."""

import triton
import triton.language as tl

from eggroll import prng

__all__ = ["block", "fold_in", "key_at"]

_PARITY = tl.constexpr(prng.PARITY)


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
