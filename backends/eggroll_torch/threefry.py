"""Threefry in PyTorch, equal to the bit to `eggroll.prng`: keys derived from keys, and bits.

`eggroll.prng` allocates a new array for each of the 130 operations of a block. Here they run in place; where Numba
can be imported its loops (`drawing_cpu`) derive keys on CPUs.
"""

import functools
import logging
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from eggroll import prng

from .interrupts import uninterrupted

__all__ = ["bits", "check_words", "compiled_for_cpu", "fold_in", "folded", "seed_of"]

_log = logging.getLogger("eggroll")


@functools.cache
@uninterrupted(once=True)  # Numba cannot be imported any more once a Ctrl-C came while it was
def compiled_for_cpu() -> ModuleType | None:
    """`drawing_cpu`, or None where Numba cannot be imported."""
    instead = "PyTorch's operations draw noise on CPUs, several times slower"
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        _log.info("%s: Numba is not installed", instead)
        return None
    except Exception as error:  # whatever it raises beside a NumPy or an LLVM that it does not know
        _log.warning("%s: Numba cannot be imported (%s: %s)", instead, type(error).__name__, error)
        return None
    from . import drawing_cpu

    return drawing_cpu


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """`eggroll.prng.fold_in` of keys and numbers that broadcast, as int32 words.

    Args:
        keys: int32, shape ``(..., 2)``.
        data: int32, broadcastable against the leading axes of `keys`.

    Returns:
        int32, shape ``(..., 2)``.

    Raises:
        TypeError: of other dtypes, whose words the loops would misread.
    """
    check_words("keys", keys)
    check_words("data", data)
    shape = np.broadcast_shapes(keys.shape[:-1], data.shape)  # PyTorch's takes 20 microseconds
    keys, data = keys.expand(*shape, 2), data.expand(shape)
    compiled = compiled_for_cpu() if keys.device.type == "cpu" else None
    if compiled is None:
        k0, k1 = (keys[..., word].contiguous() for word in (0, 1))
        return torch.stack(_block(k0, k1, data + k1), dim=-1)
    words = compiled.fold_in(keys.reshape(-1, 2).numpy().view(np.uint32), data.reshape(-1).numpy().view(np.uint32))
    return torch.from_numpy(words.view(np.int32)).view(*shape, 2)


def folded(keys: np.ndarray, data: int) -> np.ndarray:
    """`fold_in` of one number on the host, in a tenth of the time: few keys are derived for every generation.

    Args:
        keys: uint32, shape ``(n, 2)``.
        data: negative numbers belong to no member, parameter or generation.

    Returns:
        uint32, shape ``(n, 2)``.
    """
    number = data & 0xFFFFFFFF
    compiled = compiled_for_cpu()
    if compiled is None:
        return prng.fold_in(keys, number)
    return compiled.fold_in(keys, np.full(len(keys), number, np.uint32))


def seed_of(key: Tensor, data: int) -> int:
    """64 bits that follow from a key and a number, for other generators, such as those of PyTorch.

    Found without PyTorch's operations, which a mode may be watching: it is asked for every member.

    Args:
        key: int32, shape ``(2,)``, on the CPU.
        data: see `folded`.
    """
    high, low = folded(key.numpy().view(np.uint32)[None], data)[0].tolist()
    return (high << 32) | low


def bits(k0: Tensor, k1: Tensor, counter: Tensor) -> Tensor:
    """The 32 random bits of elements of the draws of keys; all int32, `counter` broadcasts against the keys."""
    x0, x1 = _block(k0, k1, k1 + counter)
    return x0.bitwise_xor_(x1)


def check_words(name: str, words: Tensor) -> None:
    """Raises a TypeError unless `words` are int32."""
    if words.dtype != torch.int32:
        raise TypeError(f"`{name}` must be int32, got {words.dtype}")


def _block(k0: Tensor, k1: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter ``(0, x1 - k1)``; overwrites `x1`. int32 wraps where uint32 would."""
    keys = (k0, k1, (k0 ^ k1).bitwise_xor_(prng.PARITY))
    x0 = k0.clone()
    scratch = torch.empty_like(x1)
    for group in range(5):
        for rotation in prng.ROTATIONS[group % 2]:
            x0.add_(x1)
            torch.bitwise_right_shift(x1, 32 - rotation, out=scratch)
            # int32 shifts right arithmetically: the mask makes the shift logical.
            scratch.bitwise_and_((1 << rotation) - 1)
            # x1 << rotation | scratch in one pass: the bits do not overlap.
            torch.add(scratch, x1, alpha=1 << rotation, out=x1)
            x1.bitwise_xor_(x0)
        x0.add_(keys[(group + 1) % 3])
        x1.add_(keys[(group + 2) % 3]).add_(group + 1)
    return x0, x1
