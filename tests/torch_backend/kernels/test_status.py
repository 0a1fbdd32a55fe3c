"""Which path runs is decided without importing Triton for nothing, and is said once."""

import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from eggroll_torch import kernels


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out before is found out anew, and nothing found here stays."""
    monkeypatch.delenv("EGGROLL_KERNELS", raising=False)
    caches = (kernels._status, kernels._checked, kernels._triton, kernels._say)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    triton: str | None = "3.7.1",
    interprets: bool = False,
    capability: tuple[int, int] | None = None,
    problems: dict[str, str] | None = None,
) -> None:
    """A machine that has this Triton, and a GPU of this capability on which the kernels have problems."""

    def imported(name: str) -> object:
        if triton is None:
            raise ImportError("No module named 'triton'")
        return SimpleNamespace(
            __version__=triton, knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=interprets))
        )

    monkeypatch.setattr(kernels, "importlib", SimpleNamespace(import_module=imported))
    monkeypatch.setattr(kernels, "_problem", lambda device, rng: (problems or {}).get(rng))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_a_gpu_that_can(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, capability=(9, 0))
    found = kernels.status()
    assert found == kernels.Status(
        True,
        "Triton compiles the kernels for the GPU, where they agree with the core",
        "3.7.1",
        "Some GPU, capability 9.0",
    )
    assert kernels.status("cuda:0") == found
    assert not kernels.status("cpu").available
    assert not kernels.usable(torch.zeros(1))


@pytest.mark.parametrize(
    ("machine", "wish", "reason"),
    [
        ({"triton": None, "capability": (9, 0)}, None, r"Triton cannot be imported \(No module named 'triton'\)"),
        ({"capability": (7, 5)}, None, "Some GPU, capability 7.5, is below 8.0"),
        ({}, None, "tensors are on a cpu device, not on a CUDA one"),
        ({"capability": (9, 0)}, "off", "EGGROLL_KERNELS=off"),
        ({"interprets": True}, None, "TRITON_INTERPRET is set, but not EGGROLL_KERNELS=interpret"),
        ({}, "interpret", "tensors are on a cpu device, not on a CUDA one"),
    ],
)
def test_what_is_missing_is_named(machine: dict, wish: str | None, reason: str, monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, **machine)
    if wish:
        monkeypatch.setenv("EGGROLL_KERNELS", wish)
    found = kernels.status()
    assert not found.available
    assert found.device is None
    assert re.fullmatch(f"{reason}: the PyTorch path runs", found.reason)


def test_kernels_that_are_wrong_are_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pretend(monkeypatch, capability=(9, 0), problems={"threefry": "fold_in is off by 1.0e+00 of the largest number"})
    for _ in range(2):
        assert kernels.status() == kernels.Status(
            False,
            "on Some GPU, capability 9.0, fold_in is off by 1.0e+00 of the largest number: the PyTorch path runs",
            "3.7.1",
            None,
        )
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["kernels: fold_in is off by 1.0e+00 of the largest number: the PyTorch path runs instead"]


def test_each_generator_answers_for_itself(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, capability=(9, 0), problems={"philox": "draw_rows by philox raises"})
    assert kernels.status().available
    assert not kernels.status(rng="philox").available
    assert kernels.status(rng="philox").reason.startswith("on Some GPU, capability 9.0, draw_rows by philox raises")
    pretend(monkeypatch, capability=(9, 0))
    kernels._checked.cache_clear()
    assert kernels.status(rng="philox") == kernels.status()


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        kernels, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(__version__="2.1.0"))
    )
    assert kernels.status().reason == "Triton 2.1.0 is too old: the PyTorch path runs"
    assert kernels.status().triton == "2.1.0"


def test_the_interpreter_on_request(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, interprets=True)
    monkeypatch.setenv("EGGROLL_KERNELS", "interpret")
    assert kernels.status().device == "interpreter"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.usable(torch.zeros(1, dtype=dtype))
    for dtype in (torch.float64, torch.int32, torch.complex64):
        assert not kernels.usable(torch.zeros(1, dtype=dtype))


def test_a_wish_that_nobody_knows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EGGROLL_KERNELS", "yes")
    with pytest.raises(ValueError, match="`EGGROLL_KERNELS` must be 'auto', 'interpret' or 'off', got 'yes'"):
        kernels.status()


def test_it_is_said_once_and_in_the_debug_log_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pretend(monkeypatch)
    with caplog.at_level(logging.DEBUG, "eggroll"):
        for _ in range(3):
            kernels.usable(torch.zeros(1))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("eggroll", "DEBUG")
    assert record.getMessage() == "kernels: tensors are on a cpu device, not on a CUDA one: the PyTorch path runs"


def test_the_backend_runs_where_triton_is_not_installed():
    program = """
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError("No module named 'triton'", name="triton")

        sys.meta_path.insert(0, Block())
        import torch
        from eggroll.torch import EGGROLLTrainer
        from eggroll_torch import kernels

        model = torch.nn.Linear(3, 2)
        trainer = EGGROLLTrainer(model.parameters(), model=model, population_size=4, seed=0)
        assert trainer.tell(trainer.ask()(torch.ones(3)).sum(1))["generation"] == 1
        assert kernels.status().triton is None
        assert not kernels.usable(torch.ones(1))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_backend_imports_no_kernel():
    program = "import sys, eggroll.torch, eggroll_torch.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    loaded = done.stdout.split()
    assert "eggroll_torch.kernels" in loaded
    assert not [name for name in loaded if name.startswith("eggroll_torch.kernels.")]
