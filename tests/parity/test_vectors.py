"""Recorded vectors: green on the recorded set and on another, red with the right line where a number is changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eggroll.parity.cli import main

RECORDED = Path(__file__).parents[1] / "reference"


def replay(directory, tmp_path, *arguments):
    """Exit status and rows by (quantity, backend)."""
    table = tmp_path / "table.json"
    status = main(["--vectors", str(directory), "--json", str(table), *arguments])
    rows = json.loads(table.read_text())["rows"]
    return status, {(row["quantity"], row["backend"]): row for row in rows}


def failing(rows):
    return {quantity for (quantity, _), row in rows.items() if row["verdict"] == "FAIL"}


def changed(path, entry, value=None, place=None):
    """Rewrites a file of vectors with one entry, or one number of it, changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if place is None:
        arrays[entry] = np.asarray(value)
    else:
        array = arrays[entry].copy()
        array[place] = array[place] + np.asarray(value, dtype=array.dtype)
        arrays[entry] = array
    np.savez(path, **arrays)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(RECORDED, tmp_path / "vectors"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Vectors of other seeds, shapes and configurations, from the core."""
    directory = tmp_path_factory.mktemp("others")
    assert main(["--write-vectors", str(directory), "--seed", "11"]) == 0
    return directory


def test_the_recorded_set_is_green(tmp_path):
    pytest.importorskip("torch")
    status, rows = replay(RECORDED, tmp_path, "--backends", "numpy,torch-cpu")
    assert status == 0
    for backend, replayed in (("numpy", range(6)), ("torch-cpu", (*range(6), 8))):
        for k in range(9):
            runs = [q for q, b in rows if b == backend and q.startswith(f"trajectory_{k}.npz: params")]
            assert bool(runs) == (k in replayed)
            assert ((f"trajectory_{k}.npz: run", backend) in rows) == (k not in replayed)
    skipped = rows["trajectory_6.npz: run", "torch-cpu"]
    assert (skipped["verdict"], skipped["note"]) == (
        "skipped",
        "the 'alteggroll' noiser needs eggroll.jax.hyperscale",
    )
    assert rows["trajectory_8.npz: run", "numpy"]["note"] == "NumPy has no bfloat16"
    assert rows["perturbation.npz: A", "torch-cpu"]["max_ulp"] <= 4


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_recorded_set_is_green_on_jax(tmp_path):
    only = "prng,perturbation.npz: A,trajectory_6,trajectory_8"
    status, rows = replay(RECORDED, tmp_path, "--backends", "jax-cpu", "--only", only)
    assert status == 0
    assert all(row["verdict"] == "pass" for row in rows.values())


def test_another_set_is_green(others, tmp_path):
    pytest.importorskip("torch")
    status, rows = replay(others, tmp_path, "--backends", "numpy,torch")
    assert status == 0
    assert not any(row["verdict"] == "skipped" for row in rows.values())


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_of_another_set_is_green_on_jax(others, tmp_path):
    """With a baseline in each group."""
    assert replay(others, tmp_path, "--backends", "jax", "--only", "trajectory_1")[0] == 0


@pytest.mark.parametrize(
    ("file", "entry", "place", "change", "lines"),
    [
        ("prng", "seed", (), 1, {"prng.npz: key"}),
        ("prng", "fold_in.keys", (2, 1), 1, {"prng.npz: fold_in"}),
        ("prng", "split.5", (4, 0), 1, {"prng.npz: split"}),
        ("prng", "bits.33x4", (32, 3), 1, {"prng.npz: bits"}),
        ("prng", "uniform.7", 3, 2.0**-20, {"prng.npz: uniform"}),
        ("prng", "normal_f32.5x3x2", (4, 2, 1), 1e-5, {"prng.npz: normal_f32"}),
        ("prng", "normal_bf16.16", 0, 0.125, {"prng.npz: normal_bf16"}),
        ("prng", "normal_f16.16", 0, 0.125, {"prng.npz: normal_f16"}),
        ("perturbation", "17.A", (0, 0), 1e-4, {"perturbation.npz: A"}),
        ("perturbation", "143.B", (-1, -1), 1e-4, {"perturbation.npz: B"}),
        ("perturbation", "0.dense", (3, 2), 1e-4, {"perturbation.npz: dense"}),
        ("perturbation", "5.key", 1, 1, {f"perturbation.npz: {part}" for part in ("A", "B", "dense")}),
        ("fitness", "4.shaped", 63, 1e-5, {"fitness.npz: eggroll"}),
        ("fitness", "12.shaped", 3, 1e-5, {"fitness.npz: eggrollbs"}),
        ("trajectory_3", "key/1/bias", 0, 1, {"trajectory_3.npz: keys"}),
        ("trajectory_3", "shaped", (5, 15), 1e-4, {"trajectory_3.npz: shaped"}),
        ("trajectory_3", "params6/2/weight", (0, 4), 1e-3, {"trajectory_3.npz: params6"}),
        ("trajectory_3", "params1/0/bias", 0, 1e-3, {"trajectory_3.npz: params1"}),
        ("trajectory_3", "outputs", (4, 0, 0), 1e-2, {"trajectory_3.npz: outputs"}),
        ("trajectory_3", "raw", (2, 7), 1.0, {"trajectory_3.npz: raw", "trajectory_3.npz: shaped"}),
    ],
)
def test_one_changed_number_is_red_on_its_line(file, entry, place, change, lines, copy, tmp_path):
    changed(copy / f"{file}.npz", entry, change, place)
    status, rows = replay(copy, tmp_path, "--backends", "numpy", "--only", f"{file}.npz")
    assert status == 1
    assert failing(rows) == lines


def test_a_case_that_cannot_be_expressed_is_skipped_and_the_others_compared(copy, tmp_path):
    with np.load(RECORDED / "fitness.npz") as file:
        cases = json.loads(str(file["cases"]))
    cases[0]["noiser"] = "novel"
    changed(copy / "fitness.npz", "cases", json.dumps(cases))
    status, rows = replay(copy, tmp_path, "--backends", "numpy", "--only", "fitness")
    assert status == 0
    skipped = rows["fitness.npz: case 0", "numpy"]
    assert (skipped["verdict"], skipped["note"]) == ("skipped", "the shaping of the noiser 'novel' is not known")
    assert rows["fitness.npz: eggroll", "numpy"]["values"] == 8 * 2 + 64 * 3


def test_a_set_of_which_nothing_can_be_replayed_is_not_green(tmp_path, copy):
    configured(copy, solver="lion")
    status, rows = replay(copy, tmp_path, "--backends", "numpy", "--only", "trajectory_0.npz: run")
    assert status == 1
    assert rows["trajectory_0.npz: run", "numpy"]["note"] == "optax.lion has no counterpart here"


def configured(directory, **changes):
    """Rewrites the configuration of trajectory 0 with some of it changed."""
    with np.load(RECORDED / "trajectory_0.npz") as file:
        config = json.loads(str(file["config"]))
    changed(directory / "trajectory_0.npz", "config", json.dumps(config | changes))


def truncated(directory, name):
    (directory / name).write_bytes((RECORDED / name).read_bytes()[:900])


def single(directory, name):
    with (directory / name).open("wb") as file:
        np.save(file, np.ones(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "prng.npz").write_bytes(b"not an archive"), "prng.npz: not an archive of arrays"),
        (lambda d: truncated(d, "prng.npz"), "prng.npz: not an archive of arrays"),
        (lambda d: single(d, "prng.npz"), "prng.npz: must be an archive of arrays (.npz), got a single array"),
        (lambda d: np.savez(d / "weights.npz", a=np.ones(2)), "weights.npz: must be one of prng*.npz"),
        (lambda d: np.savez(d / "prng.npz", a=np.ones(2)), "prng.npz: has no entry 'key'"),
        (lambda d: np.savez(d / "fitness.npz", cases=np.asarray([object()])), "fitness.npz: not an archive of"),
        (lambda d: changed(d / "prng.npz", "bits.7", np.ones(7)), "entry 'bits.7' must be integer, got float64"),
        (lambda d: changed(d / "prng.npz", "split.5", np.ones((4, 2), np.uint32)), "must have the shape (5, 2)"),
        (lambda d: changed(d / "fitness.npz", "cases", "{"), "fitness.npz: entry 'cases' must be a JSON text"),
        (lambda d: changed(d / "fitness.npz", "cases", "[3]"), "fitness.npz: case 0 must be a JSON object, got int"),
        (lambda d: changed(d / "perturbation.npz", "3.A", np.ones((4, 9))), "perturbation.npz: entry '3.A' must"),
        (lambda d: configured(d, N="32"), "'N' is '32', of the wrong type"),
        (lambda d: configured(d, act="gelu"), "'act' must be one of"),
        (lambda d: configured(d, gens=4), "entry 'inputs' must have the shape"),
        (lambda d: configured(d, extra={"warm": 1}), "'extra' has ['warm']"),
        (
            lambda d: changed(d / "trajectory_0.npz", "init/7/weight", np.ones(3)),
            "'init/7/weight' is of no parameter",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(damage, message, copy, capsys):
    damage(copy)
    assert main(["--vectors", str(copy), "--backends", "numpy"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eggroll-parity: error: `--vectors` ")
    assert message in error


def test_a_directory_without_vectors_is_an_error(tmp_path, capsys):
    assert main(["--vectors", str(tmp_path), "--backends", "numpy"]) == 2
    assert "must hold recorded vectors (.npz)" in capsys.readouterr().err


def test_written_vectors_depend_on_the_seed_alone(others, tmp_path):
    assert main(["--write-vectors", str(tmp_path), "--seed", "11"]) == 0
    with np.load(others / "trajectory_0.npz") as one, np.load(tmp_path / "trajectory_0.npz") as other:
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
