"""Where the kernels' tests run: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported anywhere in the process, and other tests may have imported
it. So without a GPU the tests of this folder run in processes of their own, which `test_interpreted.py` starts, and
are not collected otherwise. To run some of them by hand:

    TRITON_INTERPRET=1 EGGROLL_KERNELS=interpret python -m pytest tests/torch_backend/kernels -k linear
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEED_NO_KERNEL = {
    "test_status.py",
    "test_benchmark.py",
    "test_compilation.py",
    "test_interpreted.py",
    "test_launch.py",
}
NEED_THE_INTERPRETER = {"test_far_addresses.py", "test_memory_checks.py"}
NEED_KERNELS = sorted({path.name for path in Path(__file__).parent.glob("test_*.py")} - NEED_NO_KERNEL)

if INTERPRETED:
    from torch_backend.kernels import memory_checks
    from triton.runtime import interpreter

    collect_ignore = sorted(NEED_NO_KERNEL)
    # Half of the interpreter's time goes into whether a sum of integers overflows, and it drops what it finds.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    memory_checks.install()
    # Has PyTorch fill new memory with what is not a number, which shows where a kernel reads what nobody has written.
    torch.use_deterministic_algorithms(True, warn_only=True)
elif torch.cuda.is_available():
    collect_ignore = ["test_interpreted.py", *sorted(NEED_THE_INTERPRETER)]
else:
    collect_ignore = NEED_KERNELS


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
