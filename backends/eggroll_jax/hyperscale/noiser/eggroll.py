"""Low-rank noise, and the one implementation behind every noiser that perturbs."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import quax

from eggroll import EggrollConfig
from eggroll.fitness import shape_fitness
from eggroll.perturbation import draws_and_signs, factors_of, low_rank_draws
from eggroll.prng import MANTISSA_BITS
from eggroll.update import dense_sum, direction_scale, low_rank_sum

from ...direction import sum_in_chunks
from ...keys import fold_in, key_words
from ...noise import normal
from ...perturbed import PerturbedArray, materialise
from ..models.common import EMB_PARAM, EXCLUDED, MM_PARAM
from .base_noiser import FrozenNoiserParams, IterInfo, Noiser

__all__ = ["EggRoll"]

Array = jax.Array

# An update draws the noise of so many members of a parameter at a time that this holds it: 64 MiB.
_NUMBERS_HELD = 2**24


class EggRoll(Noiser):
    """``W + s * sigma / sqrt(rank) * A @ B.T`` for matrices, ``P + s * sigma * Z`` for the rest (arXiv 2511.16652).

    The other noisers change one thing each: `matrix_noise` and what is made of it, or the fitness shaping.
    """

    shaping = "zscore"

    @classmethod
    def init_noiser(cls, params: Any, sigma: float, lr: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        frozen, noiser_params = super().init_noiser(params, sigma, lr, *args, **options)
        if frozen.noise_reuse == 0:
            warnings.warn(
                "eggroll: `noise_reuse=0`, the default of HyperscaleES, draws the same noise in every generation; "
                "pass `noise_reuse=1` for noise that is new in each",
                UserWarning,
                stacklevel=2,
            )
        return frozen, noiser_params

    # What a member sees

    @classmethod
    def do_mm(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        return cls._with_matrix(lambda w, x: x @ w.T, frozen, noiser_params, param, base_key, iterinfo, x)

    @classmethod
    def do_Tmm(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        return cls._with_matrix(lambda w, x: x @ w, frozen, noiser_params, param, base_key, iterinfo, x)

    @classmethod
    def do_emb(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        return cls._with_matrix(lambda w, x: w[x], frozen, noiser_params, param, base_key, iterinfo, x)

    @classmethod
    def get_noisy_standard(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo
    ) -> Any:
        if iterinfo is None or frozen.freeze_nonlora:
            return param
        key, sign = cls._draw(frozen, base_key, iterinfo)
        noise = normal(key, param.shape, precision_of(param))
        return param + (sign * noiser_params["sigma"] * noise).astype(param.dtype)

    @classmethod
    def _with_matrix(
        cls,
        function: Any,
        frozen: FrozenNoiserParams,
        noiser_params: Any,
        param: Any,
        key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        if iterinfo is None:
            return function(param, x)
        key, sign = cls._draw(frozen, key, iterinfo)
        noise = cls.matrix_noise(frozen, key, param.shape, precision_of(param))
        weight = cls.perturbed_matrix(frozen, param, noise, sign * noiser_params["sigma"])
        # One row, looked up with an index without axes, is still a perturbed array.
        return materialise(quax.quaxify(function)(weight, x))

    @classmethod
    def _draw(cls, frozen: FrozenNoiserParams, base_key: Any, iterinfo: tuple[Any, Any]) -> tuple[Array, Array]:
        """The key of one member's draw, uint32 of shape ``(2,)``, and its sign."""
        epoch, thread = (jnp.asarray(number, jnp.int32) for number in iterinfo)
        draws, signs = draws_and_signs(thread[None], cls._config(frozen, _smallest(frozen)))
        return fold_in(fold_in(key_words(base_key), _life(frozen, epoch)), draws[0]), signs[0]

    # What differs between noisers

    @classmethod
    def matrix_noise(cls, frozen: FrozenNoiserParams, keys: Array, shape: tuple[int, int], precision: Any) -> Any:
        """The noise of a matrix ``(out, in)`` for keys of shape ``(..., 2)``."""
        (both,) = low_rank_draws(shape, frozen.rank)
        return factors_of([normal(keys, both.shape, precision)], shape[1])

    @classmethod
    def perturbed_matrix(cls, frozen: FrozenNoiserParams, param: Any, noise: Any, scale: Any) -> Any:
        """The matrix with its noise, as quax takes it; `scale` is sign times sigma."""
        scale = scale / math.sqrt(frozen.rank)
        return PerturbedArray.from_factors(param, noise.A, noise.B, scale, rows=(0,), columns=(1,))

    @classmethod
    def matrix_sum(cls, frozen: FrozenNoiserParams, coefficients: Array, noise: Any, shape: tuple[int, int]) -> Array:
        """``sum_i c_i * E_i / sigma`` over members: float32, shape ``(*stack, out, in)``."""
        return low_rank_sum(coefficients, noise) / math.sqrt(frozen.rank)

    @classmethod
    def finish(cls, frozen: FrozenNoiserParams, gradient: Any) -> Any:
        """The last word on the direction before the solver sees it."""
        return gradient

    # Fitness and update

    @classmethod
    def convert_fitnesses(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, raw_scores: Any, num_episodes_list: Any = None
    ) -> Any:
        if num_episodes_list is not None:
            raise ValueError("`num_episodes_list` must be None: members are weighted alike here")
        scores = jnp.asarray(raw_scores)
        if scores.ndim != 1:
            raise ValueError(f"`raw_scores` must have the shape (N,), one for each member, got {scores.shape}")
        return shape_fitness(scores, cls._config(frozen, len(scores)))

    @classmethod
    def do_updates(
        cls,
        frozen: FrozenNoiserParams,
        noiser_params: Any,
        params: Any,
        base_keys: Any,
        fitnesses: Any,
        iterinfos: Any,
        es_map: Any,
    ) -> tuple[Any, Any]:
        epochs, threads = (jnp.asarray(numbers, jnp.int32) for numbers in iterinfos)
        config = cls._config(frozen, len(threads))
        if epochs.shape != threads.shape or threads.ndim != 1:
            raise ValueError(f"`iterinfos` must be two arrays of N integers, got {epochs.shape} and {threads.shape}")
        weights = cls._weights(jnp.asarray(fitnesses), config)
        draws, signs = draws_and_signs(threads, config)
        coefficients = (weights * signs).astype(jnp.float32)
        lives = _life(frozen, epochs)

        def direction(param: Any, key: Any, kind: int) -> Array:
            if not _is_updated(frozen, kind):
                return jnp.zeros_like(param)
            words = _words(key)
            stack = words.ndim - 1
            layer = param.shape[stack:]
            is_matrix = kind in (MM_PARAM, EMB_PARAM)
            precision = precision_of(param)

            def noise(keys: Array) -> Any:
                if is_matrix:
                    return cls.matrix_noise(frozen, keys, layer, precision)
                return normal(keys, layer, precision)

            def sums(lives: Array, draws: Array, coefficients: Array) -> Array:
                spread = (-1,) + (1,) * stack
                drawn = noise(fold_in(fold_in(words, lives.reshape(spread)), draws.reshape(spread)))
                if is_matrix:
                    return cls.matrix_sum(frozen, coefficients, drawn, layer)
                return dense_sum(coefficients, drawn)

            of_member = sum(part.size for part in jax.tree.leaves(jax.eval_shape(noise, words)))
            total = sum_in_chunks(sums, (lives, draws, coefficients), max(_NUMBERS_HELD // max(of_member, 1), 1))
            scale = direction_scale(config, low_rank=False, sigma=noiser_params["sigma"])
            return (total * scale).astype(param.dtype)

        gradient = cls.finish(frozen, jax.tree.map(direction, params, base_keys, es_map))
        updates, opt_state = frozen.solver.update(gradient, noiser_params["opt_state"], params)
        # A solver may move what has no direction, by decay or momentum; what is left alone stays where it is.
        updates = jax.tree.map(
            lambda update, kind: update if _is_updated(frozen, kind) else jnp.zeros_like(update), updates, es_map
        )
        return {**noiser_params, "opt_state": opt_state}, optax.apply_updates(params, updates)

    @classmethod
    def _weights(cls, fitnesses: Array, config: EggrollConfig) -> Array:
        if fitnesses.shape != (config.population_size,):
            raise ValueError(
                f"`fitnesses` must have the shape ({config.population_size},), one for each of `iterinfos`, "
                f"got {fitnesses.shape}"
            )
        return fitnesses

    @classmethod
    def _config(cls, frozen: FrozenNoiserParams, members: int) -> EggrollConfig:
        """The same run in the core's words; HyperscaleES always pairs members."""
        return EggrollConfig(
            population_size=members,
            rank=frozen.rank,
            noise_lifetime=frozen.noise_reuse or None,
            fitness_shaping=cls.shaping,
            group_size=frozen.group_size,
            freeze_nonlora=frozen.freeze_nonlora,
            noise_dtype="param",
        )


def precision_of(param: Any) -> Any:
    """The reference draws in the parameter's own dtype."""
    name = str(jnp.dtype(param.dtype))
    return name if name in MANTISSA_BITS else "float32"


def _is_updated(frozen: FrozenNoiserParams, kind: int) -> bool:
    return kind != EXCLUDED and (kind in (MM_PARAM, EMB_PARAM) or not frozen.freeze_nonlora)


def _smallest(frozen: FrozenNoiserParams) -> int:
    """A population that the group divides: which draw a member has does not depend on how many there are."""
    return 2 * (frozen.group_size or 2)


def _life(frozen: FrozenNoiserParams, epoch: Array) -> Array:
    return epoch // frozen.noise_reuse if frozen.noise_reuse else jnp.zeros_like(epoch)


def _words(key: Any) -> Array:
    """Keys of one parameter, typed or not, as uint32 of shape ``(*stack, 2)``."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key)
    return jnp.asarray(key)
