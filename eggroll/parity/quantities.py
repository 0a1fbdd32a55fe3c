"""What is compared live: every backend against the core on NumPy, on problems drawn from a seed."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eggroll import EggrollConfig
from eggroll.prng import Precision, Rng

from .backends import Backend, DrawnNoise, Evaluation, Parameters
from .models import ATTENTION, CNN, Model, initial, mlp
from .numpy_backend import NumpyCore
from .report import CHUNKED, EQUAL, NORMALS, OUTPUTS, SHAPED, TRAINED, Pair, Report, Tolerance
from .trajectory import Trajectory, random_trajectory

__all__ = ["compare_backends"]

# What fold_in has to take: the ends of both halves of 32 bits.
FOLDED = np.asarray([0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
RNGS: tuple[Rng, ...] = ("threefry", "philox")


@dataclass(frozen=True)
class NoiseCase:
    """The noise of one parameter in one generation."""

    shape: tuple[int, ...]
    generation: int
    config: EggrollConfig
    low_rank: bool = True
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = f"rank {self.config.rank}" if self.low_rank else "dense"
        return f"{self.shape} {kind} {self.dtype} generation {self.generation}"

    def noise(self, backend: Backend, key: np.ndarray) -> DrawnNoise:
        members = range(self.config.population_size)
        return backend.noise(
            key, self.shape, self.generation, members, self.config, low_rank=self.low_rank, dtype=self.dtype
        )


def compare_backends(report: Report, backends: Sequence[Backend], seed: int, quick: bool) -> None:
    """Adds a row for every quantity and every backend but the core itself, which gives the expected numbers.

    Args:
        seed: of all keys, parameters and inputs.
        quick: fewer shapes and configurations.
    """
    core = NumpyCore()
    for backend in backends:
        if backend.name == core.name:
            continue
        rng = np.random.default_rng(seed)  # every backend gets the same problems
        _draws(report, core, backend, rng, quick)
        _noise(report, core, backend, rng, quick)
        for place, evaluation in enumerate(_evaluations(rng, quick)):
            _model(report, core, backend, evaluation, rng, in_chunks=place == 0 or not quick)
        _fitness(report, core, backend, rng)
        _training(report, core, backend, rng, quick)


def _draws(report: Report, core: Backend, backend: Backend, problems: np.random.Generator, quick: bool) -> None:
    keys = [problems.integers(2**32, size=2, dtype=np.uint32) for _ in range(1 if quick else 3)]
    shapes: list[tuple[int, ...]] = [(7,), (33, 4)] if quick else [(1,), (7,), (33, 4), (5, 3, 2), (1000, 17)]

    def both(find: Callable[[Backend, np.ndarray], np.ndarray]) -> Callable[[], Iterator[Pair]]:
        return lambda: (Pair(f"key {key.tolist()}", find(backend, key), find(core, key)) for key in keys)

    def each(find: Callable[[Backend, np.ndarray, tuple[int, ...]], np.ndarray]) -> Callable[[], Iterator[Pair]]:
        return lambda: (
            Pair(f"key {key.tolist()} {shape}", find(backend, key, shape), find(core, key, shape))
            for key in keys
            for shape in shapes
        )

    report.compare("keys: fold_in", backend.name, EQUAL, both(lambda one, key: one.fold_in(key, FOLDED)))
    report.compare("keys: split", backend.name, EQUAL, both(lambda one, key: one.split(key, 17)))
    for model in (mlp((3, 4, 4, 2)), ATTENTION):
        zeros = {name: np.zeros(shape, np.float32) for name, shape in model.shapes.items()}

        def of_parameters(one: Backend, key: np.ndarray, model: Model = model, zeros: dict = zeros) -> np.ndarray:
            found = one.parameter_keys(model, zeros, key)
            return np.stack([found[name] for name in sorted(zeros)])

        report.compare(f"keys: parameters of the {model.name}", backend.name, EQUAL, both(of_parameters))
    for rng in RNGS:

        def bits(one: Backend, key: np.ndarray, shape: tuple[int, ...], rng: Rng = rng) -> np.ndarray:
            return one.bits(key, shape, rng)

        report.compare(f"{prefix(rng)}bits", backend.name, EQUAL, each(bits))
    report.compare("uniforms", backend.name, EQUAL, each(lambda one, key, shape: one.uniform(key, shape)))
    for rng, precision in itertools.product(RNGS, PRECISIONS):

        def normals(
            one: Backend, key: np.ndarray, shape: tuple[int, ...], precision: Precision = precision, rng: Rng = rng
        ) -> np.ndarray:
            return one.normal(key, shape, precision, rng)

        # The 16-bit normals come from tables of 128 and 1024 numbers.
        tolerance = NORMALS if precision == "float32" else EQUAL
        report.compare(f"{prefix(rng)}normals {precision}", backend.name, tolerance, each(normals))


def _noise_cases(quick: bool) -> list[NoiseCase]:
    config = EggrollConfig(population_size=8, rank=3, sigma=0.2, noise_lifetime=2)
    philox = replace(config, rng="philox")
    cases = [
        NoiseCase((4, 6), 5, config),
        NoiseCase((5, 5), 5, config),
        NoiseCase((7,), 3, config, low_rank=False),
        NoiseCase((5, 6), 5, philox),
        NoiseCase((7,), 3, philox, low_rank=False),
    ]
    if quick:
        return cases
    independent = replace(config, antithetic=False, noise_lifetime=None, rank=1)
    narrow = replace(config, noise_dtype="param")
    return [
        *cases,
        NoiseCase((3, 4), 9, independent),
        NoiseCase((2, 3, 4), 9, independent, low_rank=False),
        NoiseCase((9, 2), 4, replace(config, fitness_shaping="baseline", group_size=4)),
        NoiseCase((4, 6), 1, narrow, dtype="bfloat16"),
        NoiseCase((4, 6), 1, narrow, dtype="float16"),
        NoiseCase((4, 6), 1, config, dtype="bfloat16"),
        NoiseCase((300, 129), 0, replace(config, rank=8)),
        NoiseCase((300, 129), 0, replace(philox, rank=8, antithetic=False)),
        NoiseCase((2, 3, 5), 9, philox, low_rank=False),
        NoiseCase((4, 6), 1, replace(philox, noise_dtype="param"), dtype="bfloat16"),
    ]


def _noise(report: Report, core: Backend, backend: Backend, problems: np.random.Generator, quick: bool) -> None:
    cases = [(case, problems.integers(2**32, size=2, dtype=np.uint32)) for case in _noise_cases(quick)]

    @functools.cache
    def drawn() -> list[tuple[NoiseCase, DrawnNoise, DrawnNoise]]:
        return [(case, case.noise(backend, key), case.noise(core, key)) for case, key in cases]

    def parts(rng: Rng, low_rank: bool, place: int) -> list[Pair]:
        return [
            Pair(str(case), actual.parts[place], expected.parts[place])
            for case, actual, expected in drawn()
            if case.low_rank == low_rank and case.config.rng == rng
        ]

    def signs() -> list[Pair]:
        return [Pair(str(case), actual.signs, expected.signs) for case, actual, expected in drawn()]

    report.compare("signs", backend.name, EQUAL, signs)
    for rng in RNGS:
        for what, low_rank, place in (("factors A", True, 0), ("factors B", True, 1), ("dense noise", False, 0)):
            found = functools.partial(parts, rng, low_rank, place)
            report.compare(f"{prefix(rng)}{what}", backend.name, NORMALS, found)


def _evaluations(rng: np.random.Generator, quick: bool) -> list[Evaluation]:
    base = EggrollConfig(population_size=8, rank=2, sigma=0.2)
    chosen: list[tuple[Model, int, EggrollConfig]] = [
        (mlp((3, 6, 6, 2)), 3, base),
        (CNN, 1, replace(base, antithetic=False, rank=1)),
        (ATTENTION, 5, replace(base, rank=3, noise_lifetime=2)),
    ]
    if not quick:
        chosen += [
            (mlp((3, 6, 2), "silu"), 9, replace(base, noise_lifetime=None, gradient_scale="unbiased")),
            (mlp((5, 4, 4), "pqn"), 2, replace(base, fitness_shaping="baseline", group_size=4)),
            (ATTENTION, 2, replace(base, population_size=16, freeze_nonlora=True, group_size=4)),
            (mlp((3, 6, 6, 2)), 4, replace(base, rank=3, rng="philox")),
            (CNN, 1, replace(base, antithetic=False, rng="philox")),
        ]
    return [
        Evaluation(
            model=model,
            parameters=initial(model.shapes, rng),
            key=rng.integers(2**32, size=2, dtype=np.uint32),
            generation=generation,
            inputs=model.inputs(rng),
            config=config,
        )
        for model, generation, config in chosen
    ]


def _model(
    report: Report,
    core: Backend,
    backend: Backend,
    evaluation: Evaluation,
    rng: np.random.Generator,
    in_chunks: bool,
) -> None:
    scores = rng.standard_normal(evaluation.config.population_size, dtype=np.float32)
    chunked = replace(evaluation, chunk_size=3)
    title = f"{evaluation.model.name}, {describe(evaluation.config)}"

    @functools.cache
    def outputs() -> np.ndarray:
        return backend.outputs(evaluation)

    @functools.cache
    def direction() -> Parameters:
        return backend.direction(evaluation, scores)

    def each(actual: Parameters, expected: Parameters) -> list[Pair]:
        # Relative to the whole direction: in a bias of one or two numbers the members may all but cancel.
        scale = max(float(np.abs(part).max()) for part in expected.values())
        return [Pair(name, actual[name], expected[name], scale) for name in sorted(expected)]

    def report_on(what: str, tolerance: Tolerance, pairs: Callable[[], list[Pair]]) -> None:
        report.compare(f"{what}: {title}", backend.name, tolerance, pairs)

    report_on("population outputs", OUTPUTS, lambda: [Pair("outputs", outputs(), core.outputs(evaluation))])
    report_on("direction", OUTPUTS, lambda: each(direction(), core.direction(evaluation, scores)))
    if in_chunks:
        report_on("outputs in chunks", CHUNKED, lambda: [Pair("outputs", backend.outputs(chunked), outputs())])
        report_on("direction in chunks", CHUNKED, lambda: each(backend.direction(chunked, scores), direction()))


def _fitness(report: Report, core: Backend, backend: Backend, rng: np.random.Generator) -> None:
    scores = rng.standard_normal(24, dtype=np.float32)
    scores[5] = scores[2]  # a tie
    cases = {
        "a generation": scores,
        "far from zero": scores + np.float32(1000),
        "all equal": np.full(24, -3.7, np.float32),
    }
    shapings = [("zscore", 0), ("zscore", 6), ("group_zscore", 6), ("centered_rank", 0), ("sign", 0), ("baseline", 6)]
    for shaping, group in [*shapings, ("raw", 0)]:
        config = EggrollConfig(population_size=24, fitness_shaping=shaping, group_size=group)

        def pairs(config: EggrollConfig = config) -> Iterator[Pair]:
            for name, values in cases.items():
                yield Pair(name, backend.shape_fitness(values, config), core.shape_fitness(values, config))

        groups = f" in groups of {group}" if group else ""
        report.compare(f"shaped fitness: {shaping}{groups}", backend.name, SHAPED, pairs)


def _training(report: Report, core: Backend, backend: Backend, rng: np.random.Generator, quick: bool) -> None:
    runs = [random_trajectory(rng, "sgd, rank 2")]
    if not quick:
        runs += [
            random_trajectory(
                rng,
                "adam, groups, noise for 3 generations",
                solver="adam",
                learning_rate=0.05,
                group=8,
                noise_reuse=3,
            ),
            random_trajectory(rng, "full rank", noiser="open_es"),
            random_trajectory(rng, "matrices only, momentum", freeze=True, solver_options={"momentum": 0.9}),
            replace(random_trajectory(rng, "philox"), rng="philox"),
        ]
    for run in runs:

        def pairs(run: Trajectory = run) -> Iterator[Pair]:
            actual, expected = backend.replay(run), core.replay(run)
            for name in sorted(expected.last):
                yield Pair(f"{name} after generation 1", actual.first[name], expected.first[name])
                yield Pair(f"{name} after generation {run.generations}", actual.last[name], expected.last[name])

        report.compare(f"{run.generations} generations of training: {run.name}", backend.name, TRAINED, pairs)


def prefix(rng: Rng) -> str:
    """What the lines of a generator begin with: nothing for the default."""
    return "" if rng == "threefry" else f"{rng} "


def describe(config: EggrollConfig) -> str:
    """What is special about a configuration, in a few words."""
    words = [f"rank {config.rank}"]
    words += [] if config.antithetic else ["no pairs"]
    if config.noise_lifetime != 1:
        words.append("noise for ever" if config.noise_lifetime is None else f"noise for {config.noise_lifetime}")
    words += [str(config.fitness_shaping)] if config.fitness_shaping != "zscore" else []
    words += [config.gradient_scale] if config.gradient_scale != "reference" else []
    words += ["matrices only"] if config.freeze_nonlora else []
    words += [config.rng] if config.rng != "threefry" else []
    return ", ".join(words)
