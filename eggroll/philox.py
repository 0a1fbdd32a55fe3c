"""Philox-4x32 with 10 rounds: four numbers a block, of products instead of rotations, which a GPU likes better.

The generator is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). As in
`eggroll.prng`, which draws with it, words are int32, which wraps where uint32 would: JAX has no 64-bit integers by
default, PyTorch no arithmetic on uint32.
"""

from typing import Any

__all__ = ["MULTIPLIERS", "ROUNDS", "WEYL", "block", "signed"]

Array = Any

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the two words of the key after each round."""
ROUNDS = 10


def block(k0: Array, k1: Array, c0: Array, c1: Array, c2: Array, c3: Array) -> tuple[Array, Array, Array, Array]:
    """The four words of the block of the key ``(k0, k1)`` at the counter ``(c0, c1, c2, c3)``.

    Args:
        k0, k1, c0, c1, c2, c3: int32 arrays that broadcast. With one axis or more, since NumPy warns of numbers that
            wrap.

    Returns:
        int32, the broadcast shape each.
    """
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + signed(WEYL[0]), k1 + signed(WEYL[1])
    return c0, c1, c2, c3


def _product(multiplier: int, word: Array) -> tuple[Array, Array]:
    """The high and the low word of the 64-bit product, through halves of 16 bits, whose products are 32 bits wide."""
    a1, a0 = multiplier >> 16, multiplier & 0xFFFF
    b1, b0 = _upper(word), word & 0xFFFF
    middle = a1 * b0 + _upper(a0 * b0)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + _upper(middle) + _upper(other), signed(multiplier) * word


def _upper(word: Array) -> Array:
    """The upper 16 bits; int32 shifts right arithmetically, the mask makes the shift logical."""
    return (word >> 16) & 0xFFFF


def signed(word: int) -> int:
    """The int32 of the same bits as a word, an int in [0, 2**32)."""
    return word - 2**32 if word >= 2**31 else word
