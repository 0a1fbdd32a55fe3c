"""What each backend has to compute, and which backends this machine has."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eggroll import EggrollConfig
from eggroll.prng import Precision, Rng

from .models import Model
from .trajectory import Replay, Trajectory

__all__ = ["Backend", "DrawnNoise", "Evaluation", "backends_named", "installed"]

FAMILIES = ("numpy", "torch", "jax")
_EXTRAS = {"torch": "pip install 'eggroll-xp[torch]'", "jax": "pip install 'eggroll-xp[jax]'"}

Parameters = Mapping[str, np.ndarray]


class DrawnNoise(NamedTuple):
    """The noise of one parameter for some members, each with its own entry."""

    signs: np.ndarray
    """float32, shape ``(members,)``: +1, -1, or 0 for a member that is not perturbed."""
    parts: tuple[np.ndarray, ...]
    """float32, unscaled: ``(A, B)`` of shapes ``(members, out, rank)`` and ``(members, in, rank)``, or ``(Z,)`` of
    shape ``(members, *shape)``."""


@dataclass(frozen=True)
class Evaluation:
    """One generation of a model: everything that the outputs of its members, and its direction, depend on.

    Attributes:
        inputs: what the model takes; all members get the same.
        chunk_size: members at a time, None for all.
    """

    model: Model
    parameters: Parameters
    key: np.ndarray
    generation: int
    inputs: np.ndarray
    config: EggrollConfig
    chunk_size: int | None = None


class Backend(ABC):
    """A backend on one device. Everything goes in and comes out as NumPy arrays.

    A method raises `eggroll.parity.report.InexpressibleError` where the backend has no way to do what is asked.
    """

    name: str

    @abstractmethod
    def key(self, seed: int) -> np.ndarray:
        """The key of a seed: uint32, shape ``(2,)``."""

    @abstractmethod
    def fold_in(self, key: np.ndarray, data: np.ndarray) -> np.ndarray:
        """The key folded with each of `data`, uint32 of shape ``(n,)``: shape ``(n, 2)``."""

    @abstractmethod
    def split(self, key: np.ndarray, n: int) -> np.ndarray:
        """`n` keys: uint32, shape ``(n, 2)``."""

    @abstractmethod
    def parameter_keys(self, model: Model, parameters: Parameters, key: np.ndarray) -> Parameters:
        """The key of each parameter in a run with the key `key`."""

    @abstractmethod
    def bits(self, key: np.ndarray, shape: tuple[int, ...], rng: Rng = "threefry") -> np.ndarray:
        """uint32, `shape`, drawn with the generator `rng`."""

    @abstractmethod
    def uniform(self, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """float32 on (-1, 1), `shape`."""

    @abstractmethod
    def normal(
        self, key: np.ndarray, shape: tuple[int, ...], precision: Precision, rng: Rng = "threefry"
    ) -> np.ndarray:
        """Standard normal numbers drawn in `precision` with the generator `rng`, float32, `shape`."""

    @abstractmethod
    def noise(
        self,
        parameter_key: np.ndarray,
        shape: tuple[int, ...],
        generation: int,
        members: range,
        config: EggrollConfig,
        *,
        low_rank: bool,
        dtype: str = "float32",
    ) -> DrawnNoise:
        """The noise of a parameter of the given shape, key and dtype, whatever `config.freeze_nonlora` says.

        Args:
            members: which members, whole pairs.
        """

    @abstractmethod
    def shape_fitness(self, fitness: np.ndarray, config: EggrollConfig) -> np.ndarray:
        """The weight of each member, as the backend hands it to its update: float32."""

    @abstractmethod
    def outputs(self, evaluation: Evaluation) -> np.ndarray:
        """The model's outputs for every member: float32, shape ``(population_size, ...)``."""

    @abstractmethod
    def direction(self, evaluation: Evaluation, fitness: np.ndarray) -> Parameters:
        """The direction of every parameter from the fitness of all members."""

    @abstractmethod
    def replay(self, trajectory: Trajectory) -> Replay:
        """A training run."""


def installed() -> list[Backend]:
    """Every backend that can be loaded, on every device that it has."""
    found: list[Backend] = []
    for family in FAMILIES:
        try:
            found += _load(family)
        except ModuleNotFoundError as error:
            if family == "numpy" or error.name is None or error.name.startswith("eggroll"):
                raise
    return found


def backends_named(names: Sequence[str]) -> list[Backend]:
    """The backends with these names, or of these families (``"torch"`` for all of its devices).

    Raises:
        ValueError: there is none of that name; the message says what there is.
    """
    found: dict[str, Backend] = {}
    for name in names:
        family = name.partition("-")[0]
        if family not in FAMILIES:
            raise ValueError(f"must name backends of {', '.join(FAMILIES)}, got {name!r}")
        try:
            loaded = _load(family)
        except ModuleNotFoundError as error:
            hint = f": {_EXTRAS[family]}" if family in _EXTRAS else ""
            raise ValueError(f"must name backends that are installed, got {name!r} (no {error.name}){hint}") from None
        chosen = [backend for backend in loaded if name in (family, backend.name)]
        if not chosen:
            there = ", ".join(backend.name for backend in loaded)
            raise ValueError(f"must name devices of this machine ({there}), got {name!r}")
        found |= {backend.name: backend for backend in chosen}
    return list(found.values())


def _load(family: str) -> list[Backend]:
    if family != "numpy":
        importlib.import_module(f"eggroll.{family}")  # says what to install if it cannot be loaded
    module = importlib.import_module(f"eggroll.parity.{family}_backend")
    on_every_device: Callable[[], list[Backend]] = module.on_every_device
    return on_every_device()
