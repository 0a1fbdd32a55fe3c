"""Replays recorded vectors on every backend. docs/parity.md describes the format."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eggroll import EggrollConfig
from eggroll.prng import Precision

from .backends import Backend
from .recording import Kind, Recording, VectorError, read_directory
from .report import EQUAL, NORMALS, SHAPED, InexpressibleError, Pair, Report, Tolerance
from .runs import compare_run, read_run, shaping_config

__all__ = ["VectorError", "compare_vectors"]

_PRECISIONS: dict[str, Precision] = {"normal_f32": "float32", "normal_bf16": "bfloat16", "normal_f16": "float16"}

Compare = Callable[[Report, Backend], None]


def compare_vectors(report: Report, backends: Sequence[Backend], directory: Path) -> None:
    """Adds the rows of all files of a directory on all backends. Files are read and checked before anything runs.

    Raises:
        VectorError: the directory or a file of it cannot be used.
    """
    kinds = {"prng": _prng, "perturbation": _perturbation, "fitness": _fitness, "trajectory": _trajectory}
    comparisons = [kinds[kind](recording) for kind, recording in read_directory(directory, kinds)]
    for compare in comparisons:
        for backend in backends:
            compare(report, backend)


def _prng(recording: Recording) -> Compare:
    key = recording.key("key")
    seed = int(recording.array("seed", "integer", ()))
    data = recording.words("fold_in.data", (None,))
    folded = recording.words("fold_in.keys", (len(data), 2))
    splits = {n: recording.words(f"split.{n}", (_length(recording, n), 2)) for n in recording.names("split.")}
    shapes = {name: _shape(recording, name) for name in recording.names("bits.")}
    bits = {name: recording.words(f"bits.{name}", shape) for name, shape in shapes.items()}
    floats = {
        kind: {name: recording.array(f"{kind}.{name}", "float", shape) for name, shape in shapes.items()}
        for kind in ("uniform", *_PRECISIONS)
    }

    def compare(report: Report, backend: Backend) -> None:
        def row(
            what: str,
            expected: dict[str, np.ndarray],
            draw: Callable[[str], np.ndarray],
            tolerance: Tolerance = EQUAL,
        ) -> None:
            def pairs() -> Iterator[Pair]:
                return (Pair(f"{what}.{name}", draw(name), values) for name, values in expected.items())

            report.compare(f"{recording.name}: {what}", backend.name, tolerance, pairs)

        row("key", {"seed": key}, lambda _: backend.key(seed))
        row("fold_in", {"keys": folded}, lambda _: backend.fold_in(key, data))
        row("split", splits, lambda n: backend.split(key, int(n)))
        row("bits", bits, lambda name: backend.bits(key, shapes[name]))
        row("uniform", floats["uniform"], lambda name: backend.uniform(key, shapes[name]))
        for kind, precision in _PRECISIONS.items():

            def normal(name: str, precision: Precision = precision) -> np.ndarray:
                return backend.normal(key, shapes[name], precision)

            row(kind, floats[kind], normal, NORMALS if precision == "float32" else EQUAL)

    return compare


def _perturbation(recording: Recording) -> Compare:
    number = (int, float)
    kinds: dict[str, Kind] = {
        "shape": list,
        "rank": int,
        "noise_reuse": int,
        "epoch": int,
        "thread": int,
        "sigma": number,
        "case": int,
    }
    cases = recording.cases(kinds)
    recorded = []
    for case in cases:
        name, shape = case["case"], tuple(case["shape"])
        if len(shape) != 2 or not all(isinstance(length, int) and length > 0 for length in shape):
            raise recording.error(f"case {name}: 'shape' must be two positive ints, got {case['shape']!r}")
        try:
            config = EggrollConfig(
                population_size=case["thread"] // 2 * 2 + 2,
                sigma=case["sigma"],
                rank=case["rank"],
                noise_lifetime=case["noise_reuse"] or None,
            )
        except ValueError as error:
            raise recording.error(f"case {name}: {error}") from None
        arrays = {
            "A": recording.array(f"{name}.A", "float", (shape[0], case["rank"])),
            "B": recording.array(f"{name}.B", "float", (shape[1], case["rank"])),
            "dense": recording.array(f"{name}.dense", "float", shape),
        }
        recorded.append((case, config, recording.key(f"{name}.key"), arrays))

    def compare(report: Report, backend: Backend) -> None:
        def pairs(what: str) -> Iterator[Pair]:
            for case, config, key, arrays in recorded:
                pair, member = divmod(case["thread"], 2)
                drawn = backend.noise(
                    key,
                    tuple(case["shape"]),
                    case["epoch"],
                    range(2 * pair, 2 * pair + 2),
                    config,
                    low_rank=what != "dense",
                )
                part = drawn.parts[1 if what == "B" else 0][member]
                if what != "B":
                    rank = config.rank if what == "A" else 1
                    part = part * np.float32(drawn.signs[member] * config.sigma / np.sqrt(rank))
                yield Pair(f"{case['case']}.{what}", part, arrays[what])

        for what in ("A", "B", "dense"):
            # One more rounding than a normal's: that of the product with sign * sigma / sqrt(rank).
            report.compare(
                f"{recording.name}: {what}", backend.name, NORMALS, functools.partial(lambda w: list(pairs(w)), what)
            )

    return compare


def _fitness(recording: Recording) -> Compare:
    cases = recording.cases({"case": int, "noiser": str, "group_size": int, "population": int})
    recorded = []
    for case in cases:
        name, members, group = case["case"], case["population"], case["group_size"] or case["population"]
        raw = recording.array(f"{name}.raw", "float", (members,))
        shaped = recording.array(f"{name}.shaped", "float", (None,))
        if members % group or len(shaped) not in (members, group):
            raise recording.error(
                f"case {name}: {len(shaped)} shaped values do not fit {members} members in groups of {group}"
            )
        # Baseline shaping gives the weights of one group, which all groups share.
        recorded.append((case, raw, np.tile(shaped, members // len(shaped))))

    def compare(report: Report, backend: Backend) -> None:
        expressible: dict[str, list[Any]] = {}
        for case, raw, shaped in recorded:
            try:
                config = shaping_config(case["noiser"], case["population"], case["group_size"])
            except InexpressibleError as reason:
                report.skip(f"{recording.name}: case {case['case']}", backend.name, str(reason))
                continue
            expressible.setdefault(case["noiser"], []).append((f"{case['case']}.shaped", raw, shaped, config))
        for noiser, chosen in sorted(expressible.items()):

            def pairs(chosen: list[Any] = chosen) -> Iterator[Pair]:
                return (Pair(where, backend.shape_fitness(raw, c), shaped) for where, raw, shaped, c in chosen)

            report.compare(f"{recording.name}: {noiser}", backend.name, SHAPED, pairs)

    return compare


def _trajectory(recording: Recording) -> Compare:
    run = read_run(recording)
    return lambda report, backend: compare_run(report, backend, run)


def _shape(recording: Recording, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in name.split("x"))
    except ValueError:
        raise recording.error(f"entry 'bits.{name}' must be named by its shape, such as 'bits.33x4'") from None


def _length(recording: Recording, name: str) -> int:
    if not name.isdecimal() or int(name) < 1:
        raise recording.error(f"entry 'split.{name}' must be named by its length, such as 'split.5'")
    return int(name)
