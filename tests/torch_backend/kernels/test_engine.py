"""The population engine and the trainer with the kernels, against the same without them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_backend.kernels.conftest import INTERPRETED

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import kernels, noise, update
from eggroll_torch.kernels import noise as kernels_noise
from eggroll_torch.update import direction

ROWS, TOKENS = 3, 4


class Everything(nn.Module):
    """Parameters whose noise kernels draw in registers (matrices, vectors), and others: a convolution, a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 9)
        self.out = nn.Parameter(torch.randn(9, 5) / 3)  # used the other way round
        self.experts = nn.Parameter(torch.randn(2, 4, 5) / 2)

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index) + self.conv(self.embed(index).mT).mT)
        x = torch.tanh(self.up(x)) @ self.out
        x = x.flatten(-3, -2)
        return torch.bmm(x.expand(2, *x.shape), self.experts.mT)


def trainer_of(dtype: torch.dtype, device: torch.device, **options: Any) -> EGGROLLTrainer:
    torch.manual_seed(0)
    model = Everything().to(device, dtype)
    index = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS).to(device) % 7
    options = {"population_size": 8, "antithetic": True, "rank": 2, "sigma": 0.1, "learning_rate": 0.5} | options
    return EGGROLLTrainer(
        model.parameters(),
        model=model,
        population_fitness_fn=lambda population: population(index).float().flatten(1).square().mean(1),
        seed=3,
        device=device,
        **options,
    )


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "status", lambda device=None, rng="threefry": kernels.Status(False, "off for a test", None, None)
        )
        yield


rngs = pytest.mark.parametrize("rng", ["threefry", "philox"])


@contextlib.contextmanager
def on_the_fly() -> Iterator[None]:
    """A population too large for its noise to be kept: every kernel draws what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "KEPT", 0)
        yield


# With kernels that draw in registers, with noise that a kernel has drawn into memory, and without kernels.
WAYS = (on_the_fly, contextlib.nullcontext, without_kernels)


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """In float32: cuDNN takes TF32 by default, to which numbers one in the last place apart may round apart."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    scale = float(expected.float().abs().max()) or 1.0
    assert float((actual.float() - expected.float()).abs().max()) <= tolerance * scale


def drawn_into_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Of each time that a kernel draws factors into memory, during one generation, for how many draws."""
    draw, calls = kernels_noise.draw_both_factors._init_fn, []

    def counted(keys: Tensor, *rest: Any) -> Tensor:
        calls.append(len(keys))
        return draw(keys, *rest)

    monkeypatch.setattr(kernels_noise.draw_both_factors, "_init_fn", counted)
    trainer_of(torch.bfloat16, device, **options).step()
    return calls


def test_what_no_kernel_draws_is_stored_for_a_chunk(device: torch.device):
    source = trainer_of(torch.float32, device).ask().weights.source  # type: ignore[attr-defined]
    assert set(source.chunk(range(8)).noise) == {"conv.weight", "experts"}


def test_little_noise_is_drawn_once_for_the_forward_pass_and_the_update(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    assert drawn_into_memory(device, monkeypatch) == [4] * 3  # three matrices
    assert drawn_into_memory(device, monkeypatch, chunk_size=4) == [4] * 3


def test_much_noise_of_matrices_is_not_in_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    with on_the_fly():
        assert drawn_into_memory(device, monkeypatch) == []


def test_memory_with_kernels_is_that_of_a_member(device: torch.device):
    """What is drawn once for all members counts once, and not as the first members' own."""
    x = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    few, many = (trainer_of(torch.float32, device, population_size=n, chunk_size="auto") for n in (16, 64))
    estimates = [trainer.memory_estimate(x) for trainer in (few, many)]
    numbers_of_a_draw = 2 * (7 + 6 + 9 + 6 + 9 + 5)  # rank 2
    drawn_once = [4 * draws * numbers_of_a_draw for draws in (8, 32)]
    for found, factors, trainer in zip(estimates, drawn_once, (few, many), strict=True):
        source = trainer.ask().weights.source  # type: ignore[attr-defined]
        assert found.noise == factors + 4 * source.numbers_in_a_draw * source.config.draws
    for_a_member = [found.forward / found.chunk_size for found in estimates]

    assert for_a_member[0] == pytest.approx(for_a_member[1], rel=0.2)


