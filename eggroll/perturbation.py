"""Which draw a member gets, with which sign, and the noise that comes of it.

For a matrix parameter ``W`` of shape ``(out_features, in_features)`` member ``i`` sees

    W_i = W + s_i * sigma / sqrt(rank) * A_i @ B_i.T

and for any other parameter ``P_i = P + s_i * sigma * Z_i`` (arXiv 2511.16652, section 4). This module draws
``A_i``, ``B_i`` and ``Z_i``, unscaled; the scale, which holds sign and sigma, is a number for each member.

A parameter's noise depends on its key, the generation and the member alone: nothing is stored, everything can be
drawn again, in any chunks, on any backend.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from . import prng
from .config import EggrollConfig, as_int

__all__ = [
    "Draw",
    "LowRank",
    "canonical_order",
    "dense_noise",
    "draw_epoch",
    "draw_keys",
    "draws_and_signs",
    "factors_of",
    "low_rank_draws",
    "low_rank_noise",
    "member_parameter",
    "noise_precision",
    "parameter_keys",
    "stacked_keys",
]

Array = Any


class LowRank(NamedTuple):
    """The factors of the noise of some members: for each of them ``E = A @ B.T`` is the unscaled noise."""

    A: Array
    """float32, shape ``(members, *stack, out_features, rank)``, standard normal."""
    B: Array
    """float32, shape ``(members, *stack, in_features, rank)``, standard normal."""


def canonical_order(names: Iterable[str]) -> list[str]:
    """Dotted parameter names in the order in which keys are handed out: by their components, as strings.

    This is the order in which JAX flattens nested dictionaries.

    Example:
        >>> canonical_order(["2.bias", "10.bias", "0.weight", "0.bias"])
        ['0.bias', '0.weight', '10.bias', '2.bias']
    """
    return sorted(names, key=lambda name: name.split("."))


def parameter_keys(base_key: Array, names: Iterable[str]) -> dict[str, Array]:
    """The key of every parameter of a model: ``split(base_key, n_params)`` in canonical order.

    Args:
        base_key: uint32, shape ``(2,)``, the key of the run.
        names: the dotted names of all parameters, frozen ones included, so that freezing one leaves the noise of
            the others as it was.

    Returns:
        Key by name, each uint32 of shape ``(2,)``, in canonical order.
    """
    ordered = canonical_order(names)
    if len(set(ordered)) != len(ordered):
        raise ValueError(f"`names` must be unique, got {ordered}")
    if not ordered:
        return {}
    keys = prng.split(base_key, len(ordered))
    return {name: keys[index, ...] for index, name in enumerate(ordered)}


def stacked_keys(parameter_key: Array, stack: Sequence[int]) -> Array:
    """One key for each layer of a parameter that stacks layers along leading axes of lengths `stack`.

    Returns:
        uint32, shape ``(*stack, 2)``.
    """
    for length in stack:
        parameter_key = prng.split(parameter_key, length)
    return parameter_key


def draws_and_signs(members: Array, config: EggrollConfig) -> tuple[Array, Array]:
    """Which draw each member uses, and with which sign.

    Antithetic members ``2 d`` and ``2 d + 1`` use draw ``d`` with signs +1 and -1; independent members use their
    own. With `baseline` shaping the first two members of each group are not perturbed: their sign is 0.

    Args:
        members: int32, shape ``(n,)``, member indices.

    Returns:
        draws, int32, shape ``(n,)``, and signs, float32, shape ``(n,)``.
    """
    xp = array_api_compat.array_namespace(members)
    if config.antithetic:
        draws = members // 2
        signs = xp.astype(1 - 2 * (members % 2), xp.float32)
    else:
        draws = members
        signs = xp.ones_like(members, dtype=xp.float32)
    if config.fitness_shaping == "baseline":
        signs = signs * xp.astype(members % config.group >= 2, xp.float32)
    return draws, signs


def draw_epoch(generation: Any, config: EggrollConfig) -> Any:
    """How often draws have been replaced by new ones before a generation: what is folded into keys for it.

    Args:
        generation: as in `draw_keys`.
    """
    is_array = hasattr(generation, "dtype") and not isinstance(generation, np.generic)
    if not is_array:
        generation = as_int("generation", generation, 0)
    if config.noise_lifetime is None:
        return 0
    # A lifetime that the array's dtype does not hold would be wrapped, and is over in no generation that it holds.
    if is_array and array_api_compat.array_namespace(generation).iinfo(generation.dtype).max < config.noise_lifetime:
        return 0
    epoch = generation // config.noise_lifetime
    if isinstance(epoch, int) and epoch >= 2**32:
        limit = f"2**32 times the `noise_lifetime` of {config.noise_lifetime}"
        raise ValueError(f"`generation` must be below {limit}, got {generation}")
    return epoch


def draw_keys(parameter_key: Array, generation: Any, draws: Array, config: EggrollConfig) -> Array:
    """The keys of some draws of a parameter in a generation.

    Args:
        parameter_key: uint32, shape ``(*stack, 2)``.
        generation: a non-negative int, or an integer array of shape ``()``; at most 2**32 different draws in
            time, so below ``2**32 * noise_lifetime``.
        draws: int32, shape ``(n,)``.

    Returns:
        uint32, shape ``(n, *stack, 2)``.
    """
    xp = array_api_compat.array_namespace(parameter_key)
    generation_key = prng.fold_in(parameter_key, draw_epoch(generation, config))
    stack = parameter_key.ndim - 1
    return prng.fold_in(generation_key, xp.reshape(draws, (-1,) + (1,) * stack))


class Draw(NamedTuple):
    """One array that is drawn from a key."""

    shape: tuple[int, ...]
    stream: int = 0
    """Which of a key's draws, see `eggroll.prng.bits`."""


