"""A GPU that does nothing, on which Triton launches what nobody compiled: what the host does, up to the driver."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

__all__ = ["IdleDriver", "IdleKernel", "idle_gpu"]


class IdleDriver:
    """What Triton asks before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda call, **options: [1.0] * 3


class IdleKernel(CompiledKernel):
    """What stands for a kernel that was compiled with these options."""

    module = function = packed_metadata = None

    def __init__(self, options: Any):
        self.options = options

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        """Called with the grid, the stream, the function, its metadata, hooks, and the kernel's arguments."""


@contextlib.contextmanager
def idle_gpu(kernel_class: Callable[[Any], IdleKernel] = IdleKernel) -> Iterator[None]:
    """Within it Triton finds such a GPU, and `kernel_class` in the place of what its compiler makes."""

    def compiled(kernel: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, *rest: Any) -> Any:
        return kernel.device_caches[device][0].setdefault(key, kernel_class(options))

    with (
        patch.object(triton.runtime.driver, "_active", IdleDriver()),
        patch.object(triton.JITFunction, "_do_compile", compiled),
    ):
        yield
