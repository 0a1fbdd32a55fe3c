"""The step of plain SGD, taken where the direction is summed: the same run, without a direction in memory."""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch_backend.support import assert_close, assert_identical, make_trainer, mlp, run_state, scores
from torch_backend.test_update import Zoo

from eggroll_torch import chunking
from eggroll_torch.memory import PeakMemory

MEMBERS = 12
WIDE = [torch.float32, torch.float64]
NARROW = [torch.bfloat16, torch.float16]

DECAYING = functools.partial(torch.optim.SGD, weight_decay=0.2)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimizer": DECAYING},
    {"optimizer": functools.partial(torch.optim.SGD, maximize=True, weight_decay=0.1)},
    {"chunk_size": 4},
    {"chunk_size": 4, "optimizer": DECAYING},
    {"noise_reuse": 2, "rank": 3, "gradient_scale": "unbiased"},
    {"rng": "philox", "fitness_shaping": "centered_rank"},
]


def run(model: nn.Module, generations: int = 3, **options: Any) -> Any:
    trainer = make_trainer(model, population_size=MEMBERS, **{"learning_rate": 0.3} | options)
    for generation in range(generations):
        trainer.ask()
        trainer.tell(scores(MEMBERS, generation))
    return trainer


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("dtype", WIDE + NARROW, ids=str)
def test_the_run_is_that_of_the_optimizer(dtype: torch.dtype, options: dict[str, Any]):
    torch.manual_seed(0)
    start = Zoo(dtype)
    expected, fused, still = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    run(expected, **options)
    run(fused, fused=True, **options)
    # Narrow parameters are rounded once for a step instead of twice.
    tolerance = 1e-6 if dtype in WIDE else 4 * torch.finfo(dtype).eps
    for parameter, other, before in zip(fused.parameters(), expected.parameters(), still.parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), tolerance)
        if parameter.numel() > 1:  # a narrow number alone may be too large for its step
            assert torch.equal(parameter, before) != parameter.requires_grad


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_parameters_are_rounded_once(dtype: torch.dtype):
    """A step is the one of float32 parameters of the same values, rounded."""
    torch.manual_seed(0)
    model = Zoo(dtype)
    wide = copy.deepcopy(model).float()
    run(wide, generations=1, optimizer=DECAYING)
    run(model, generations=1, optimizer=DECAYING, fused=True)
    for parameter, exact in zip(model.parameters(), wide.parameters(), strict=True):
        half = torch.finfo(dtype).eps * 0.51  # and what a sum in another order may change
        assert bool(((parameter.float() - exact).abs() <= half * exact.abs() + 1e-6).all())


def test_there_is_no_gradient():
    trainer = run(Zoo(), fused=True, generations=1)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_gradient_that_was_there_is_cleared_like_by_the_optimizer():
    def with_gradients() -> nn.Module:
        model = mlp(3, 4, 2)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return model

    fused, plain = run(with_gradients(), fused=True), run(with_gradients())
    for parameter, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), 1e-6)
        assert parameter.grad is None


def test_a_step_that_is_broken_off_says_so_and_keeps_the_gradients(monkeypatch: pytest.MonkeyPatch):
    from eggroll_torch import trainer as module

    trainer = make_trainer(fused=True)
    gradients = [torch.ones_like(parameter) for parameter in trainer.model.parameters()]
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        parameter.grad = gradient

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module.update, "_add_sum_", out_of_memory)
    trainer.ask()
    with pytest.raises(torch.OutOfMemoryError, match="no room") as caught:
        trainer.tell(scores())
    assert "parameters may have taken a part of it" in caught.value.__notes__[0]
    assert all(p.grad is g for p, g in zip(trainer.model.parameters(), gradients, strict=True))
    assert trainer.generation == 0


@pytest.mark.parametrize("chunk_size", [None, 256])
def test_small_steps_are_not_rounded_away(chunk_size: int | None):
    """A parameter that took the terms of the sum one by one would lose them: each is far below its last place."""

    def step(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)).to(dtype)
        how = {"learning_rate": 0.01, "sigma": 1e-3, "chunk_size": chunk_size, "population_size": 4096}
        trainer = make_trainer(model, fused=fused, **how)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        trainer.ask()
        trainer.tell(scores(4096))
        return [(p.detach() - b).double() for p, b in zip(model.parameters(), before, strict=True)]

    exact = step(torch.float64, False)

    def worst(fused: bool) -> float:
        return max(
            float((found - true).norm() / true.norm())
            for found, true in zip(step(torch.float32, fused), exact, strict=True)
        )

    plain, fused = worst(False), worst(True)
    assert plain < 0.01
    assert fused == pytest.approx(plain, rel=0.5)  # added term by term it would be twenty times as much


