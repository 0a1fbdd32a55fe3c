"""The benchmark of the kernels where it cannot run, and what it makes of figures."""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_generation.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can run")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "There is no CUDA device here: nothing was measured and nothing written.\n"
    assert not list(tmp_path.iterdir())


def test_the_report_of_invented_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Device time is short: a report must not fail after the measuring."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generation

    times = {"pure inference": 2.0, "two products": 3.0, "generation": 6.0, "generation, GPU busy": 4.0}
    times["generation, CUDA graph"] = 5.0
    forwards = {
        "forward, drawn": 2.5,
        "forward, Philox": 2.4,
        "forward, stored": 2.2,
        "forward, one kernel": 2.5,
        "forward, library": 3.0,
        "update, one kernel": 2.0,
        "update, library": 1.0,
    }
    full = {"members": 8, "milliseconds of all": 99.0}
    cases = {}
    for case in gpu_generation.all_cases():
        # What does not fit is missing: every method does somewhere.
        there = {name: time for name, time in (times | forwards).items() if case.width < 8192 or name != "generation"}
        sizes = {"width": case.width, "members": case.members, "rank": case.rank, "shared": case.shared}
        found = {"milliseconds": there, "bytes": dict.fromkeys(there, 5_000_000), "full-rank ES": full}
        cases[case.name] = {**sizes, **found}
    cases[case.name]["full-rank ES"] = None
    cases["mlp"] = {"members": 65_536, "milliseconds": {"generation": 2.0, "EvoX": 30.0}, "bytes": {}}
    machine = {"device": "an invented GPU", "torch": "2", "triton": "3", "python": "3"}
    report = {"machine": machine, "ceilings": {"TFLOP/s": 700.0, "GB/s": 3000.0}, "cases": cases}

    gpu_generation.write(report, tmp_path)
    table = (tmp_path / "gpu_generation.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == len(cases)  # and the head, without the MLP
    assert "| 0.80 |" in table
    assert "| 0.50 | 5.000 | 0.60 | 4.000 | 0.75 | 5 (46 %) | 99.0 (8) |" in table
    assert "1.20 at d = 1024, 1.20 at d = 4096, 1.20 at d = 8192" in table
    assert "of the update with the library's product over that of one kernel, medians of cases: 0.50 at" in table
    assert "EvoX 30.0 ms (15.0 times a generation here)" in table
    assert (tmp_path / "gpu_generation.png").stat().st_size > 10_000
    gpu_generation.write(report | {"cases": {"mlp": cases["mlp"]}}, tmp_path)  # what is measured with `--only mlp`


def test_what_is_measured_anew_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generation
    import gpu_report

    target, other = itertools.islice((case.name for case in gpu_generation.all_cases()), 2)
    measured: list[str] = []

    def measure(case: Any, device: torch.device) -> dict:
        measured.append(case.name)
        return {"milliseconds": {"generation": float(len(measured))}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_generation, "machine", lambda device: {"device": "an invented GPU"})
    monkeypatch.setattr(gpu_generation.kernels, "status", lambda device: SimpleNamespace(triton="3", reason=""))
    monkeypatch.setattr(gpu_generation, "ceilings", lambda device: {})
    monkeypatch.setattr(gpu_generation, "measure", measure)
    for module in (gpu_generation, gpu_report):
        monkeypatch.setattr(module, "table", lambda report: "")
    monkeypatch.setattr(gpu_report, "plots", lambda report, out: None)
    for arguments in ([target], [other], [target], [target, "--fresh"]):
        monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--only", *arguments])
        assert gpu_generation.main() == 0
    assert measured == [target, other, target]
    report = json.loads((tmp_path / "gpu_generation.json").read_text())
    assert {name: case["milliseconds"]["generation"] for name, case in report["cases"].items()} == {
        target: 3.0,
        other: 2.0,
    }


def test_what_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generation

    def fails() -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(gpu_generation, "milliseconds", lambda run, device, repeats: (run(), 0))
    runs = {"bad": lambda: fails, "unprepared": fails, "good": lambda: lambda: 1.5}
    assert gpu_generation.timed(runs, "a case", torch.device("cpu")) == {"good": (1.5, 0)}
    said = capsys.readouterr().err.splitlines()
    assert said == [f"a case: {name} is left out: ImportError: no such library" for name in ("bad", "unprepared")]


def test_a_layer_whose_work_no_profiler_sees_is_measured_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Containers may forbid a profiler. And the noise of a full-rank population may not fit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generation

    nothing = SimpleNamespace(key_averages=list)
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: contextlib.nullcontext(nothing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(gpu_generation, "methods", lambda *arguments: {"generation": lambda: lambda: None})

    def milliseconds(run: Any, device: torch.device, repeats: int) -> tuple[float, int]:
        if repeats == 3:
            raise torch.OutOfMemoryError("no room")
        return 1.0, 8

    monkeypatch.setattr(gpu_generation, "milliseconds", milliseconds)
    case = gpu_generation.Case(4, 2, 1, False)
    found = gpu_generation.measure(case, torch.device("cpu"))
    assert found["milliseconds"] == {"generation": 1.0}
    assert found["full-rank ES"] is None
    assert capsys.readouterr().err.splitlines() == [
        f"{case.name}: generation, GPU busy is left out: RuntimeError: the profiler does not see the GPU",
        f"{case.name}: full-rank ES is left out: OutOfMemoryError: no room",
    ]
