"""Sparse noise: a matrix is perturbed at as many random places as its longer side is long."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...keys import split
from ...noise import normal, uniform01
from .base_noiser import FrozenNoiserParams
from .eggroll import EggRoll

__all__ = ["Sparse"]

Array = jax.Array


class SparseNoise(NamedTuple):
    """Entries of a matrix; those that fall on the same place add up."""

    places: Array
    """int32, shape ``(..., k)``: indices into the flattened matrix."""
    values: Array
    """float32, shape ``(..., k)``, standard normal."""


class Sparse(EggRoll):
    """``k = max(out, in)`` normal entries at uniformly random places of each matrix.

    The mean over members is multiplied by ``k / (out * in)``, the share of places that a member perturbs. A member's
    matrix is formed: this noiser is for comparison, not for speed.
    """

    @classmethod
    def matrix_noise(cls, frozen: FrozenNoiserParams, keys: Array, shape: tuple[int, int], precision: Any) -> Any:
        where, what = jnp.moveaxis(split(keys, 2), -2, 0)
        entries = (max(shape),)
        places = jnp.floor(uniform01(where, entries) * math.prod(shape)).astype(jnp.int32)
        return SparseNoise(places, normal(what, entries, precision))

    @classmethod
    def perturbed_matrix(cls, frozen: FrozenNoiserParams, param: Any, noise: Any, scale: Any) -> Any:
        return param + _scattered(noise.places, scale * noise.values, param.shape).astype(param.dtype)

    @classmethod
    def matrix_sum(cls, frozen: FrozenNoiserParams, coefficients: Array, noise: Any, shape: tuple[int, int]) -> Array:
        weighted = noise.values * coefficients.reshape(-1, *[1] * (noise.values.ndim - 1))

        def of_layer(places: Array, values: Array) -> Array:
            return _scattered(places.reshape(-1), values.reshape(-1), shape)

        scatter = of_layer
        for _ in range(noise.values.ndim - 2):
            scatter = jax.vmap(scatter, in_axes=1)
        return scatter(noise.places, weighted) * (max(shape) / math.prod(shape))


def _scattered(places: Array, values: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(math.prod(shape), values.dtype).at[places].add(values).reshape(shape)
