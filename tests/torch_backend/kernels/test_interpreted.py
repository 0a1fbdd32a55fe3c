"""Runs the tests of this folder in Triton's interpreter, in a few processes that share the files."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_backend.kernels.conftest import NEED_KERNELS

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels cannot be interpreted"
)


@pytest.mark.slow
@pytest.mark.parametrize("names", [NEED_KERNELS[start::4] for start in range(4)], ids=" ".join)
def test_in_the_interpreter(names: list[str]):
    paths = [HERE / name for name in names]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    chosen = {"TRITON_INTERPRET": "1", "EGGROLL_KERNELS": "interpret", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, paths)],
        cwd=HERE.parents[2],
        env=inherited | chosen,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
