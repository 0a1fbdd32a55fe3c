"""Chunks: the numbers do not depend on them, what they need is known, and a population of any size fits."""

from typing import Any

import pytest
import torch
from torch_backend.support import assert_close, assert_same_run, make_trainer, mlp, scores

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import chunking, noise
from eggroll_torch.compiling import Compiler
from eggroll_torch.memory import PeakMemory

X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("size", ["auto", 1, 2, 5, 32, 1000])
@pytest.mark.parametrize("noise_reuse", [0, 2])
def test_the_result_does_not_depend_on_the_chunks(size: Any, noise_reuse: int) -> None:
    def run(chunk_size: Any) -> tuple[EGGROLLTrainer, torch.Tensor]:
        trainer = make_trainer(mlp(4, 6, 2), population_size=32, noise_reuse=noise_reuse, chunk_size=chunk_size)
        for _ in range(2):
            outputs = trainer.ask()(X)
            trainer.tell(-outputs.square().sum((1, 2)))
        return trainer, outputs

    (trainer, outputs), (whole, expected) = run(size), run(None)
    assert_close(outputs, expected, 1e-6)
    assert_same_run(trainer, whole)


@pytest.mark.parametrize(
    ("requested", "multiple", "expected"), [(5, 2, 6), (5, 1, 5), (1, 2, 2), (99, 2, 32), (None, 2, 32)]
)
def test_a_chunk_holds_whole_pairs(requested: Any, multiple: int, expected: int) -> None:
    trainer = make_trainer(mlp(4, 2), population_size=32, noise_reuse=multiple, chunk_size=requested)
    assert trainer.ask().chunk_size(X) == expected


@pytest.mark.parametrize("noise_reuse", [0, 2])
@pytest.mark.parametrize("population_size", [2, 6, 64])
def test_auto_takes_whole_pairs_and_no_more_than_the_population(population_size: int, noise_reuse: int) -> None:
    trainer = make_trainer(mlp(4, 6, 2), population_size=population_size, noise_reuse=noise_reuse, chunk_size="auto")
    size = trainer.ask().chunk_size(X)
    assert 1 <= size <= population_size
    assert size % max(noise_reuse, 1) == 0


def test_auto_fits_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 32)
    sizes = []
    for free in (1, 1 << 20, 4 << 20, 1 << 40):
        monkeypatch.setattr(chunking, "free_memory", lambda device, free=free: free)
        trainer = make_trainer(mlp(32, 64, 8), population_size=256, noise_reuse=2, chunk_size="auto")
        population = trainer.ask()
        size = population.chunk_size(x)
        assert size % 2 == 0
        with PeakMemory() as memory:
            population._run_chunk(population_call(population, x), range(size), Compiler(False))
        assert memory.peak <= free or size == 2
        sizes.append(size)
    assert sizes[0] == 2
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 256


def test_auto_leaves_room_for_the_outputs_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, free = 4 * 256 * 64 * 128, 10 << 20  # of 256 members, 8 MiB
    monkeypatch.setattr(chunking, "free_memory", lambda device: free)
    population = make_trainer(mlp(32, 128), population_size=256, chunk_size="auto").ask()
    x = torch.randn(64, 32)
    population.chunk_size(x)
    with PeakMemory() as memory:
        assert population(x).nbytes == outputs
    assert memory.peak <= free


def population_call(population: Any, x: torch.Tensor) -> Any:
    from eggroll_torch.calls import Call

    return Call("__call__", (x,), {}, False, len(population))