def test_groups_step_by_their_own_rates():
    def trained(fused: bool) -> nn.Module:
        model = mlp(3, 4, 2)
        first, second = list(model[0].parameters()), list(model[2].parameters())
        groups = [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.5, "weight_decay": 0.1}]
        run(model, params=groups, fused=fused)
        return model

    for parameter, other in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_memory_formats_and_transposed_parameters(chunk_size: int | None):
    def trained(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).to(memory_format=torch.channels_last)
        model[1].weight = nn.Parameter(torch.randn(4, 5).mT)
        assert not model[0].weight.is_contiguous()
        assert not model[1].weight.is_contiguous()
        run(model, fused=fused, chunk_size=chunk_size)
        return model

    model = trained(True)
    for parameter, other in zip(model.parameters(), trained(False).parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), 1e-6)
        assert parameter.stride() == other.stride()


def test_what_was_not_used_stays():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    before = copy.deepcopy(model)
    trainer = make_trainer(model, fused=True, unused="ignore", optimizer=DECAYING, learning_rate=0.5)
    trainer.ask()(torch.ones(3))
    trainer.tell(scores())
    assert torch.equal(model.idle.weight, before.idle.weight)
    assert not torch.equal(model.used.weight, before.used.weight)


@pytest.mark.parametrize("passed", [{}, {"snapshots": False}], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(passed: dict[str, Any]):
    model = mlp(3, 4, 2)
    trainer = run(model, fused=True, **passed)
    halfway = copy.deepcopy((trainer.state_dict(), model.state_dict()))
    run_on = copy.deepcopy(model)
    for generation in range(3, 6):
        trainer.ask()
        trainer.tell(scores(MEMBERS, generation))
    resumed = make_trainer(run_on, population_size=MEMBERS, learning_rate=0.3, fused=True, **passed)
    run_on.load_state_dict(halfway[1])
    resumed.load_state_dict(halfway[0])
    for generation in range(3, 6):
        resumed.ask()
        resumed.tell(scores(MEMBERS, generation))
    assert_identical(run_state(resumed), run_state(trainer))


@pytest.mark.parametrize("on", ["trainer", "optimizer"])
def test_learning_rate_schedulers(on: str):
    trainer = make_trainer(mlp(3, 4, 2), fused=True, learning_rate=0.5)
    same = make_trainer(mlp(3, 4, 2), learning_rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [
            torch.optim.lr_scheduler.StepLR(one if on == "trainer" else one.optimizer, 1, 0.1)
            for one in (trainer, same)
        ]
        for generation in range(3):
            for one, scheduler in zip((trainer, same), schedulers, strict=True):
                one.ask()
                one.tell(scores(seed=generation))
                scheduler.step()
    for parameter, other in zip(trainer.model.parameters(), same.model.parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), 1e-6)


class Loud(torch.optim.SGD):
    """SGD of another class."""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": torch.optim.AdamW}, ValueError, "`fused` needs `optimizer` to be torch.optim.SGD, got AdamW"),
        ({"optimizer": Loud}, ValueError, "`fused` needs `optimizer` to be torch.optim.SGD, got Loud"),
        (
            {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9)},
            ValueError,
            "`fused` needs SGD without momentum, got momentum=0.9",
        ),
        ({"fused": 1}, TypeError, "`fused` must be a bool, got 1"),
    ],
)
def test_other_optimizers_are_refused(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make_trainer(**{"fused": True} | options)


def test_a_group_with_momentum_is_refused():
    model = mlp(3, 4, 2)
    trainer = make_trainer(model, params=model[0].parameters(), fused=True)
    with pytest.raises(ValueError, match=r"momentum=0\.5"):
        trainer.add_param_group({"params": model[2].parameters(), "momentum": 0.5})
    assert len(trainer.param_groups) == 1
    trainer.ask()
    trainer.param_groups[0]["momentum"] = 0.5
    before = run_state(trainer)
    with pytest.raises(ValueError, match=r"momentum=0\.5"):
        trainer.tell(scores())
    assert_identical(run_state(trainer), before)
    trainer.param_groups[0]["momentum"] = 0
    assert trainer.tell(scores())["generation"] == 1
    trainer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"momentum=0\.5"):
        trainer.ask()  # before anything is scored


