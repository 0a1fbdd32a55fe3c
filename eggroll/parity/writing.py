"""Writes vectors in the recorded format from the core on NumPy, with other seeds, shapes and configurations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eggroll import fitness, prng

from .numpy_backend import NumpyCore
from .runs import shaping_config
from .trajectory import Trajectory, random_trajectory

__all__ = ["write_vectors"]


def write_vectors(directory: Path, seed: int) -> list[Path]:
    """Writes ``prng.npz``, ``perturbation.npz``, ``fitness.npz`` and ``trajectory_<k>.npz`` for ``--vectors``.

    Args:
        directory: made if it is not there.
        seed: of keys, shapes, parameters and inputs.

    Returns:
        The files.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "prng": _prng(rng),
        "perturbation": _perturbation(rng),
        "fitness": _fitness(rng),
        **{f"trajectory_{place}": _trajectory(run) for place, run in enumerate(_runs(rng))},
    }
    paths = [directory / f"{name}.npz" for name in files]
    for path, arrays in zip(paths, files.values(), strict=True):
        np.savez(path, **arrays)
    return paths


def _prng(rng: np.random.Generator) -> dict[str, Any]:
    seed = int(rng.integers(2**31))
    key = prng.key(seed)
    data = rng.integers(2**32, size=9, dtype=np.uint32)
    arrays: dict[str, Any] = {
        "seed": np.int64(seed),
        "key": key,
        "fold_in.data": data,
        "fold_in.keys": prng.fold_in(key, data),
    }
    arrays |= {f"split.{n}": prng.split(key, n) for n in (1, 3, 10)}
    for shape in ((3,), (130,), (11, 5), (2, 3, 4)):
        name = "x".join(map(str, shape))
        arrays[f"bits.{name}"] = prng.bits(key, shape)
        arrays[f"uniform.{name}"] = prng.uniform(key, shape)
        arrays[f"normal_f32.{name}"] = prng.normal(key, shape)
        arrays[f"normal_bf16.{name}"] = prng.normal(key, shape, "bfloat16")
        arrays[f"normal_f16.{name}"] = prng.normal(key, shape, "float16").astype(np.float16)
    return arrays


def _perturbation(rng: np.random.Generator) -> dict[str, Any]:
    core = NumpyCore()
    cases: list[dict[str, Any]] = []
    arrays = {}
    for shape in ((5, 2), (3, 3), (6, 11)):
        for rank, reuse, epoch, thread in ((1, 1, 4, 9), (3, 0, 2, 6), (2, 2, 5, 1)):
            case, sigma = len(cases), float(rng.choice([0.03, 0.5]))
            key = rng.integers(2**32, size=2, dtype=np.uint32)
            run = replace(random_trajectory(rng), rank=rank, noise_reuse=reuse, sigma=sigma)
            pair, member = divmod(thread, 2)
            members = range(2 * pair, 2 * pair + 2)
            low_rank = core.noise(key, shape, epoch, members, run.config(), low_rank=True)
            dense = core.noise(key, shape, epoch, members, run.config(), low_rank=False)
            scale = low_rank.signs[member] * sigma
            arrays[f"{case}.key"] = key
            arrays[f"{case}.A"] = low_rank.parts[0][member] * np.float32(scale / np.sqrt(rank))
            arrays[f"{case}.B"] = low_rank.parts[1][member]
            arrays[f"{case}.dense"] = dense.parts[0][member] * np.float32(scale)
            cases.append(
                {
                    "case": case,
                    "shape": list(shape),
                    "rank": rank,
                    "noise_reuse": reuse,
                    "epoch": epoch,
                    "thread": thread,
                    "sigma": sigma,
                }
            )
    return {"cases": json.dumps(cases), **arrays}


def _fitness(rng: np.random.Generator) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    arrays = {}
    chosen = (("eggroll", 10, 0), ("open_es", 12, 3), ("eggrollbs", 12, 6), ("eggrollbs", 20, 5))
    for noiser, population, group in chosen:
        case = len(cases)
        raw = (3 * rng.standard_normal(population) - 1).astype(np.float32)
        shaped = fitness.shape_fitness(raw.astype(np.float64), shaping_config(noiser, population, group))
        arrays[f"{case}.raw"] = raw
        arrays[f"{case}.shaped"] = shaped[: group if noiser == "eggrollbs" else population].astype(np.float32)
        cases.append({"case": case, "noiser": noiser, "group_size": group, "population": population})
    return {"cases": json.dumps(cases), **arrays}


def _runs(rng: np.random.Generator) -> list[Trajectory]:
    return [
        random_trajectory(
            rng,
            widths=(4, 6, 5, 1),
            population_size=20,
            generations=4,
            rank=3,
            noise_reuse=2,
            solver="adam",
            solver_options={"b1": 0.8},
            learning_rate=0.03,
            activation="pqn",
        ),
        random_trajectory(
            rng, widths=(2, 7, 1), population_size=24, generations=3, noiser="eggrollbs", group=6, trust_region=0.5
        ),
        random_trajectory(
            rng, widths=(5, 4, 1), population_size=16, generations=3, noiser="open_es", bias=False, activation="relu"
        ),
    ]


def _trajectory(run: Trajectory) -> dict[str, Any]:
    core = NumpyCore()
    replay = core.replay(run)
    shaping = shaping_config(run.noiser, run.population_size, run.group)
    keys = core.parameter_keys(run.model, run.init, run.key)
    config = {
        "name": run.noiser,
        "solver": run.solver,
        "skw": dict(run.solver_options),
        "rank": run.rank,
        "N": run.population_size,
        "gens": run.generations,
        "hidden": list(run.widths[1:-1]),
        "in_dim": run.widths[0],
        "out_dim": run.widths[-1],
        "reuse": run.noise_reuse,
        "group": run.group,
        "freeze": run.freeze,
        "act": run.activation,
        "sigma": run.sigma,
        "lr": run.learning_rate,
        "bias": run.bias,
        "dtype": run.dtype,
        "task": run.task,
        "extra": {} if run.trust_region is None else {"trust_region_norm": run.trust_region},
    }
    trees = {"init": run.init, "key": keys, "params1": replay.first, f"params{run.generations}": replay.last}
    return {
        "config": json.dumps(config),
        "es_key": run.key,
        "inputs": run.inputs,
        "outputs": replay.outputs,
        "raw": replay.raw,
        "shaped": np.stack([core.shape_fitness(raw, shaping) for raw in replay.raw]),
        **{f"{name}/{key.replace('.', '/')}": value for name, tree in trees.items() for key, value in tree.items()},
    }