def test_how_much_is_little(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    bytes_of_a_draw = 2 * 2 * (7 + 6 + 9 + 6 + 9 + 5)  # rank 2, bfloat16
    for room, drawn in ((4 * bytes_of_a_draw, 3), (4 * bytes_of_a_draw - 1, 0)):
        monkeypatch.setattr(noise, "KEPT", room / 4)
        with pytest.MonkeyPatch.context() as patch:
            assert len(drawn_into_memory(device, patch)) == drawn


@pytest.mark.parametrize(
    ("dtype", "antithetic", "rng", "chunk_size"),
    [  # each dtype, and each pair of the other options
        (torch.float32, True, "threefry", 4),
        (torch.float32, False, "philox", 4),
        (torch.bfloat16, True, "philox", None),
        (torch.float16, False, "threefry", None),
    ],
)
def test_members_are_those_without_kernels(
    dtype: torch.dtype, antithetic: bool, rng: str, chunk_size: int | None, device: torch.device
):
    x = torch.arange(8 * TOKENS).view(8, 1, TOKENS).to(device) % 7
    outputs, states = [], []
    for way in WAYS:
        with way():
            trainer = trainer_of(dtype, device, antithetic=antithetic, chunk_size=chunk_size, rng=rng)
            population = trainer.ask()
            outputs.append((population(x[0]), population(x, per_member=True)))
            states.append([population.state_dict(index) for index in (0, 5)])
    for found in outputs[:-1]:
        for actual, expected in zip(found, outputs[-1], strict=True):
            close(actual, expected, dtype)
    for found in states[:-1]:
        for with_kernels, plain in zip(found, states[-1], strict=True):
            for name, tensor in plain.items():
                close(with_kernels[name], tensor, dtype)


@pytest.mark.parametrize("way", WAYS[:2], ids=["on the fly", "stored"])
def test_compiled_is_the_same_to_the_bit(way: Any, device: torch.device):
    """The kernels' operations are recorded as they are, for keys and signs of later generations, too."""
    runs = []
    with way():
        for compile in (False, {"backend": "eager"}):
            trainer = trainer_of(torch.bfloat16, device, strict=True, compile=compile)
            trainer.train(3, verbose=False)  # as it is, recorded, replayed
            runs.append([*trainer.fitness_history, *(p.detach().clone() for p in trainer.model.parameters())])
        assert len(trainer._compiler._records) == 1
    for mine, theirs in zip(*runs, strict=True):
        assert mine == theirs if isinstance(mine, float) else torch.equal(mine, theirs)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_run_with_cuda_graphs(chunk_size: int | None, device: torch.device):
    runs = []
    for compile in (False, {"mode": "reduce-overhead"}):
        trainer = trainer_of(torch.float32, device, strict=True, chunk_size=chunk_size, compile=compile)
        trainer.train(6, verbose=False)  # as it is, recorded, warmed up, captured, replayed
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    for mine, theirs in zip(*runs, strict=True):
        close(mine, theirs, torch.float32)


@rngs
def test_factors_of_a_member_are_those_without_kernels(rng: str, device: torch.device):
    frozen = {"out": "frozen", "experts": "frozen"}
    adapters = []
    for way in WAYS:
        with way():
            adapters.append(trainer_of(torch.float32, device, noise=frozen, rng=rng).ask().lora(3))
    for found in adapters[:-1]:
        assert found.keys() == adapters[-1].keys()
        for name, tensor in adapters[-1].items():
            close(found[name], tensor, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "rng"), [(torch.float32, "threefry"), (torch.bfloat16, "philox"), (torch.float16, "threefry")]
)
def test_a_run_is_that_without_kernels(dtype: torch.dtype, rng: str, device: torch.device):
    runs = []
    for way in WAYS:
        with way():
            trainer = trainer_of(dtype, device, rng=rng)
            before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            metrics = [trainer.step() for _ in range(1 if dtype != torch.float32 else 2)]
            runs.append((metrics, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}))
    *others, (expected_metrics, expected_steps) = runs
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for metrics, steps in others:
        for ours, theirs in zip(metrics, expected_metrics, strict=True):
            assert ours["mean_fitness"] == pytest.approx(theirs["mean_fitness"], rel=tolerance)
        for name, step in expected_steps.items():
            if dtype == torch.float32:
                close(steps[name], step, dtype)
            else:
                # Fitness that is rounded otherwise is shaped otherwise: directions agree, not digits.
                cosine = torch.nn.functional.cosine_similarity(
                    steps[name].float().flatten(), step.float().flatten(), dim=0
                )
                assert cosine > 0.98, name


