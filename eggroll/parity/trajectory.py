"""A training run of an MLP that every backend can replay, and what replaying it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eggroll import EggrollConfig
from eggroll.prng import Rng

from .models import Model, initial, mlp
from .report import InexpressibleError

__all__ = ["CORE_NOISERS", "LOW_RANK_NOISERS", "Replay", "Trajectory", "random_trajectory"]

LOW_RANK_NOISERS = ("eggroll", "eggrollbs")
# The others' draws or update rules only `eggroll.jax.hyperscale` has.
CORE_NOISERS = (*LOW_RANK_NOISERS, "open_es")


@dataclass(frozen=True)
class Trajectory:
    """One training run, in the words of the recorded format.

    Attributes:
        name: what the table calls it.
        noiser: ``"eggroll"``, ``"open_es"`` (full rank), ``"eggrollbs"`` (baseline shaping), ``"alteggroll"`` (sign
            update) or ``"sparse"``.
        solver, solver_options: an optax optimizer and its keyword arguments apart from the learning rate.
        noise_reuse: generations that a draw lives; 0 for ever.
        group: consecutive members that are normalised together, 0 for all; freeze: matrices alone are trained.
        rng: what draws the noise; the recorded format has no word for it, all of its runs are Threefry's.
        trust_region: the global norm to which the direction is clipped, or None.
        dtype: of parameters and inputs, ``"float32"`` or ``"bfloat16"``.
        task: the target, ``"two"`` for 2.0 or ``"sin"`` for the sum of the sines of the inputs.
        key: uint32, shape ``(2,)``, the run's base key.
        init: float32 parameters by dotted name, ``<layer>.weight`` (out, in) and ``<layer>.bias``.
        inputs: float32, shape ``(generations, population_size, in_dim)``: one row for each member.
    """

    name: str
    noiser: str
    solver: str
    solver_options: Mapping[str, Any]
    rank: int
    population_size: int
    widths: tuple[int, ...]
    noise_reuse: int
    group: int
    freeze: bool
    activation: str
    sigma: float
    learning_rate: float
    bias: bool
    dtype: str
    task: str
    trust_region: float | None
    key: np.ndarray
    init: Mapping[str, np.ndarray]
    inputs: np.ndarray
    rng: Rng = "threefry"

    @property
    def generations(self) -> int:
        return len(self.inputs)

    @property
    def low_rank(self) -> bool:
        """Whether matrices get low-rank noise, or dense noise as everything else."""
        return self.noiser in LOW_RANK_NOISERS

    @property
    def model(self) -> Model:
        return mlp(self.widths, self.activation, self.bias)

    def config(self) -> EggrollConfig:
        """The hyperparameters in our words: the reference always has pairs and draws in the parameter's dtype."""
        if self.noiser not in CORE_NOISERS:
            raise InexpressibleError(f"the {self.noiser!r} noiser needs eggroll.jax.hyperscale")
        if self.widths[-1] != 1:
            raise InexpressibleError(f"the format defines the fitness of one output, not of {self.widths[-1]}")
        try:
            return EggrollConfig(
                population_size=self.population_size,
                sigma=self.sigma,
                rank=self.rank,
                noise_lifetime=self.noise_reuse or None,
                fitness_shaping="baseline" if self.noiser == "eggrollbs" else "zscore",
                group_size=self.group,
                freeze_nonlora=self.freeze,
                noise_dtype="param",
                rng=self.rng,
            )
        except ValueError as error:
            raise InexpressibleError(str(error)) from None

    def target(self, inputs: np.ndarray) -> np.ndarray:
        """What the outputs for `inputs`, shape ``(..., in_dim)``, should be: float32, shape ``(..., 1)``."""
        if self.task == "sin":
            return np.sin(inputs).sum(axis=-1, keepdims=True, dtype=np.float32)
        return np.full((*inputs.shape[:-1], 1), 2.0, dtype=np.float32)


@dataclass(frozen=True)
class Replay:
    """What a run gave; float32.

    Attributes:
        outputs: shape ``(generations, population_size, out_dim)``.
        raw: shape ``(generations, population_size)``, ``-(output - target)**2``.
        first, last: parameters by dotted name after the first and after the last generation.
    """

    outputs: np.ndarray
    raw: np.ndarray
    first: Mapping[str, np.ndarray]
    last: Mapping[str, np.ndarray]


def random_trajectory(
    rng: np.random.Generator,
    name: str = "training",
    *,
    widths: tuple[int, ...] = (3, 8, 1),
    population_size: int = 32,
    generations: int = 10,
    bias: bool = True,
    **options: Any,
) -> Trajectory:
    """A run with random parameters, key and inputs; `options` are the other fields of `Trajectory`."""
    defaults: dict[str, Any] = {
        "noiser": "eggroll",
        "solver": "sgd",
        "solver_options": {},
        "rank": 2,
        "noise_reuse": 1,
        "group": 0,
        "freeze": False,
        "activation": "silu",
        "sigma": 0.1,
        "learning_rate": 0.2,
        "dtype": "float32",
        "task": "sin",
        "trust_region": None,
    }
    return Trajectory(
        name=name,
        population_size=population_size,
        widths=widths,
        bias=bias,
        key=rng.integers(2**32, size=2, dtype=np.uint32),
        init=initial(mlp(widths, bias=bias).shapes, rng),
        inputs=rng.standard_normal((generations, population_size, widths[0]), dtype=np.float32),
        **(defaults | options),
    )
