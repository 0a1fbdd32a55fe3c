"""Full-rank evolution strategies: dense noise for every parameter (Salimans et al., arXiv 1703.03864)."""

from typing import Any

import jax

from eggroll.update import dense_sum

from ...noise import normal
from .base_noiser import FrozenNoiserParams
from .eggroll import EggRoll

__all__ = ["OpenES"]


class OpenES(EggRoll):
    """``W + s * sigma * Z``, formed for each member."""

    @classmethod
    def matrix_noise(cls, frozen: FrozenNoiserParams, keys: jax.Array, shape: tuple[int, int], precision: Any) -> Any:
        return normal(keys, shape, precision)

    @classmethod
    def perturbed_matrix(cls, frozen: FrozenNoiserParams, param: Any, noise: Any, scale: Any) -> Any:
        return param + (scale * noise).astype(param.dtype)

    @classmethod
    def matrix_sum(
        cls, frozen: FrozenNoiserParams, coefficients: jax.Array, noise: Any, shape: tuple[int, int]
    ) -> jax.Array:
        return dense_sum(coefficients, noise)
