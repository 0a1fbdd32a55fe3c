"""Recorded training runs: read from a file, and compared with what a backend makes of them."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from eggroll import EggrollConfig

from .backends import Backend
from .recording import Kind, Recording
from .report import (
    BFLOAT16,
    EQUAL,
    OUTPUTS,
    SHAPED,
    TRAINED,
    TRAINED_BFLOAT16,
    InexpressibleError,
    Pair,
    Report,
)
from .trajectory import Replay, Trajectory

__all__ = ["RecordedRun", "compare_run", "read_run", "shaping_config"]

# What each of the reference's noisers does to fitness.
_SHAPINGS = {"eggrollbs": "baseline"} | dict.fromkeys(("eggroll", "open_es", "alteggroll", "sparse"), "zscore")


@dataclass(frozen=True)
class RecordedRun:
    """A run with what was recorded of it.

    Attributes:
        keys: the key of each parameter by dotted name.
        shaped: float32, shape ``(generations, population_size)``.
    """

    trajectory: Trajectory
    replay: Replay
    keys: dict[str, np.ndarray]
    shaped: np.ndarray


def compare_run(report: Report, backend: Backend, run: RecordedRun) -> None:
    """Adds the rows of one run on one backend."""
    trajectory, expected = run.trajectory, run.replay
    name = trajectory.name
    if not report.wants_any(f"{name}: "):
        return
    narrow = trajectory.dtype != "float32"

    def keys() -> Iterator[Pair]:
        found = backend.parameter_keys(trajectory.model, trajectory.init, trajectory.key)
        return (Pair(parameter, found[parameter], key) for parameter, key in sorted(run.keys.items()))

    def shaped() -> Iterator[Pair]:
        config = shaping_config(trajectory.noiser, trajectory.population_size, trajectory.group)
        for generation, raw in enumerate(expected.raw):
            where = f"generation {generation + 1}"
            yield Pair(where, backend.shape_fitness(raw, config), run.shaped[generation])

    replay = functools.cache(lambda: backend.replay(trajectory))

    def parameters(after: str) -> list[Pair]:
        actual, wanted = getattr(replay(), after), getattr(expected, after)
        return [Pair(parameter, actual[parameter], wanted[parameter]) for parameter in sorted(wanted)]

    report.compare(f"{name}: keys", backend.name, EQUAL, keys)
    report.compare(f"{name}: shaped", backend.name, SHAPED, shaped)
    try:
        replay()
    except InexpressibleError as reason:
        report.skip(f"{name}: run", backend.name, str(reason))
        return
    except Exception:  # reported by each of the rows below
        pass
    outputs, trained = (BFLOAT16, TRAINED_BFLOAT16) if narrow else (OUTPUTS, TRAINED)
    report.compare(
        f"{name}: outputs, generation 1",
        backend.name,
        outputs,
        lambda: [Pair("outputs", replay().outputs[0], expected.outputs[0])],
    )
    report.compare(
        f"{name}: outputs", backend.name, trained, lambda: [Pair("outputs", replay().outputs, expected.outputs)]
    )
    report.compare(f"{name}: raw", backend.name, trained, lambda: [Pair("raw", replay().raw, expected.raw)])
    report.compare(f"{name}: params1", backend.name, trained, lambda: parameters("first"))
    report.compare(f"{name}: params{trajectory.generations}", backend.name, trained, lambda: parameters("last"))


def read_run(recording: Recording) -> RecordedRun:
    """A ``trajectory_*.npz`` file, checked."""
    number = (int, float)
    kinds: dict[str, Kind] = {
        **dict.fromkeys(("name", "solver", "act", "dtype", "task"), str),
        **dict.fromkeys(("rank", "N", "gens", "in_dim", "out_dim", "reuse", "group"), int),
        **dict.fromkeys(("freeze", "bias"), bool),
        **dict.fromkeys(("sigma", "lr"), number),
        **dict.fromkeys(("skw", "extra"), dict),
        "hidden": list,
    }
    config = recording.fields("entry 'config'", recording.parsed("config"), kinds)
    choices = {"act": ("relu", "silu", "pqn"), "dtype": ("float32", "bfloat16"), "task": ("two", "sin")}
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise recording.error(f"entry 'config': {name!r} must be one of {allowed}, got {config[name]!r}")
    widths = (config["in_dim"], *config["hidden"], config["out_dim"])
    if not all(isinstance(width, int) and width > 0 for width in widths) or not config["N"] or not config["gens"]:
        raise recording.error("entry 'config': widths, 'N' and 'gens' must be positive ints")
    generations, members = config["gens"], config["N"]
    unknown = set(config["extra"]) - {"trust_region_norm"}
    if unknown:
        raise recording.error(f"entry 'config': 'extra' has {sorted(unknown)}, which have no meaning here")
    trajectory = Trajectory(
        name=recording.name,
        noiser=config["name"],
        solver=config["solver"],
        solver_options=config["skw"],
        rank=config["rank"],
        population_size=members,
        widths=widths,
        noise_reuse=config["reuse"],
        group=config["group"],
        freeze=config["freeze"],
        activation=config["act"],
        sigma=config["sigma"],
        learning_rate=config["lr"],
        bias=config["bias"],
        dtype=config["dtype"],
        task=config["task"],
        trust_region=config["extra"].get("trust_region_norm"),
        key=recording.key("es_key"),
        init={},
        inputs=recording.array("inputs", "float", (generations, members, widths[0])),
    )
    shapes = trajectory.model.shapes

    def tree(prefix: str) -> dict[str, np.ndarray]:
        found = {
            name: recording.array(f"{prefix}/{name.replace('.', '/')}", "float", shapes[name]) for name in shapes
        }
        extra = {name.replace("/", ".") for name in recording.names(f"{prefix}/")} - set(shapes)
        if extra:
            raise recording.error(f"entry '{prefix}/{min(extra).replace('.', '/')}' is of no parameter of the model")
        return found

    trajectory = replace(trajectory, init=tree("init"))
    replay = Replay(
        outputs=recording.array("outputs", "float", (generations, members, widths[-1])),
        raw=recording.array("raw", "float", (generations, members)),
        first=tree("params1"),
        last=tree(f"params{generations}"),
    )
    keys = {name: recording.key(f"key/{name.replace('.', '/')}") for name in shapes}
    return RecordedRun(trajectory, replay, keys, recording.array("shaped", "float", (generations, members)))


def shaping_config(noiser: str, members: int, group: int) -> EggrollConfig:
    """The hyperparameters that a noiser's shaping of fitness depends on.

    Raises:
        InexpressibleError: an unknown noiser, or a population and groups that the shaping cannot be had for.
    """
    if noiser not in _SHAPINGS:
        raise InexpressibleError(f"the shaping of the noiser {noiser!r} is not known")
    try:
        return EggrollConfig(
            population_size=members, antithetic=False, fitness_shaping=_SHAPINGS[noiser], group_size=group
        )
    except ValueError as error:
        raise InexpressibleError(str(error)) from None
