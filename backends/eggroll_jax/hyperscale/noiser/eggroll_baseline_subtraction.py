"""EGGROLL scored against an unperturbed member of each group, with a bound on the step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eggroll import EggrollConfig
from eggroll.config import as_positive_float

from .base_noiser import FrozenNoiserParams
from .eggroll import EggRoll

__all__ = ["EggRollBS"]


class EggRollBS(EggRoll):
    """Members with ``thread_id % group_size`` of 0 and 1 are not perturbed; the first is the baseline of its group.

    `convert_fitnesses` gives one weight for each place in a group, averaged over groups, and `do_updates` takes
    those or one for each member.
    """

    shaping = "baseline"

    @classmethod
    def init_noiser(
        cls, params: Any, sigma: float, lr: Any, *args: Any, trust_region_norm: float | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """As for every noiser, and `trust_region_norm`: the global norm that the direction is clipped to.

        `group_size` has to be given: which members are not perturbed depends on it, and a member that is evaluated
        does not know how many there are.
        """
        frozen, noiser_params = super().init_noiser(params, sigma, lr, *args, **options)
        if frozen.group_size == 0:
            raise ValueError("`group_size` must be given, it decides which members are not perturbed, got 0")
        cls._config(frozen, 2 * frozen.group_size)  # checks that such groups can be
        if trust_region_norm is not None:
            trust_region_norm = as_positive_float("trust_region_norm", trust_region_norm)
        return dataclasses.replace(frozen, trust_region_norm=trust_region_norm), noiser_params

    @classmethod
    def convert_fitnesses(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, raw_scores: Any, num_episodes_list: Any = None
    ) -> Any:
        weights = super().convert_fitnesses(frozen, noiser_params, raw_scores, num_episodes_list)
        return weights[: frozen.group_size]

    @classmethod
    def finish(cls, frozen: FrozenNoiserParams, gradient: Any) -> Any:
        if frozen.trust_region_norm is None:
            return gradient
        return optax.clip_by_global_norm(frozen.trust_region_norm).update(gradient, optax.EmptyState())[0]

    @classmethod
    def _weights(cls, fitnesses: jax.Array, config: EggrollConfig) -> jax.Array:
        if fitnesses.shape == (config.group,):
            fitnesses = jnp.tile(fitnesses, config.population_size // config.group)
        return super()._weights(fitnesses, config)
