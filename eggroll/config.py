"""The hyperparameters of one run: one frozen dataclass, validated once."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

__all__ = ["EggrollConfig"]

SHAPINGS = ("zscore", "group_zscore", "centered_rank", "sign", "baseline", "raw")
GRADIENT_SCALES = ("reference", "unbiased")
NOISE_DTYPES = ("float32", "param")
RNGS = ("threefry", "philox")

FitnessShaping = str | Callable[[Any], Any]


def as_int(name: str, value: Any, minimum: int) -> int:
    """`value` as an int not below `minimum`, or an error that names the argument, the rule and the value."""
    rule = {0: "a non-negative int", 1: "a positive int"}.get(minimum, f"an int of at least {minimum}")
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be {rule}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be {rule}, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}")
    return number


def as_positive_float(name: str, value: Any) -> float:
    """`value` as a positive finite float, or an error that names the argument, the rule and the value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a positive finite number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{name}` must be a positive finite number, got {value!r}")
    return number


def as_bool(name: str, value: Any) -> bool:
    """`value` if it is a bool, or an error that names the argument, the rule and the value."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool, got {value!r}")
    return value


def as_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`, or an error that names the argument, the rule and the value."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def as_size(name: str, value: Any) -> Any:
    """`value`, how many at a time: a positive int, ``"auto"`` or None, or an error that names the argument."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"`{name}` must be a positive int, 'auto' or None, got {value!r}")
        return value
    return None if value is None else as_int(name, value, 1)


@dataclass(frozen=True)
class EggrollConfig:
    """What defines an EGGROLL run besides its model, its fitness, its seed and its optimizer.

    Attributes:
        population_size: members evaluated in one generation, at least 2 and below 2**31; even if `antithetic`.
        sigma: scale of the perturbation, positive. For a matrix the perturbation is
            ``sign * sigma / sqrt(rank) * A @ B.T``, for any other parameter ``sign * sigma * Z``
            (arXiv 2511.16652, section 4).
        rank: columns of the factors ``A`` and ``B``, at least 1.
        antithetic: members ``2 i`` and ``2 i + 1`` share a draw with signs +1 and -1.
        noise_lifetime: generations that one draw lives, at least 1; `None` keeps the first draw for ever.
        fitness_shaping: how fitness becomes weights: ``"zscore"``, ``"group_zscore"``, ``"centered_rank"``,
            ``"sign"``, ``"baseline"``, ``"raw"``, or a callable from the fitness of all members, shape
            ``(population_size,)``, to as many weights. See `eggroll.fitness`.
        group_size: consecutive members that are normalised together; 0 means the whole population. Has to
            divide `population_size`.
        freeze_nonlora: perturb and update matrices only.
        gradient_scale: ``"reference"`` for ``-sqrt(N) * mean(w * E)`` or ``"unbiased"`` for
            ``-mean(w * E) / sigma**2``, the evolution strategies estimate of the gradient.
        noise_dtype: ``"float32"`` draws in float32 and casts; ``"param"`` draws in the parameter's own dtype,
            as the reference does, with the fewer distinct values that a narrow dtype has.
        rng: what the noise is drawn with, ``"threefry"`` as in the reference and in `jax.random`, or ``"philox"``,
            which costs a GPU less. Keys, and what is random in a model, stay with Threefry. See `eggroll.prng`.

    Raises:
        TypeError, ValueError: an argument breaks its rule; the message names argument, rule and value.

    Example:
        >>> EggrollConfig(population_size=8, rank=2).draws
        4
        >>> EggrollConfig(rank=0)
        Traceback (most recent call last):
        ...
        ValueError: `rank` must be a positive int, got 0
    """

    population_size: int = 256
    sigma: float = 0.1
    rank: int = 1
    antithetic: bool = True
    noise_lifetime: int | None = 1
    fitness_shaping: FitnessShaping = "zscore"
    group_size: int = 0
    freeze_nonlora: bool = False
    gradient_scale: Literal["reference", "unbiased"] = "reference"
    noise_dtype: Literal["float32", "param"] = "float32"
    rng: Literal["threefry", "philox"] = "threefry"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("population_size", as_int("population_size", self.population_size, 2))
        put("sigma", as_positive_float("sigma", self.sigma))
        put("rank", as_int("rank", self.rank, 1))
        as_bool("antithetic", self.antithetic)
        if self.noise_lifetime is not None:
            put("noise_lifetime", as_int("noise_lifetime", self.noise_lifetime, 1))
        if not callable(self.fitness_shaping):
            as_choice("fitness_shaping", self.fitness_shaping, SHAPINGS)
        put("group_size", as_int("group_size", self.group_size, 0))
        as_bool("freeze_nonlora", self.freeze_nonlora)
        as_choice("gradient_scale", self.gradient_scale, GRADIENT_SCALES)
        as_choice("noise_dtype", self.noise_dtype, NOISE_DTYPES)
        as_choice("rng", self.rng, RNGS)
        self._check_population()

    def _check_population(self) -> None:
        if self.population_size >= 2**31:
            raise ValueError(f"`population_size` must be below 2**31, got {self.population_size}")
        if self.antithetic and self.population_size % 2:
            raise ValueError(f"`population_size` must be even with antithetic pairs, got {self.population_size}")
        if self.group_size and self.population_size % self.group_size:
            raise ValueError(
                f"`group_size` must divide the population of {self.population_size}, got {self.group_size}"
            )
        if self.fitness_shaping == "sign" and not self.antithetic:
            raise ValueError("`fitness_shaping` 'sign' compares antithetic pairs: it needs `antithetic=True`")
        if self.fitness_shaping == "group_zscore" and self.group == 1:
            raise ValueError("`group_size` must be at least 2 with `fitness_shaping` 'group_zscore', got 1")
        if self.fitness_shaping == "baseline":
            if self.group < 3:
                raise ValueError(
                    "`group_size` must be at least 3 with `fitness_shaping` 'baseline', whose first two "
                    f"members of a group are not perturbed, got {self.group}"
                )
            if self.antithetic and self.group % 2:
                raise ValueError(
                    "`group_size` must be even with `fitness_shaping` 'baseline' and antithetic pairs, "
                    f"got {self.group}"
                )

    @property
    def group(self) -> int:
        """Members that are normalised together: `group_size`, or the whole population where that is 0."""
        return self.group_size or self.population_size

    @property
    def members_per_draw(self) -> int:
        """Consecutive members that share a draw: 2 for antithetic pairs, else 1."""
        return 2 if self.antithetic else 1

    @property
    def draws(self) -> int:
        """Different draws in one generation: one for each pair, or one for each member."""
        return self.population_size // self.members_per_draw
