"""Every kernel compiles for the GPUs it is meant for, with Triton's own assembler, where no GPU is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Shared memory that a program may have, bytes. That of capability 8.6, 8.9 and 12.0, whose code is like that of 8.0.
ROOM = {80: 99 << 10, 90: 227 << 10}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing compiles its kernels"
    ),
]


@pytest.mark.parametrize("capability", ROOM, ids=lambda capability: f"sm_{capability}")
def test_every_kernel_compiles(capability: int, tmp_path: Path):
    """One test for a capability: it takes half a minute, and what is checked takes none."""
    kernels = compiled_for(capability, tmp_path)
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
        check_that_it_fits(kernel)
        # LLVM has marked every product and sum as not to be fused, see `normals.normal_of_bits`.
        assert kernel["fusible"] == 0, kernel
    products = [kernel for kernel in kernels if kernel["kernel"] in {"_linear_kernel", "_update_kernel"}]
    large = [kernel for kernel in products if "of ones" not in kernel["case"]]
    narrow = [kernel for kernel in large if any(word in kernel["case"] for word in ("float16", "tf32"))]
    assert len(narrow) > 5
    for kernel in narrow:
        assert kernel["warp_groups" if capability == 90 else "tensor_cores"] > 0, kernel
    for way, check in [("drawn", check_threefry), ("drawn by philox", check_philox)]:
        projections = [
            kernel
            for kernel in kernels
            if kernel["kernel"] == "_project_kernel" and kernel["case"].endswith(f", {way}")
        ]
        assert len(projections) > 2
        for kernel in projections:
            check(kernel, numbers_of_a_thread(kernel))


def compiled_for(capability: int, cache: Path) -> list[dict[str, Any]]:
    """What `compiling.py` prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiling.py")), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_that_it_fits(kernel: dict[str, Any]) -> None:
    assert kernel["shared"] <= ROOM[kernel["capability"]], kernel
    assert kernel["stack"] <= 256, kernel
    # A tile of the largest size holds as many sums as there are registers to spare; smaller ones are tried too.
    assert kernel["spills_in_loops"] <= (24 if kernel["options"].get("BLOCK_N") == 256 else 0), kernel


def numbers_of_a_thread(kernel: dict[str, Any]) -> float:
    """How many a thread of a projection has to draw. Copies must not be drawn again by each thread that holds one."""
    rank = int(kernel["case"].partition("rank ")[2].partition(",")[0] or 1)
    return rank * kernel["options"]["BLOCK_K"] / (32 * kernel["options"]["num_warps"])


def check_threefry(kernel: dict[str, Any], numbers: float) -> None:
    """A number takes twenty rotations."""
    assert 20 * numbers <= kernel["rotations"] <= 25 * numbers + 40, kernel


def check_philox(kernel: dict[str, Any], numbers: float) -> None:
    """A block takes twenty products, less what is known of the first, and no thread draws less than a block."""
    blocks = max(numbers / 4, 1)
    assert 15 * blocks <= kernel["wide_products"] <= 20 * blocks + 75, kernel
