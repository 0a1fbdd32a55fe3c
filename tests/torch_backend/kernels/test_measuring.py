"""The benchmark of the kernels measures what it says, on small sizes: on a GPU, or by an invented clock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_backend.kernels.support import ON_GPU

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generation

    if not ON_GPU:

        def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> tuple[float, int]:
            for _ in range(3):  # as it is, recorded, replayed
                run()
            return 1.0, 8

        monkeypatch.setattr(gpu_generation, "milliseconds", milliseconds)
        monkeypatch.setattr(gpu_generation, "busy", lambda run: (run(), 1.0)[1])
        monkeypatch.setattr(gpu_generation, "CUDA_GRAPH", {"backend": "eager"})
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 20))
    return gpu_generation


@pytest.mark.parametrize(("rank", "shared"), [(1, False), (4, True)])
def test_a_layer(rank: int, shared: bool, device: torch.device, benchmark: Any, capsys: pytest.CaptureFixture):
    found = benchmark.measure(benchmark.Case(32, 8, rank, shared), device)
    from gpu_cases import FORWARDS

    assert "left out" not in capsys.readouterr().err
    ways = {"forward, one kernel", "forward, library", "update, one kernel", "update, library"}
    named = {"pure inference", "two products", "generation", "generation, CUDA graph", "generation, GPU busy"}
    assert set(found["milliseconds"]) == named | set(FORWARDS) | (set() if shared else ways)
    assert found["full-rank ES"]["members"] == 8


def test_full_rank_takes_fewer_members_where_not_all_fit(
    device: torch.device, benchmark: Any, monkeypatch: pytest.MonkeyPatch
):
    milliseconds, tried = benchmark.milliseconds, []

    def short(run: Any, device: torch.device, repeats: int) -> tuple[float, int]:
        tried.extend(run.args)
        if run.args[0] > 2:
            raise torch.OutOfMemoryError("full")
        return milliseconds(run, device, repeats)

    monkeypatch.setattr(benchmark, "milliseconds", short)
    model = torch.nn.Linear(64, 64, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(8, 1, 64, device=device, dtype=torch.bfloat16)
    members, _ = benchmark.full_rank(benchmark.Case(64, 8, 1, False), model, x, device)
    assert (members, tried) == (2, [8, 4, 2])


def test_the_mlp(device: torch.device, benchmark: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "MLP_MEMBERS", 8)
    monkeypatch.setattr(benchmark, "MLP_WIDTH", 16)
    monkeypatch.setattr(benchmark, "MLP_ROWS", 4)
    monkeypatch.setattr(benchmark, "MLP_CHUNK", 4)
    found = benchmark.measure_mlp(device)
    assert set(found["milliseconds"]) - {"EvoX"} == {"pure inference", "generation", "generation, CUDA graph"}
    assert torch.get_float32_matmul_precision() == "highest"
