"""Compares live with a HyperscaleES checkout: runs it on random configurations, and replays the runs."""

import contextlib
import functools
import importlib
import io
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .backends import Backend
from .report import OUTPUTS, Pair, Report, Row
from .trajectory import Trajectory, random_trajectory

if TYPE_CHECKING:
    from .hyperscale import Api

__all__ = ["CheckoutError", "compare_reference"]

_PACKAGE = "hyperscalees"


class CheckoutError(ValueError):
    """The directory holds no HyperscaleES checkout that can be used; the message says why."""


def compare_reference(report: Report, backends: Sequence[Backend], directory: Path, seed: int, quick: bool) -> None:
    """Adds, for every noiser of the checkout, the rows of its perturbation, shaping, update and a training run.

    Args:
        directory: the checkout; its package is in ``src/hyperscalees``.
        seed: of the configurations, keys, parameters and inputs.
        quick: one configuration for each noiser instead of three.

    Raises:
        CheckoutError: no JAX, no checkout there, or one that cannot be imported.
    """
    package = directory / "src" / _PACKAGE
    for needed in (package / "noiser", package / "models"):
        if not needed.is_dir():
            raise CheckoutError(f"must be a HyperscaleES checkout, got {directory}, which has no {needed}")
    try:
        from . import hyperscale, runs
    except ModuleNotFoundError as error:
        raise CheckoutError(f"needs {error.name}, as HyperscaleES does: pip install 'eggroll-xp[jax]'") from None
    with _loaded(package) as api:
        rng = np.random.default_rng(seed)
        for noiser in sorted(api.noisers):
            for trajectory in _configurations(rng, noiser, 1 if quick else 3):
                if not report.wants_any(f"{trajectory.name}: "):
                    continue
                _perturbation(report, backends, api, trajectory)
                try:
                    with _silenced():
                        run = hyperscale.run(api, trajectory)
                except Exception as error:
                    what = f"{type(error).__name__}: {error}".splitlines()[0]
                    report.add(Row(f"{trajectory.name}: run", "reference", "FAIL", note=what))
                    continue
                for backend in backends:
                    runs.compare_run(report, backend, run)


def _configurations(rng: np.random.Generator, noiser: str, number: int) -> Iterator[Trajectory]:
    for place in range(number):
        group = int(rng.choice([4, 8])) if noiser == "eggrollbs" else int(rng.choice([0, 4, 8]))
        solver, learning_rate = (("sgd", 0.3), ("adam", 0.05), ("adamw", 0.05))[int(rng.integers(3))]
        yield random_trajectory(
            rng,
            f"{noiser} {place}",
            noiser=noiser,
            widths=(int(rng.integers(2, 6)), int(rng.integers(4, 10)), 1),
            population_size=16,
            generations=5,
            solver=solver,
            learning_rate=learning_rate,
            rank=int(rng.integers(1, 5)),
            noise_reuse=int(rng.integers(0, 4)),
            group=group,
            freeze=solver != "adamw" and bool(rng.integers(2)),  # optax decays what is frozen, others do not
            activation=str(rng.choice(["relu", "silu", "pqn"])),
            task=str(rng.choice(["two", "sin"])),
        )


def _perturbation(report: Report, backends: Sequence[Backend], api: "Api", trajectory: Trajectory) -> None:
    """Adds the rows of a matrix and a vector as the members of a few generations see them."""
    from . import hyperscale

    rng = np.random.default_rng(trajectory.key)
    matrix = rng.standard_normal((int(rng.integers(2, 9)), int(rng.integers(2, 9))), dtype=np.float32)
    vector = rng.standard_normal(int(rng.integers(2, 9)), dtype=np.float32)
    key = rng.integers(2**32, size=2, dtype=np.uint32)
    epochs = (0, 3, 7)

    @functools.cache
    def expected() -> tuple[np.ndarray, np.ndarray]:
        with _silenced():
            return hyperscale.perturbed(api, trajectory, matrix, vector, key, epochs)

    def both(backend: Backend) -> list[Pair]:
        if backend.name.startswith("jax"):
            actual = hyperscale.perturbed(hyperscale.ours(), trajectory, matrix, vector, key, epochs)
        else:
            actual = _perturbed(backend, trajectory, matrix, vector, key, epochs)
        names = ("matrix", "vector")
        return [Pair(name, own, other) for name, own, other in zip(names, actual, expected(), strict=True)]

    for backend in backends:

        def pairs(backend: Backend = backend) -> list[Pair]:
            return both(backend)

        report.compare(f"{trajectory.name}: perturbation", backend.name, OUTPUTS, pairs)


def _perturbed(
    backend: Backend, run: Trajectory, matrix: np.ndarray, vector: np.ndarray, key: np.ndarray, epochs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What `hyperscale.perturbed` returns, from a backend's noise and the definition."""
    # Sign update and low-rank evaluation: the perturbation is that of "eggroll".
    config = replace(run, noiser="eggroll" if run.noiser == "alteggroll" else run.noiser).config()
    low_rank = run.noiser != "open_es"
    members = range(run.population_size)
    matrices, vectors = [], []
    for epoch in epochs:
        noise = backend.noise(key, matrix.shape, epoch, members, config, low_rank=low_rank)
        signs = noise.signs[:, None, None] * np.float64(config.sigma)
        if low_rank:
            A, B = (part.astype(np.float64) for part in noise.parts)
            matrices.append(matrix + signs / np.sqrt(config.rank) * (A @ B.transpose(0, 2, 1)))
        else:
            matrices.append(matrix + signs * noise.parts[0])
        [dense] = backend.noise(key, vector.shape, epoch, members, config, low_rank=False).parts
        vectors.append(vector + (0 if config.freeze_nonlora else signs[:, 0]) * dense)
    return np.stack(matrices).astype(np.float32), np.stack(vectors).astype(np.float32)


@contextlib.contextmanager
def _loaded(package: Path) -> Iterator["Api"]:
    """The parts of the checkout that are needed, imported without running the package's own ``__init__``.

    `sys.modules` is afterwards as it was before.
    """
    from .hyperscale import Api

    before = {name: sys.modules.pop(name) for name in _loaded_names()}
    try:
        # Empty packages of these names with the checkout's folders as their paths: what the noisers import is found,
        # and nothing else is run.
        for name, folder in ((_PACKAGE, package), (f"{_PACKAGE}.models", package / "models")):
            empty = types.ModuleType(name)
            empty.__path__ = [str(folder)]
            sys.modules[name] = empty
        try:
            with _silenced():
                noisers = importlib.import_module(f"{_PACKAGE}.noiser").all_noisers
                importlib.import_module(f"{_PACKAGE}.models.base_model")
                common = importlib.import_module(f"{_PACKAGE}.models.common")
        except Exception as error:
            raise CheckoutError(f"{package}: cannot be imported: {type(error).__name__}: {error}") from None
        yield Api(noisers, common)
    finally:
        for name in _loaded_names():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded_names() -> list[str]:
    return [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What the checkout prints, traced values included, goes nowhere."""
    import jax

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            jax.effects_barrier()
