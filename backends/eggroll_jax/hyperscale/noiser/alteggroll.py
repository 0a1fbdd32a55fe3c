"""EGGROLL with the update of integer training: the signs of the factors instead of the factors."""

from typing import Any

import jax
import jax.numpy as jnp

from eggroll.perturbation import LowRank

from . import eggroll
from .base_noiser import FrozenNoiserParams

__all__ = ["EggRoll"]


class EggRoll(eggroll.EggRoll):
    """Evaluates with ``A @ B.T`` and updates with ``sign(A) @ sign(B).T``, at the same scale."""

    @classmethod
    def matrix_sum(
        cls, frozen: FrozenNoiserParams, coefficients: jax.Array, noise: Any, shape: tuple[int, int]
    ) -> jax.Array:
        return super().matrix_sum(frozen, coefficients, LowRank(jnp.sign(noise.A), jnp.sign(noise.B)), shape)