@pytest.mark.parametrize(
    ("dtype", "chunk_size"), [(torch.float32, 4), (torch.bfloat16, None), (torch.bfloat16, 4), (torch.float16, None)]
)
def test_a_fused_step_is_the_step(dtype: torch.dtype, chunk_size: int | None, device: torch.device):
    """Parameters agree to what a narrow one is rounded to: once with kernels and a fused step, else twice."""
    how: dict[str, Any] = {
        "optimizer": functools.partial(torch.optim.SGD, weight_decay=0.1),
        "chunk_size": chunk_size,
    }
    fitness = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for way in WAYS:
        with way():
            plain, fused = (trainer_of(dtype, device, fused=fused, **how) for fused in (False, True))
            versions = [parameter._version for parameter in fused.model.parameters()]
            for trainer in (plain, fused):
                trainer.ask()
                trainer.tell(fitness)
            for ours, theirs in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
                close(ours.detach(), theirs.detach(), dtype)
                assert ours.grad is None
            assert all(p._version > old for p, old in zip(fused.model.parameters(), versions, strict=True))


def test_a_fused_step_has_no_direction_in_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """With kernels not in bfloat16 either, whatever the members of a chunk."""
    trainer = trainer_of(
        torch.bfloat16, device, fused=True, chunk_size=2, noise={"conv.*": "frozen", "experts": "frozen"}
    )
    assert trainer.memory_estimate().update == 0
    in_place = []

    def counted(source: Any, parameter: Any, *how: Any) -> Any:
        in_place.append(parameter.name)
        raise AssertionError

    monkeypatch.setattr(update, "_new_total", counted)
    population = trainer.ask()
    for part in population.chunks(2):
        part(torch.zeros(1, TOKENS, dtype=torch.long, device=device))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.tell(torch.linspace(-1, 1, 8))
    assert in_place == []
    for name in ("embed.weight", "norm.weight", "up.weight", "up.bias", "out"):
        assert not torch.equal(before[name], trainer.model.get_parameter(name)), name


def test_what_is_summed_at_once_has_its_direction_in_its_own_dtype(device: torch.device):
    """A float32 sum beside a bfloat16 matrix would be twice as large, and be read and written once more."""
    source = trainer_of(torch.bfloat16, device).ask().weights.source  # type: ignore[attr-defined]
    weights = torch.randn(8)
    at_once = direction(source, weights, [range(8)])
    in_parts = direction(source, weights, [range(4, 8), range(4)])
    wide = {name for name, found in at_once.items() if found.dtype == torch.float32}
    assert wide == {"conv.weight", "experts"}
    for name, found in in_parts.items():
        assert found.dtype == torch.float32
        close(at_once[name], found, torch.bfloat16)


def test_autocast(device: torch.device):
    x = torch.arange(TOKENS).view(1, TOKENS).to(device) % 7
    outputs = []
    for way in WAYS:
        with way():
            population = trainer_of(torch.float32, device).ask()
            with torch.autocast(device.type, torch.bfloat16):
                outputs.append(population(x))
    for found in outputs:
        assert found.dtype == torch.bfloat16
        close(found, outputs[-1], torch.bfloat16)
