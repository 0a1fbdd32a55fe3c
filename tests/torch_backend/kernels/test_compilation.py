"""Every kernel compiles for the GPUs it is meant for, with Triton's own assembler, where no GPU is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Shared memory that a program may have, bytes.
ROOM = {80: 163 << 10, 90: 227 << 10}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing compiles its kernels"
    ),
]


@pytest.fixture(scope="module", params=ROOM, ids=lambda capability: f"sm_{capability}")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiling.py")), str(request.param)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_kernels_fit_a_gpu(kernels: list[dict[str, Any]]):
    assert {kernel["kernel"] for kernel in kernels} == {
        "_fold_in_kernel",
        "_rows_kernel",
        "_factors_kernel",
        "_members_kernel",
        "_dense_sum_kernel",
        "_project_kernel",
        "_linear_kernel",
        "_update_kernel",
    }
    for kernel in kernels:
        assert kernel["shared"] <= ROOM[kernel["capability"]], kernel
        assert kernel["stack"] <= 256, kernel
        # A tile of the largest size holds as many sums as there are registers to spare; smaller ones are tried too.
        assert kernel["spills_in_loops"] <= (24 if kernel["options"].get("BLOCK_N") == 256 else 0), kernel


def test_the_compiler_fuses_nothing_on_its_own(kernels: list[dict[str, Any]]):
    assert not [kernel for kernel in kernels if kernel["fusible"]]


def test_narrow_products_run_on_the_tensor_cores(kernels: list[dict[str, Any]]):
    for kernel in kernels:
        narrow = any(dtype in kernel["case"] for dtype in ("bfloat16", "float16", "tf32"))
        if kernel["kernel"] in {"_linear_kernel", "_update_kernel"} and narrow:
            assert kernel["warp_groups" if kernel["capability"] == 90 else "tensor_cores"] > 0, kernel


def test_no_thread_draws_what_another_draws(kernels: list[dict[str, Any]]):
    """A number takes twenty rotations. Copies of a number must not be drawn again by each thread that holds one."""
    checked = 0
    for kernel in kernels:
        if kernel["kernel"] == "_project_kernel" and "drawn" in kernel["case"]:
            rank = int(kernel["case"].partition("rank ")[2].partition(",")[0] or 1)
            numbers = rank * kernel["options"]["BLOCK_K"] / (32 * kernel["options"]["num_warps"])
            assert 20 * numbers <= kernel["rotations"] <= 25 * numbers + 40, kernel
            checked += 1
    assert checked > 2
