"""Keys, and the numbers drawn from them: the same integers on every array library.

Keys are derived by Threefry-2x32 with 20 rounds, and so are the numbers, unless `rng` says otherwise. The generator
is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). Keys, counters and
floats are laid out as `jax.random` lays them out with ``jax_threefry_partitionable=True``, so a key and a shape give
the same numbers here and there. This module is the definition; backends bring faster versions that equal it.

A *key* is an array of two uint32 words. Functions take a single key, shape ``(2,)``, or an array of keys, shape
``(..., 2)``, and put the leading axes of the keys before those of what is drawn. The array library and the device
are those of the key.

With ``rng="philox"`` the same key is one of Philox-4x32-10 (`eggroll.philox`), whose blocks hold four numbers. In a
draw of shape ``(..., n)`` they are four neighbours along the last axis: the element with the index ``j`` there, and
``row`` along the other axes taken as one, is word ``j % 4`` of the block at the counter ``(j // 4, row, stream, 0)``.
Streams tell several draws from one key apart.
"""

import functools
import math
from typing import Any, Literal

import array_api_compat
import numpy as np

from . import philox
from .config import RNGS, as_choice, as_int

__all__ = ["bits", "fold_in", "key", "key_from_words", "normal", "split", "uniform"]

Array = Any
Precision = Literal["float32", "bfloat16", "float16"]
Rng = Literal["threefry", "philox"]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}
# A float is filled from as many bits as it is wide: the top 23 of 32, the top 7 of 8, the top 10 of 16.
MANTISSA_SHIFTS = {"float32": 9, "bfloat16": 1, "float16": 6}

# Giles, "Approximating the erfinv function" (GPU Computing Gems, 2010), single precision, highest power first.
ERFINV_CENTRAL = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
ERFINV_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)
SQRT2 = float(np.float32(math.sqrt(2.0)))


def key(seed: int, *, xp: Any = np, device: Any = None) -> Array:
    """The key of an integer seed: its high and its low 32 bits.

    Args:
        seed: an int in [0, 2**64).
        xp: the array library of the key (NumPy by default); `device`: where it lives.

    Returns:
        uint32, shape ``(2,)``.

    Example:
        >>> key(2**32 + 7)
        array([1, 7], dtype=uint32)
    """
    seed = as_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"`seed` must be below 2**64, got {seed}")
    return _key_of(xp, [seed >> 32, seed & 0xFFFFFFFF], device)


def key_from_words(words: Any, *, xp: Any = np, device: Any = None) -> Array:
    """A key from its two words: any sequence or array of two ints in [0, 2**32).

    Returns:
        uint32, shape ``(2,)``.
    """
    values = list(words)
    if len(values) != 2:
        raise ValueError(f"`seed` must be an int or a key of two words, got {len(values)} words")
    checked = [as_int("seed", _item(value), 0) for value in values]
    if max(checked) >= 2**32:
        raise ValueError(f"`seed` as a key must have words below 2**32, got {checked}")
    return _key_of(xp, checked, device)


def fold_in(key: Array, data: Any) -> Array:
    """A key derived from `key` and a number: the block of `key` at the counter ``(0, data)``.

    Args:
        key: uint32, shape ``(..., 2)``.
        data: an int in [0, 2**32), or an integer array of such that broadcasts against the leading axes of `key`.

    Returns:
        uint32, shape ``(..., 2)``, with the broadcast leading axes.
    """
    xp = array_api_compat.array_namespace(key)
    if not hasattr(data, "dtype") or isinstance(data, np.generic):
        word = as_int("data", data, 0)
        if word >= 2**32:
            raise ValueError(f"`data` must be below 2**32, got {word}")
        data = xp.asarray(philox.signed(word), dtype=xp.int32, device=array_api_compat.device(key))
    elif not xp.isdtype(data.dtype, "integral"):
        raise TypeError(f"`data` must hold integers, got {data.dtype}")
    k0, k1 = _words(xp, key)
    x0, x1 = _block(k0, k1, xp.astype(data, xp.int32)[..., None])
    return _unsigned(xp, xp.concat(xp.broadcast_arrays(x0, x1), axis=-1))


def split(key: Array, n: int) -> Array:
    """`n` keys derived from `key`: its blocks at the counters ``0 .. n - 1``.

    Args:
        key: uint32, shape ``(..., 2)``.
        n: how many, at least 1.

    Returns:
        uint32, shape ``(..., n, 2)``.
    """
    xp = array_api_compat.array_namespace(key)
    k0, k1 = _words(xp, key)
    x0, x1 = _block(k0, k1, _counter(xp, as_int("n", n, 1), array_api_compat.device(key)))
    return _unsigned(xp, xp.stack([x0, x1], axis=-1))


