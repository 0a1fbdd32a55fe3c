"""What a launch remembers of what Triton compiled, against what Triton itself would launch.

No GPU takes part, and nothing is compiled: where a kernel would run, its arguments are kept.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from eggroll_torch.kernels import launch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CPU = torch.device("cpu")
BUFFER = torch.zeros(64)
IDENTITY = BUFFER.data_ptr(), BUFFER.dtype


@triton.jit
def _kernel(values, size, scale, stride, WIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(values + tl.arange(0, BLOCK) * stride, scale, mask=tl.arange(0, BLOCK) < size)


_tuned = triton.autotune(
    configs=[triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((16, 1), (32, 2))], key=["size"]
)(_kernel)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The warps that each launched kernel was compiled for, the grid and the arguments; without those of trials."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from idle_gpu import IdleDriver, IdleKernel, idle_gpu

    launches: list[Any] = []

    class Compiled(IdleKernel):
        def run(self, x: int, y: int, z: int, *rest: Any) -> None:
            values, *others = rest[6:]  # after the stream, the function, its metadata and hooks
            launches.append((self.options.num_warps, (x, y, z), (values.data_ptr(), values.dtype, *others)))

    def second_is_fastest(driver: IdleDriver) -> Callable[..., list[float]]:
        times = itertools.cycle((2.0, 1.0))
        return lambda call, **options: [next(times)] * 3

    monkeypatch.setattr(IdleDriver, "get_benchmarker", second_is_fastest)
    monkeypatch.setattr(launch, "_found", {})
    with idle_gpu(Compiled):
        yield launches
    _kernel.device_caches.clear()
    _tuned.cache.clear()


def run(kernel: Any = _kernel, values: torch.Tensor = BUFFER, size: int = 48, **others: Any) -> None:
    constants = {"WIDE": True, "DTYPE": tl.float32} | ({"BLOCK": 64} if kernel is _kernel else {}) | others
    launch.launch(kernel, lambda meta: (size // meta["BLOCK"], 2), values, size, 0.5, 1, device=CPU, **constants)


def test_what_is_remembered_is_launched_as_triton_does(launched: list[Any]):
    for _ in range(3):
        run(num_warps=8)
    assert len(launch._found) == 1
    assert launched == [(8, (0, 2, 1), (*IDENTITY, 48, 0.5, 1, True, tl.float32, 64))] * 3


def test_the_configuration_that_was_chosen_is_kept(launched: list[Any]):
    for _ in range(3):
        run(_tuned)
    assert launched == [(2, (1, 2, 1), (*IDENTITY, 48, 0.5, 1, True, tl.float32, 32))] * 3


def test_what_another_thread_has_chosen_meanwhile_is_not_kept(launched: list[Any], monkeypatch: pytest.MonkeyPatch):
    tuned = triton.runtime.Autotuner.run

    def interrupted(kernel: Any, *arguments: Any, **how: Any) -> Any:
        found = tuned(kernel, *arguments, **how)
        kernel.best_config = kernel.configs[0]
        return found

    monkeypatch.setattr(triton.runtime.Autotuner, "run", interrupted)
    for _ in range(2):
        run(_tuned)
    assert launched == [(2, (1, 2, 1), (*IDENTITY, 48, 0.5, 1, True, tl.float32, 32))] * 2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"values": BUFFER[1:]}, id="alignment"),
        pytest.param({"values": BUFFER.to(torch.bfloat16)}, id="dtype"),
        pytest.param({"size": 1}, id="one"),
        pytest.param({"size": 2**31}, id="a wide number"),
        pytest.param({"WIDE": False}, id="a constant"),
        pytest.param({"DTYPE": tl.float16}, id="a type"),
        pytest.param({"num_warps": 2}, id="an option"),
    ],
)
def test_what_the_compiler_distinguishes_is_not_confused(other: dict[str, Any], launched: list[Any]):
    run()
    run(**other)
    run(**other)
    assert len(launch._found) == 2
    assert launched[1] == launched[2] != launched[0]


def test_numbers_that_the_compiler_does_not_know_are_those_of_the_call(launched: list[Any]):
    for scale in (0.5, 1.0):
        launch.launch(_kernel, (1,), BUFFER, 5, scale, 1, device=CPU, WIDE=True, DTYPE=tl.float32, BLOCK=8)
    assert len(launch._found) == 1
    assert [arguments[3] for _, _, arguments in launched] == [0.5, 1.0]


def test_shapes_that_keep_changing_are_forgotten(launched: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_REMEMBERED", 3)
    for size in range(1, 9):
        run(size=size)
        assert len(launch._found) <= 3
    assert [arguments[2] for _, _, arguments in launched] == list(range(1, 9))


def test_a_kernel_that_is_compiled_in_the_background_is_waited_for(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
):
    compile = triton.JITFunction._do_compile

    class Future:
        """As Triton's: it waits where something is asked of the kernel."""

        def __init__(self, *arguments: Any):
            self.arguments = arguments

        def result(self) -> Any:
            return compile(*self.arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.result(), name)

    monkeypatch.setattr(triton.JITFunction, "_do_compile", lambda *arguments: Future(*arguments))
    for _ in range(3):
        run()
    assert launched == [launched[0]] * 3
    assert len(launch._found) == 1


def test_a_kernel_that_failed_is_tried_again(launched: list[Any], monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "_do_compile", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    assert not launch._found
    run()
    assert len(launched) == 1
