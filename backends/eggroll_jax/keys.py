"""Keys and random bits for JAX: what `eggroll.prng` defines, whatever the user's flags are.

What `jax.random` draws depends on ``jax_threefry_partitionable``; its primitive does not, so keys are derived with
that. On CPU, though, the primitive is a loop that nothing fuses with, which is right for a few keys and slow for
many numbers: bits are drawn by the rounds written out, one pass over the output together with what turns them into
floats.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from eggroll import prng

from . import philox

__all__ = ["Draws", "fold_in", "key_words", "parted", "random_bits", "split"]

Array = jax.Array

# Elements of a block: two of the widest vectors that a CPU has.
_BLOCK = 32


class Draws(NamedTuple):
    """Draws of one shape from keys that follow each other."""

    keys: int
    """How many."""
    shape: tuple[int, ...]
    """Of what is drawn from each."""
    stream: int = 0
    """See `eggroll.prng.bits`."""


def key_words(key: Any) -> Array:
    """The two words of a key that a JAX user passed.

    Args:
        key: one typed Threefry key (`jax.random.key`), or a legacy one (`jax.random.PRNGKey`): uint32, shape
            ``(2,)``.

    Returns:
        uint32, shape ``(2,)``.

    Raises:
        TypeError: not a key, or one of another generator.
        ValueError: an array of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None:
        raise TypeError(f"`key` must be a key such as `jax.random.key(0)`, got {key!r}")
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(key))
        if implementation != "threefry2x32":
            raise TypeError(f"`key` must be a threefry2x32 key, got one of {implementation}")
        if key.shape != ():
            raise ValueError(f"`key` must be a single key, got an array of keys of shape {key.shape}")
        return jax.random.key_data(key)
    if dtype != np.uint32 or tuple(key.shape) != (2,):
        raise TypeError(
            "`key` must be a key such as `jax.random.key(0)` or a legacy one, uint32 of shape (2,), "
            f"got {dtype} of shape {tuple(key.shape)}"
        )
    return jnp.asarray(key)


def fold_in(key: Array, data: Any) -> Array:
    """A key derived from `key` and a number, as `eggroll.prng.fold_in`.

    Args:
        key: uint32, shape ``(..., 2)``.
        data: an int in [0, 2**32), or integers that broadcast against the leading axes of `key`.

    Returns:
        uint32, shape ``(..., 2)``, with the broadcast leading axes.
    """
    data = np.uint32(data) if isinstance(data, int) else jnp.asarray(data).astype(np.uint32)
    return _derived(key[..., 0], key[..., 1], data)


def split(key: Array, n: int) -> Array:
    """`n` keys derived from each key, as `eggroll.prng.split`: uint32, shape ``(..., n, 2)``."""
    counter = jnp.arange(n, dtype=np.uint32)
    return _derived(key[..., :1], key[..., 1:], counter)


def random_bits(keys: Array, draws: Sequence[Draws], rng: prng.Rng = "threefry") -> Array:
    """32 random bits for each element of several draws at once, as `eggroll.prng.bits` gives each of them.

    One kernel for all the parameters of a model: the rounds written out take a compiler long enough to be compiled
    once only. A run of elements that are counted from 0, the draw of a key or with Philox a row of it, is filled up
    to whole blocks, and the elements of a block share a key: a kernel that looked the key up for each element could
    not be vectorised.

    Args:
        keys: uint32, shape ``(..., keys, 2)``.
        draws: what is drawn from the keys in turn; whose numbers of keys add up to theirs.
        rng: the generator.

    Returns:
        uint32, shape ``(..., blocks, elements of a block)``, which `parted` takes apart.
    """
    elements = sum(draw.keys * math.prod(draw.shape) for draw in draws)
    if elements >= 2**31:
        raise ValueError(f"one draw must have fewer than 2**31 elements, got {elements}")
    of_key, row, stream, first = _places(draws, rng)
    words = keys.at[..., of_key, :].get(mode="promise_in_bounds")[..., None]
    counter = first[:, None] + jnp.arange(_BLOCK, dtype=np.uint32)
    k0, k1 = words[..., 0, :], words[..., 1, :]
    if rng == "philox":
        return philox.bits(k0, k1, counter, row[:, None], stream[:, None])
    y0, y1 = _rounds(k0, k1, counter)
    return y0 ^ y1


def parted(blocks: Array, draws: Sequence[Draws], rng: prng.Rng = "threefry") -> list[Array]:
    """What was drawn in blocks: for each entry of `draws`, shape ``(..., number of keys, *shape)``."""
    parts, end, lead = [], 0, blocks.shape[:-2]
    for draw in draws:
        runs, size = _runs(draw, rng)
        length = -(-size // _BLOCK)
        begin, end = end, end + draw.keys * runs * length
        whole = blocks[..., begin:end, :].reshape(*lead, draw.keys, runs, length * _BLOCK)
        parts.append(whole[..., :size].reshape(*lead, draw.keys, *draw.shape))
    return parts


def _runs(draw: Draws, rng: prng.Rng) -> tuple[int, int]:
    """How many runs of elements, counted from 0, one key's draw consists of, and how long each is."""
    if rng == "philox" and draw.shape:
        return math.prod(draw.shape[:-1]), draw.shape[-1]
    return 1, math.prod(draw.shape)


def _places(draws: Sequence[Draws], rng: prng.Rng) -> np.ndarray:
    """Of every block whose key's it is, its row and stream, and its first element: uint32, shape ``(4, blocks)``."""
    places, keys = [np.empty((4, 0), np.uint32)], 0
    for draw in draws:
        runs, size = _runs(draw, rng)
        key, row, block = np.indices((draw.keys, runs, -(-size // _BLOCK)), np.uint32).reshape(3, -1)
        places.append(np.stack([keys + key, row, np.full_like(row, draw.stream), block * _BLOCK]).astype(np.uint32))
        keys += draw.keys
    return np.concatenate(places, axis=1)


@jax.jit
def _derived(k0: Array, k1: Array, low: Array) -> Array:
    """The blocks of keys at the counters ``(0, low)`` as keys."""
    k0, k1, low = jnp.broadcast_arrays(k0, k1, low)
    # Zeros made of the counter: under `vmap` the primitive's loop wants both halves of it batched.
    return jnp.stack(threefry2x32_p.bind(k0, k1, low ^ low, low), axis=-1)


@jax.jit
def _rounds(k0: Array, k1: Array, low: Array) -> tuple[Array, Array]:
    """Twenty rounds on the counters ``(0, low)``; everything broadcasts. Jitted so that it is traced once."""
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(prng.PARITY))
    x0, x1 = k0, low + k1
    for group in range(5):
        for rotation in prng.ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation)))
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1