def bits(key: Array, shape: tuple[int, ...], *, rng: Rng = "threefry", stream: int = 0) -> Array:
    """32 random bits for each element: the two words of its Threefry block, exclusive-ored, or a word of Philox's.

    Args:
        key: uint32, shape ``(..., 2)``.
        shape: of one draw, with fewer than 2**31 elements.
        rng: the generator, ``"threefry"`` or ``"philox"``.
        stream: which of a key's Philox draws, an int in [0, 2**31); Threefry has none but 0.

    Returns:
        uint32, shape ``(..., *shape)``.

    Raises:
        ValueError: `key`, `shape`, `rng` or `stream` breaks its rule.

    Example:
        >>> bits(key(0), (4,), rng="philox")
        array([1713891541, 3781805453, 3159862348, 2600524760], dtype=uint32)
    """
    xp = array_api_compat.array_namespace(key)
    return xp.reshape(_unsigned(xp, _signed_bits(xp, key, shape, rng, stream)), (*key.shape[:-1], *shape))


def uniform(
    key: Array, shape: tuple[int, ...], precision: Precision = "float32", *, rng: Rng = "threefry", stream: int = 0
) -> Array:
    """Uniform numbers on (-1, 1): odd multiples of ``2**-(m + 1)``, where the precision has `m` mantissa bits.

    With ``k`` the `m` bits of a draw this is ``(4 k + 1 - 2**(m + 1)) / 2**(m + 1)``. It equals, to the bit, what
    `jax.random.uniform` computes on ``[nextafter(-1, 0), 1)`` by placing the bits in a float's mantissa, because
    that computation is exact in the given precision.

    Args:
        key: uint32, shape ``(..., 2)``.
        shape: of one draw, with fewer than 2**31 elements.
        precision: how fine the numbers are; ``"bfloat16"`` has 128 values, ``"float16"`` 1024.
        rng, stream: see `bits`.

    Returns:
        float32, shape ``(..., *shape)``; every value is representable in `precision`.
    """
    xp = array_api_compat.array_namespace(key)
    drawn = _uniform_of(xp, _mantissas(xp, key, shape, precision, rng, stream), MANTISSA_BITS[precision])
    return xp.reshape(drawn, (*key.shape[:-1], *shape))


def normal(
    key: Array, shape: tuple[int, ...], precision: Precision = "float32", *, rng: Rng = "threefry", stream: int = 0
) -> Array:
    """Standard normal numbers, ``sqrt(2) * erfinv(u)`` with Giles' single-precision polynomial.

    Args:
        key: uint32, shape ``(..., 2)``.
        shape: of one draw, with fewer than 2**31 elements.
        precision: ``"float32"``, or the dtype in which the reference would draw. A narrow one rounds erfinv and
            the product to that dtype, so it has few distinct values (128 in bfloat16) and light tails.
        rng, stream: see `bits`.

    Returns:
        float32, shape ``(..., *shape)``; every value is representable in `precision`.
    """
    xp = array_api_compat.array_namespace(key)
    k = _mantissas(xp, key, shape, precision, rng, stream)
    if precision == "float32":
        drawn = _erfinv(xp, _uniform_of(xp, k, 23)) * SQRT2
    else:
        table = xp.asarray(narrow_normals(precision), device=array_api_compat.device(key))
        drawn = xp.take(table, xp.reshape(k, (-1,)))
    return xp.reshape(drawn, (*key.shape[:-1], *shape))


def _key_of(xp: Any, words: list[int], device: Any) -> Array:
    # NumPy 1 knows no devices.
    return xp.asarray(words, dtype=xp.uint32, **({} if device is None else {"device": device}))


