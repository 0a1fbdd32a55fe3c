"""From weights and noise to the direction that an optimizer descends, in chunks of members.

With ``E_i = s_i * sigma / sqrt(rank) * A_i @ B_i.T`` (or ``s_i * sigma * Z_i``) and weights ``w_i``,

    reference:  g = -sqrt(N) * mean_i(w_i * E_i)
    unbiased:   g = -1 / (N * sigma**2) * sum_i w_i * E_i

(arXiv 2511.16652, section 4; the first is what HyperscaleES hands to its optimizer). The sum over the members of a
chunk is one ``(out, members * rank) @ (members * rank, in)`` product; the noise of a chunk is drawn again from its
keys and dropped, so memory does not depend on the population.
"""

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat

from .config import EggrollConfig, as_int
from .perturbation import (
    LowRank,
    dense_noise,
    draw_keys,
    draws_and_signs,
    low_rank_noise,
    noise_precision,
    stacked_keys,
)

__all__ = ["dense_sum", "direction", "direction_scale", "low_rank_sum", "weights_of_draws"]

Array = Any


def direction_scale(config: EggrollConfig, *, low_rank: bool, sigma: Any = None, rank: int | None = None) -> Any:
    """What ``sum_d c_d * noise_d`` is multiplied with to give the direction.

    ``noise_d`` is the unscaled noise of a draw (``A @ B.T`` or ``Z``) and ``c_d`` its signed weight, see
    `weights_of_draws`.

    Args:
        low_rank: whether the noise is ``A @ B.T``, which is divided by ``sqrt(rank)``.
        sigma: the sigma of the evaluation, where it differs from `config.sigma`; `rank` likewise.
    """
    sigma = config.sigma if sigma is None else sigma
    rank = config.rank if rank is None else rank
    members = config.population_size
    factor = -sigma / math.sqrt(members) if config.gradient_scale == "reference" else -1.0 / (members * sigma)
    return factor / math.sqrt(rank) if low_rank else factor


def weights_of_draws(weights: Array, signs: Array, config: EggrollConfig) -> Array:
    """The signed weight of each draw: ``s_i * w_i``, summed over the members that share the draw.

    Args:
        weights: floating point, shape ``(n,)``, of consecutive members, whole pairs if antithetic.
        signs: shape ``(n,)``, from `eggroll.perturbation.draws_and_signs`.

    Returns:
        Shape ``(n / 2,)`` for antithetic pairs, else ``(n,)``.
    """
    xp = array_api_compat.array_namespace(weights)
    signed = weights * xp.astype(signs, weights.dtype)
    return xp.sum(xp.reshape(signed, (-1, 2)), axis=1) if config.antithetic else signed


def low_rank_sum(coefficients: Array, noise: LowRank) -> Array:
    """``sum_d c_d * A_d @ B_d.T``, for each stacked layer one product over draws and columns.

    Args:
        coefficients: float32, shape ``(draws,)``.
        noise: `A` of shape ``(draws, *stack, out, rank)``, `B` of shape ``(draws, *stack, in, rank)``.

    Returns:
        float32, shape ``(*stack, out, in)``.
    """
    xp = array_api_compat.array_namespace(coefficients)
    stack = noise.A.ndim - 3
    c = xp.reshape(coefficients, (-1,) + (1,) * (stack + 2))
    return xp.matmul(_columns(xp, noise.A * c, stack), xp.matrix_transpose(_columns(xp, noise.B, stack)))


def dense_sum(coefficients: Array, noise: Array) -> Array:
    """``sum_d c_d * Z_d``.

    Args:
        coefficients: float32, shape ``(draws,)``.
        noise: float32, shape ``(draws, *shape)``.

    Returns:
        float32, shape `shape`.
    """
    xp = array_api_compat.array_namespace(coefficients)
    flat = xp.reshape(noise, (noise.shape[0], -1))
    return xp.reshape(xp.matmul(coefficients[None, :], flat), noise.shape[1:])


def direction(
    parameter_key: Array,
    shape: Sequence[int],
    generation: Any,
    weights: Array,
    config: EggrollConfig,
    *,
    low_rank: bool | None = None,
    stack_axes: int = 0,
    dtype: str = "float32",
    chunk_size: int | None = None,
) -> Array:
    """The direction of one parameter in one generation, to be descended.

    Args:
        parameter_key: uint32, shape ``(2,)``, the parameter's own key; its library and device compute.
        shape: of the whole parameter.
        generation: the generation that was evaluated.
        weights: shape ``(population_size,)``, from `eggroll.fitness.shape_fitness`.
        low_rank: whether the noise is low rank; by default for matrices (two axes after the stacked ones).
        stack_axes: how many leading axes stack layers.
        dtype: the name of the parameter's dtype, which matters for ``noise_dtype="param"``.
        chunk_size: members whose noise is held at a time; the whole population by default. Rounded up to whole
            pairs.

    Returns:
        float32, shape `shape`.

    Raises:
        TypeError, ValueError: `weights`, `generation` or `chunk_size` breaks its rule.

    Example:
        >>> import numpy as np
        >>> from eggroll import prng
        >>> weights = np.asarray([1.0, -1.0, 0.5, -0.5])
        >>> direction(prng.key(0), (3, 2), 0, weights, EggrollConfig(population_size=4)).shape
        (3, 2)
    """
    xp = array_api_compat.array_namespace(parameter_key)
    device = array_api_compat.device(parameter_key)
    if tuple(weights.shape) != (config.population_size,):
        raise ValueError(
            f"`weights` must have the shape ({config.population_size},), one value for each member, "
            f"got {tuple(weights.shape)}"
        )
    layer = tuple(shape[stack_axes:])
    if low_rank is None:
        low_rank = len(layer) == 2
    total = xp.zeros(tuple(shape), dtype=xp.float32, device=device)
    if not low_rank and config.freeze_nonlora:
        return total
    keys = stacked_keys(parameter_key, tuple(shape[:stack_axes]))
    precision = noise_precision(config, dtype)
    step = config.population_size if chunk_size is None else as_int("chunk_size", chunk_size, 1)
    step += step % 2 if config.antithetic else 0
    for start in range(0, config.population_size, step):
        stop = min(start + step, config.population_size)
        draws, signs = draws_and_signs(xp.arange(start, stop, dtype=xp.int32, device=device), config)
        coefficients = xp.astype(weights_of_draws(weights[start:stop], signs, config), xp.float32)
        chunk_keys = draw_keys(keys, generation, draws[:: config.members_per_draw], config)
        if low_rank:
            factors = low_rank_noise(chunk_keys, layer, config.rank, precision, config.rng)
            total = total + low_rank_sum(coefficients, factors)
        else:
            total = total + dense_sum(coefficients, dense_noise(chunk_keys, layer, precision, config.rng))
    # NumPy 1 widens a number of shape () that is multiplied with a float.
    return xp.astype(total * direction_scale(config, low_rank=low_rank), xp.float32)


def _columns(xp: Any, factor: Array, stack: int) -> Array:
    """``(draws, *stack, features, rank)`` as ``(*stack, features, draws * rank)``."""
    axes = (*range(1, stack + 2), 0, stack + 2)
    moved = xp.permute_dims(factor, axes)
    return xp.reshape(moved, (*moved.shape[: stack + 1], math.prod(moved.shape[stack + 1 :])))
