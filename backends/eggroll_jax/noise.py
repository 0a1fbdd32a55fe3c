"""Normal numbers from keys, equal to the core's `eggroll.prng.normal` to 4 ULP, fused with the draw of their bits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eggroll.prng import MANTISSA_BITS, MANTISSA_SHIFTS, SQRT2, Precision, Rng, round_to

from .keys import Draws, parted, random_bits

__all__ = ["normal", "normals", "uniform01"]

Array = jax.Array


def normals(
    keys: Array, draws: Sequence[Draws], precision: Precision = "float32", rng: Rng = "threefry"
) -> list[Array]:
    """Standard normal numbers of several draws at once.

    Args:
        keys: uint32, shape ``(..., keys, 2)``.
        draws: what is drawn from the keys in turn.
        precision: the dtype to draw in, see `eggroll.prng.normal`.
        rng: the generator.

    Returns:
        For each entry of `draws` float32, shape ``(..., number of keys, *shape)``.
    """
    # XLA repeats cheap producers in each consumer, and takes twenty rounds of integer arithmetic for cheap; on CPU it
    # drops `optimization_barrier` before that. It never repeats a division, so divide by a 1 that it cannot foresee.
    numbers = _normal(random_bits(keys, draws, rng), precision)
    return parted(numbers / (np.float32(1) + np.float32(0) * numbers), draws, rng)


def normal(keys: Array, shape: Sequence[int], precision: Precision = "float32") -> Array:
    """Standard normal numbers for each key: `keys` of shape ``(..., 2)`` give ``(..., *shape)``, float32."""
    (drawn,) = normals(keys[..., None, :], [Draws(1, tuple(shape))], precision)
    return drawn.reshape(*keys.shape[:-1], *shape)


def uniform01(keys: Array, shape: Sequence[int]) -> Array:
    """Uniform float32 numbers on [0, 1) for each key, shape ``(..., *shape)``."""
    draws = [Draws(1, tuple(shape))]
    (bits,) = parted(random_bits(keys[..., None, :], draws), draws)
    return _unit(bits >> np.uint32(9)).reshape(*keys.shape[:-1], *shape)


def _unit(mantissa: Array) -> Array:
    """23 mantissa bits as a float32 on [0, 1)."""
    return lax.bitcast_convert_type(mantissa | np.uint32(0x3F800000), np.float32) - np.float32(1)


def _normal(bits: Array, precision: Precision) -> Array:
    if precision == "float32":
        low = np.nextafter(np.float32(-1), np.float32(0))
        u = jnp.maximum(low, _unit(bits >> np.uint32(9)) * (np.float32(1) - low) + low)
        return np.float32(SQRT2) * lax.erf_inv(u)
    # The reference draws 16-bit floats from the low 8 or 16 bits and rounds erfinv and the product to the dtype.
    mantissa_bits = MANTISSA_BITS[precision]
    k = ((bits >> np.uint32(MANTISSA_SHIFTS[precision])) & np.uint32(2**mantissa_bits - 1)).astype(np.int32)
    scale = 2 ** (mantissa_bits + 1)
    u = (4 * k + (1 - scale)).astype(np.float32) * np.float32(1 / scale)
    sqrt2 = round_to(np.asarray([SQRT2], dtype=np.float32), precision)[0]
    return _round(_round(lax.erf_inv(u), precision) * sqrt2, precision)


def _round(x: Array, precision: Precision) -> Array:
    """float32 rounded to a narrow precision: `reduce_precision`, since XLA may drop a cast there and back."""
    exponent_bits = {"bfloat16": 8, "float16": 5}[precision]
    return lax.reduce_precision(x, exponent_bits, MANTISSA_BITS[precision])
