"""Philox in PyTorch's operations, equal to the bit to `eggroll.philox`; `drawing` has loops and kernels beside it."""

import torch
from torch import Tensor

from eggroll.philox import MULTIPLIERS, ROUNDS, WEYL

__all__ = ["bits"]

_WORD = 0xFFFFFFFF


def bits(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """The four words of blocks at the counters ``(c0, c1, c2, 0)``: int32, shape ``(..., 4)``.

    Args:
        k0, k1: int32, of one shape.
        c0, c1, c2: int32, broadcastable against the keys.
    """
    # In int64, where a product of two words wraps but keeps all of its 64 bits.
    k0, k1, c0, c1, c2 = (words.long().bitwise_and_(_WORD) for words in (k0, k1, c0, c1, c2))
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = _upper(product1) ^ c1 ^ k0, product1.bitwise_and_(_WORD)
        c2, c3 = _upper(product0) ^ c3 ^ k1, product0.bitwise_and_(_WORD)
        k0, k1 = (k0 + WEYL[0]).bitwise_and_(_WORD), (k1 + WEYL[1]).bitwise_and_(_WORD)
    return torch.stack([c0, c1, c2, c3], dim=-1).to(torch.int32)


def _upper(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(_WORD)