def _block(k0: Array, k1: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20 of the counter ``(0, x1)``, all words int32, which wraps where uint32 would."""
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0 = k0
    x1 = x1 + k1
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            # int32 shifts right arithmetically: the mask makes the shift logical.
            x1 = (x1 << rotation) | ((x1 >> (32 - rotation)) & ((1 << rotation) - 1))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def _words(xp: Any, key: Array) -> tuple[Array, Array]:
    """The two words of each key as int32, each with a trailing axis of length 1."""
    if key.dtype != xp.uint32 or key.ndim < 1 or key.shape[-1] != 2:
        raise ValueError(f"`key` must be uint32 of shape (..., 2), got {key.dtype} of shape {tuple(key.shape)}")
    words = xp.astype(key, xp.int32)
    return words[..., :1], words[..., 1:]


def _counter(xp: Any, n: int, device: Any) -> Array:
    return xp.arange(_checked_size(n), dtype=xp.int32, device=device)


def _checked_size(n: int) -> int:
    if not 0 <= n < 2**31:
        raise ValueError(f"one draw must have between 0 and 2**31 - 1 elements, got {n}")
    return n


def _signed_bits(xp: Any, key: Array, shape: tuple[int, ...], rng: Rng, stream: int) -> Array:
    """The bits as int32, the elements of a draw along one last axis: NumPy 1 would widen those of shape ``()``."""
    k0, k1 = _words(xp, key)
    if as_choice("rng", rng, RNGS) == "philox":
        return _philox_bits(xp, k0, k1, shape, stream)
    if as_int("stream", stream, 0):
        raise ValueError(f"`stream` must be 0 with `rng` 'threefry', got {stream}")
    y0, y1 = _block(k0, k1, _counter(xp, math.prod(shape), array_api_compat.device(key)))
    return y0 ^ y1


def _philox_bits(xp: Any, k0: Array, k1: Array, shape: tuple[int, ...], stream: int) -> Array:
    if as_int("stream", stream, 0) >= 2**31:
        raise ValueError(f"`stream` must be below 2**31, got {stream}")
    size, device = _checked_size(math.prod(shape)), array_api_compat.device(k0)
    columns, rows = shape[-1] if shape else 1, math.prod(shape[:-1])
    blocks = -(-columns // 4)
    row = _counter(xp, rows, device)[:, None]
    fixed = (xp.asarray([[word]], dtype=xp.int32, device=device) for word in (stream, 0))
    words = philox.block(k0[..., None], k1[..., None], _counter(xp, blocks, device), row, *fixed)
    by_row = xp.reshape(xp.stack(words, axis=-1), (*k0.shape[:-1], rows, 4 * blocks))
    return xp.reshape(by_row[..., :columns], (*k0.shape[:-1], size))


def _mantissas(xp: Any, key: Array, shape: tuple[int, ...], precision: Precision, rng: Rng, stream: int) -> Array:
    """The mantissa bits of each element, int32 in [0, 2**m), along one last axis."""
    if precision not in MANTISSA_BITS:
        raise ValueError(f"`precision` must be one of {', '.join(map(repr, MANTISSA_BITS))}, got {precision!r}")
    drawn = _signed_bits(xp, key, shape, rng, stream)
    return (drawn >> MANTISSA_SHIFTS[precision]) & ((1 << MANTISSA_BITS[precision]) - 1)


def _uniform_of(xp: Any, k: Array, mantissa_bits: int) -> Array:
    scale = 2 ** (mantissa_bits + 1)
    return xp.astype(4 * k + (1 - scale), xp.float32) * (1.0 / scale)


def _erfinv(xp: Any, u: Array) -> Array:
    w = -xp.log1p(-u * u)
    central = _polynomial(ERFINV_CENTRAL, w - 2.5)
    tail = _polynomial(ERFINV_TAIL, xp.sqrt(w) - 3.0)
    return u * xp.where(w < 5.0, central, tail)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


@functools.cache
def narrow_normals(precision: Precision) -> np.ndarray:
    """The normal of every mantissa of a 16-bit dtype, float32: few enough to tabulate, hence equal everywhere."""
    mantissa_bits = MANTISSA_BITS[precision]
    mantissas = np.arange(2**mantissa_bits, dtype=np.int32)
    xp = array_api_compat.array_namespace(mantissas)
    erfinv = _erfinv(xp, _uniform_of(xp, mantissas, mantissa_bits))
    sqrt2 = round_to(np.asarray([SQRT2], dtype=np.float32), precision)
    return round_to(round_to(erfinv, precision) * sqrt2, precision)


def round_to(x: np.ndarray, precision: Precision) -> np.ndarray:
    """float32 `x` rounded to the nearest value of `precision`, ties to even, as float32."""
    if precision == "float32":
        return x
    if precision == "float16":
        return x.astype(np.float16).astype(np.float32)
    # NumPy has no bfloat16: round the upper half of the word.
    words = x.view(np.uint32)
    rounded = words + 0x7FFF + ((words >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _unsigned(xp: Any, words: Array) -> Array:
    return xp.astype(words, xp.uint32)


def _item(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