def test_auto_measured_on_a_part_does_not_bind_the_whole() -> None:
    population = make_trainer(mlp(4, 6, 2), population_size=64, noise_reuse=2, chunk_size="auto").ask()
    for part in (next(population.chunks(2)), next(population.chunks(8))):
        assert part.chunk_size(X) == len(part)
    assert population.chunk_size(X) == 64


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("chunk_size", [4, 16, None])
def test_memory_estimate_is_what_a_chunk_takes(chunk_size: Any, per_member: bool) -> None:
    model = mlp(32, 48, 8)
    trainer = make_trainer(model, population_size=64, noise_reuse=2, chunk_size=chunk_size)
    x = torch.randn(64, 16, 32) if per_member else torch.randn(16, 32)
    needed = trainer.memory_estimate(x, per_member=per_member)
    assert trainer.generation == 0
    members = chunk_size or 64
    assert needed.chunk_size == members
    part = next(trainer.ask().chunks(members))
    part.weights.prepare(part.members)
    with PeakMemory() as memory:
        outputs = part(x[:members] if per_member else x, per_member=per_member)
    assert memory.peak / 1.5 <= needed.forward <= memory.peak * 1.5
    assert needed.outputs == 64 * outputs[0].numel() * 4
    assert needed.noise == 4 * 32 * (32 + 48 + 48 + 8 + 48 + 8)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert needed.update == 2 * weights
    assert needed.copies == 2 * weights
    assert needed.peak >= needed.copies + needed.noise + needed.forward


def test_memory_estimate_grows_with_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "KEPT", 1 << 8)
    trainers = [
        make_trainer(mlp(8, 16, 4), population_size=64, noise_reuse=2, chunk_size=size) for size in (1, 2, 4, 16, 64)
    ]
    estimates = [trainer.memory_estimate(X.repeat(2, 2)) for trainer in trainers]
    assert [estimated.chunk_size for estimated in estimates] == [2, 2, 4, 16, 64]
    for part in ("noise", "forward", "peak"):
        values = [getattr(estimated, part) for estimated in estimates]
        assert values == sorted(values)
        assert 0 < values[0] < values[-1]


def test_memory_estimate_without_an_example() -> None:
    needed = make_trainer(mlp(4, 6, 2), population_size=16, chunk_size=4).memory_estimate()
    assert needed.forward == needed.outputs == 0
    assert min(needed.noise, needed.update, needed.copies, needed.peak) > 0


@pytest.mark.parametrize("noise_reuse", [0, 2])
def test_memory_does_not_grow_with_the_population(noise_reuse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "KEPT", 0)  # what is kept of a small population would be all of these
    x = torch.randn(4, 64)

    def peak(population_size: int) -> int:
        trainer = make_trainer(mlp(64, 32), population_size=population_size, noise_reuse=noise_reuse, chunk_size=64)
        population = trainer.ask()
        with PeakMemory() as memory:
            parts = [-part(x).square().sum((1, 2)) for part in population.chunks(64)]
            trainer.tell(torch.cat(parts))
        return memory.peak

    small, large = peak(2**8), peak(2**11)
    assert large <= 1.1 * small + 3 * 8 * 2**11  # a few vectors of as many float64 as members


@pytest.mark.parametrize("kept", [0, 3000, 1 << 22])
def test_noise_that_is_kept_is_bounded_and_changes_nothing(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_trainer(mlp(4, 6, 2), population_size=64)
    expected.ask()
    expected.tell(scores(64))
    monkeypatch.setattr(noise, "KEPT", kept)
    trainer = make_trainer(mlp(4, 6, 2), population_size=64, chunk_size=4)
    population = trainer.ask()
    source = population.weights.source  # type: ignore[attr-defined]
    for part in population.chunks(4):
        part(X)
    assert sum(map(len, source._kept)) * source.numbers_in_a_draw <= kept
    trainer.tell(scores(64))
    assert_same_run(trainer, expected)


@pytest.mark.parametrize("size", [0, -1, 2.5, "auto"])
def test_chunks_refuses_a_size(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`size` must be a positive int"):
        next(make_trainer().ask().chunks(size))


@pytest.mark.parametrize(
    ("members", "most", "size"), [(1024, 450, 342), (1024, 512, 512), (1024, 2000, 1024), (10, 4, 4), (7, 3, 3)]
)
def test_auto_takes_as_many_members_as_fit_in_chunks_of_one_size(
    members: int, most: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunking.Chunking, "_measure", staticmethod(lambda *_: most))
    auto = chunking.Chunking("auto")
    multiple = 2 if members % 2 == 0 else 1
    assert auto.forward(members, multiple, torch.device("cpu"), lambda _: None) == size
    assert auto.noise(members, multiple, 10) == size