def low_rank_draws(shape: Sequence[int], rank: int, rng: prng.Rng = "threefry") -> tuple[Draw, ...]:
    """What is drawn from a key for the factors of a matrix; `factors_of` makes them of it.

    Threefry draws both as one array, ``(in_features + out_features, rank)``, as the reference does. Philox draws
    ``B.T`` and ``A.T``, each from its own stream: the four numbers of a block are neighbouring features whatever the
    rank is, which is how a kernel that draws a tile of a factor wants them.

    Args:
        shape: ``(out_features, in_features)``.
        rank: columns of each factor.
        rng: the generator.
    """
    out_features, in_features = shape
    if rng == "philox":
        return Draw((rank, in_features), 0), Draw((rank, out_features), 1)
    return (Draw((in_features + out_features, rank)),)


def factors_of(drawn: Sequence[Array], in_features: int) -> LowRank:
    """The factors from what was drawn for them, arrays of shapes ``(..., *draw.shape)``, see `low_rank_draws`."""
    if len(drawn) == 2:
        B, A = (array_api_compat.array_namespace(factor).matrix_transpose(factor) for factor in drawn)
        return LowRank(A=A, B=B)
    (both,) = drawn
    return LowRank(A=both[..., in_features:, :], B=both[..., :in_features, :])


def low_rank_noise(
    keys: Array, shape: Sequence[int], rank: int, precision: prng.Precision = "float32", rng: prng.Rng = "threefry"
) -> LowRank:
    """The factors of some draws of a matrix parameter; `low_rank_draws` says which numbers they are.

    Args:
        keys: uint32, shape ``(n, *stack, 2)``, from `draw_keys`.
        shape: ``(out_features, in_features)`` of one layer: the lengths of the parameter's last two axes.
        rank: columns of each factor.
        precision: the dtype to draw in.
        rng: the generator.
    """
    draws = low_rank_draws(shape, rank, rng)
    drawn = [prng.normal(keys, draw.shape, precision, rng=rng, stream=draw.stream) for draw in draws]
    return factors_of(drawn, shape[1])


def dense_noise(
    keys: Array, shape: Sequence[int], precision: prng.Precision = "float32", rng: prng.Rng = "threefry"
) -> Array:
    """The full noise of some draws of any parameter, drawn as one vector, whatever the shape.

    Args:
        keys: uint32, shape ``(n, *stack, 2)``, from `draw_keys`.
        shape: of one layer.
        precision: the dtype to draw in.
        rng: the generator.

    Returns:
        float32, shape ``(n, *stack, *shape)``, standard normal.
    """
    xp = array_api_compat.array_namespace(keys)
    flat = prng.normal(keys, (math.prod(shape),), precision, rng=rng)
    return xp.reshape(flat, (*flat.shape[:-1], *shape))


def noise_precision(config: EggrollConfig, dtype: str) -> prng.Precision:
    """The dtype to draw in for a parameter whose dtype has the name `dtype` (``"float32"``, ``"bfloat16"``, ...)."""
    if config.noise_dtype == "param" and dtype in prng.MANTISSA_BITS:
        return dtype  # type: ignore[return-value]
    return "float32"


def member_parameter(
    parameter: Array,
    parameter_key: Array,
    generation: int,
    member: int,
    config: EggrollConfig,
    *,
    low_rank: bool | None = None,
    stack_axes: int = 0,
) -> Array:
    """One parameter as one member sees it, materialised: the oracle of every faster way to apply it.

    Args:
        parameter: floating point, shape ``(*stack, ...)``.
        parameter_key: uint32, shape ``(2,)``, the parameter's own key.
        member: in [0, population_size).
        low_rank: whether the noise is low rank; by default for matrices (two axes after the stacked ones).
        stack_axes: how many leading axes stack layers.

    Returns:
        Shape and dtype of `parameter`.

    Raises:
        TypeError, ValueError: `parameter`, `generation` or `member` breaks its rule.
    """
    xp = array_api_compat.array_namespace(parameter)
    if xp.isdtype(parameter.dtype, ("integral", "bool")):
        raise TypeError(f"`parameter` must be floating point, got {parameter.dtype}")
    if as_int("member", member, 0) >= config.population_size:
        raise ValueError(f"`member` must be below the population of {config.population_size}, got {member}")
    shape = parameter.shape[stack_axes:]
    if low_rank is None:
        low_rank = len(shape) == 2
    if not low_rank and config.freeze_nonlora:
        return parameter
    members = xp.asarray([member], dtype=xp.int32, device=array_api_compat.device(parameter))
    draws, signs = draws_and_signs(members, config)
    keys = draw_keys(stacked_keys(parameter_key, parameter.shape[:stack_axes]), generation, draws, config)
    precision = noise_precision(config, str(parameter.dtype).rpartition(".")[2])
    if low_rank:
        A, B = low_rank_noise(keys, shape, config.rank, precision, config.rng)
        noise = xp.matmul(A, xp.matrix_transpose(B)) / math.sqrt(config.rank)
    else:
        noise = dense_noise(keys, shape, precision, config.rng)
    return parameter + xp.astype(signs[0] * config.sigma * noise[0, ...], parameter.dtype)