def test_a_state_with_momentum_is_refused():
    with_momentum = make_trainer(optimizer=functools.partial(torch.optim.SGD, momentum=0.9)).state_dict()
    trainer = make_trainer(fused=True)
    before = run_state(trainer)
    with pytest.raises(ValueError, match=r"momentum=0\.9"):
        trainer.load_state_dict(with_momentum)
    assert_identical(run_state(trainer), before)
    trainer.ask()


def test_a_stack_of_empty_matrices():
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.z = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a.mT + self.z.sum()

    for fused in (False, True):
        trainer = make_trainer(Empty(), fused=fused, noise={"z": "low_rank"}, unused="ignore")
        trainer.ask()
        assert trainer.tell(scores())["generation"] == 1


def test_a_bad_shaping_changes_nothing():
    trainer = make_trainer(fused=True, fitness_shaping=lambda fitness: fitness[:2])
    before = run_state(trainer)
    trainer.ask()
    with pytest.raises(ValueError, match="fitness_shaping"):
        trainer.tell(scores())
    assert_identical(run_state(trainer), before)


def memory_of_a_generation(**options: Any) -> tuple[float, float]:
    """Bytes of two generations beyond the activations, relative to the weights: at their peak, and afterwards."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    x = torch.ones(4, 1024)
    with PeakMemory() as memory:
        trainer = make_trainer(model, noise_reuse=2, **options)
        for generation in range(2):
            population = trainer.ask()
            outputs = population(x)
            activations = 2 * outputs.numel() * outputs.element_size()  # of two layers
            del outputs
            trainer.tell(scores(seed=generation))
        return (memory.peak - activations) / weights, memory.live / weights


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_memory_beyond_weights_and_activations(chunk_size: int | None):
    """Noise of the population and what the sum copies of it, and nothing in the size of the weights."""
    peak, left = memory_of_a_generation(fused=True, snapshots=False, chunk_size=chunk_size)
    assert peak < 0.05
    assert left < 0.001
    with_directions, gradients = memory_of_a_generation(snapshots=False, chunk_size=chunk_size)
    assert 2 > with_directions > 1.9  # the gradient of the generation before is there until the step
    assert 1 <= gradients < 1.001
    with_everything, kept = memory_of_a_generation(chunk_size=chunk_size)
    assert with_everything > 3.9
    assert 3 <= kept < 3.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_estimate_knows_what_is_kept(fused: bool, dtype: torch.dtype):
    model = mlp(4, 6, 2).to(dtype)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    needed = make_trainer(model, fused=fused, snapshots=False).memory_estimate()
    assert needed.copies == 0
    wide, narrow = 4 * numbers, 2 * numbers
    expected = {
        (True, torch.float32): 0,
        (False, torch.float32): 2 * wide,
        (True, torch.bfloat16): wide,
        (False, torch.bfloat16): wide + 2 * narrow,
    }
    assert needed.update == expected[fused, dtype]


def test_ctrl_c_waits_for_the_step(monkeypatch: pytest.MonkeyPatch):
    """A step that has begun is finished: no parameter has taken it while another has not."""
    import signal

    from eggroll_torch import trainer as module

    whole = run(mlp(3, 4, 2), generations=1, fused=True)
    trainer = make_trainer(mlp(3, 4, 2), population_size=MEMBERS, learning_rate=0.3, fused=True)
    summed = module.update._add_sum_

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        summed(*args)

    monkeypatch.setattr(module.update, "_add_sum_", interrupted)
    trainer.ask()
    with pytest.raises(KeyboardInterrupt):
        trainer.tell(scores(MEMBERS))
    assert_identical(dict(trainer.model.state_dict()), dict(whole.model.state_dict()))
    assert trainer.generation == 1


def test_chunks_of_one_pair_add_to_the_parameters_without_losing_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunking, "_NOISE", 1)
    expected = run(mlp(3, 4, 2), generations=1)
    found = run(mlp(3, 4, 2), generations=1, fused=True, chunk_size=1)
    for parameter, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(parameter.detach(), other.detach(), 1e-6)
