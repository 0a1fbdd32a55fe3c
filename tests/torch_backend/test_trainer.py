"""The trainers: one run whichever way it is driven, cut and resumed, and that it learns."""

import copy
import functools
import io
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch_backend.support import (
    assert_close,
    assert_identical,
    assert_same_run,
    mlp,
    quadratic,
    run_state,
    scores,
)

import eggroll
import eggroll.torch
from eggroll.torch import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer

INPUTS = torch.linspace(-1, 1, 15).view(5, 3)
TARGETS = INPUTS.sum(1, keepdim=True).sin().expand(5, 2)


def loss_of_member(model: nn.Module) -> Tensor:
    return -(model(INPUTS) - TARGETS).square().mean()


def loss_of_population(population: Any) -> Tensor:
    return -(population(INPUTS) - TARGETS).square().mean(dim=(1, 2))


class MyESTrainer(ESTrainer):
    """That of the README of eggroll-trainer."""

    def sample_perturbations(self, population_size: int) -> Tensor:
        return torch.randn(population_size, self.current_params.shape[0], device=self.device)

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        weights = (fitnesses - fitnesses.mean()) / fitnesses.std()
        return (weights[:, None] * perturbations).mean(dim=0)


def make(kind: type = EGGROLLTrainer, model: nn.Module | None = None, **options: Any) -> Any:
    model = mlp(3, 4, 2) if model is None else model
    options = {"params": model.parameters(), "model": model, "population_size": 8, "seed": 0, **options}
    return kind(**options)


every_trainer = pytest.mark.parametrize("kind", [EGGROLLTrainer, VanillaESTrainer, MyESTrainer])


def test_the_names_users_import():
    for name in ("EGGROLLTrainer", "ESTrainer", "VanillaESTrainer"):
        assert getattr(eggroll, name) is getattr(eggroll.torch, name)
        assert name in eggroll.torch.__all__


# One run, whichever way it is driven.


@every_trainer
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_ways_to_score_give_the_same_run(kind: type, chunk_size: int | None):
    one_by_one = make(kind, fitness_fn=loss_of_member, chunk_size=chunk_size)
    all_at_once = make(kind, population_fitness_fn=loss_of_population, chunk_size=chunk_size)
    asked = make(kind, chunk_size=chunk_size)
    by_context = make(kind, chunk_size=chunk_size)
    for trainer in (one_by_one, all_at_once):
        trainer.train(4, verbose=False)
    for _ in range(4):
        asked.tell(loss_of_population(asked.ask()))
        population = by_context.ask()
        fitness = []
        for i in range(len(population)):
            with population.member(i) as model, torch.no_grad():
                fitness.append(loss_of_member(model))
        by_context.tell(torch.stack(fitness))
    assert_identical(run_state(asked), run_state(all_at_once))
    assert_identical(run_state(by_context), run_state(one_by_one))
    assert_same_run(all_at_once, one_by_one, 1e-5)


@pytest.mark.parametrize(
    "form", [list, tuple, torch.tensor, lambda f: torch.tensor(f).numpy(), lambda f: torch.tensor(f).double()]
)
def test_fitness_may_come_as_a_list_a_tensor_or_an_array(form: Callable[[list[float]], Any]):
    trainer, other = make(), make()
    fitness = [float(i % 3) for i in range(8)]
    for each, told in ((trainer, form(fitness)), (other, fitness)):
        each.ask()
        each.tell(told)
    assert_identical(run_state(trainer), run_state(other))


@every_trainer
def test_the_seed_decides_the_run(kind: type):
    def run(seed: Any) -> Any:
        torch.rand(3)  # the state of the global generator must not matter
        trainer = make(kind, fitness_fn=quadratic, seed=seed)
        trainer.train(2, verbose=False)
        return run_state(trainer)["parameters"]

    assert_identical(run(7), run(7))
    assert_identical(run((0, 7)), run(7))
    assert_identical(run(torch.tensor([0, 7])), run(7))
    assert_identical(run(np.array(7)), run(7))
    assert_identical(run((3, 5)), run(3 * 2**32 + 5))
    for other in (8, 7 + 2**32, (7, 0)):
        assert not torch.equal(run(other)["0.weight"], run(7)["0.weight"])


@every_trainer
def test_without_a_seed_the_global_generator_decides(kind: type):
    with torch.random.fork_rng(devices=[]):
        keys = []
        for global_seed in (1, 1, 2):
            torch.manual_seed(global_seed)
            keys.append(make(kind, seed=None).seed)
    assert keys[0] == keys[1] != keys[2]


@every_trainer
def test_the_global_generator_is_left_alone(kind: type):
    trainer = make(kind, fitness_fn=quadratic)
    before = torch.get_rng_state()
    trainer.train(2, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 50])
@pytest.mark.parametrize("options", [{}, {"noise_reuse": 2, "rank": 2}, {"rng": "philox", "rank": 3}], ids=str)
def test_the_chunk_size_does_not_change_the_run(chunk_size: int, options: dict[str, Any]):
    for score in ({"fitness_fn": loss_of_member}, {"population_fitness_fn": loss_of_population}):
        whole, chunked = make(**options, **score), make(**options, **score, chunk_size=chunk_size)
        for trainer in (whole, chunked):
            trainer.train(5, verbose=False)
        assert_same_run(chunked, whole, 1e-5)


def test_equally_shaped_layers_have_noise_of_their_own():
    model = mlp(16, 16, 16, 16)
    trainer = make(model=model, population_size=4)
    population = trainer.ask()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noise = {
        (name, i): (population.state_dict(i)[name] - own[name]).flatten()
        for name in own
        for i in range(4)
        if name.endswith("weight")
    }
    places = list(noise)
    for a, first in enumerate(places):
        for second in places[a + 1 :]:
            correlation = torch.corrcoef(torch.stack([noise[first], noise[second]]))[0, 1]
            # A rank-1 matrix of 16 x 16 has a correlation of about 1 / 16 with another; equal noise has 1.
            assert abs(float(correlation)) < 0.5, (first, second)


def test_a_generation_has_noise_of_its_own_and_a_lifetime():
    def perturbations(**options: Any) -> list[Tensor]:
        trainer = make(learning_rate=1e-12, **options)
        own = trainer.model[0].weight.detach().clone()
        seen = []
        for _ in range(4):
            seen.append(trainer.ask().state_dict(0)["0.weight"] - own)
            trainer.tell(scores())
        return seen

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=1e-5)

    a, b, c, d = perturbations()
    assert not any(same(x, y) for x, y in ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d)))
    a, b, c, d = perturbations(noise_lifetime=2)
    assert same(a, b)
    assert same(c, d)
    assert not same(b, c)
    a, b, c, d = perturbations(noise_lifetime=None)
    assert same(a, b)
    assert same(a, d)


def test_antithetic_members_mirror_each_other():
    trainer = make(noise_reuse=2)
    population = trainer.ask()
    own = trainer.model.state_dict()
    for pair in range(4):
        plus, minus = population.state_dict(2 * pair), population.state_dict(2 * pair + 1)
        for name, tensor in own.items():
            assert_close((plus[name] + minus[name]) / 2, tensor, 1e-6)
            assert float((plus[name] - minus[name]).abs().max()) > 1e-3


def test_sigma_may_change_between_generations():
    trainer = make(fitness_fn=quadratic)
    distances = []
    for sigma in (0.1, 0.4, 0.2):
        trainer.sigma = sigma
        population = trainer.ask()
        trainer.sigma = 9.0  # counts from the next ask on
        distances.append(
            float((population.state_dict(0)["0.bias"] - trainer.model[0].bias.detach()).abs().max()) / sigma
        )
        trainer.tell(scores())
    assert all(0.3 < distance < 4 for distance in distances)
    assert trainer.sigma == 9.0


def _move_to_the_other_group(trainer: EGGROLLTrainer) -> None:
    trainer.param_groups[1]["params"].append(trainer.param_groups[0]["params"].pop(0))


CHANGES: dict[str, Callable[[EGGROLLTrainer], Any]] = {
    "sigma": lambda trainer: setattr(trainer, "sigma", 0.3),
    "the sigma of a group": lambda trainer: trainer.param_groups[0].update(sigma=0.3),
    "its rank": lambda trainer: trainer.param_groups[0].update(rank=3),
    "its noise": lambda trainer: trainer.param_groups[0].update(noise="dense"),
    "a group": _move_to_the_other_group,
    "what needs a gradient": lambda trainer: trainer.model[0].weight.requires_grad_(False),
    "a dtype": lambda trainer: trainer.model.to(torch.bfloat16),
    "a shape": lambda trainer: setattr(trainer.model[0].weight, "data", torch.ones(4, 5)),
    "the kind of a layer": lambda trainer: setattr(trainer.model, "stack", _as_convolution(trainer.model.stack)),
    "the key": lambda trainer: trainer.load_state_dict({**trainer.state_dict(), "key": [1, 2]}),
    "the generation": lambda trainer: setattr(trainer, "generation", 7),
}


def _as_convolution(stack: nn.Module) -> nn.Module:
    """A convolution with the weights of another module."""
    convolution = nn.Conv1d(3, 4, 2, bias=False)
    convolution.weight = stack.weight
    return convolution


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_generations_counts(change: str):
    """What is kept from one generation for the next is not what the change was about."""
    model = mlp(3, 4, 2)
    model.stack = nn.Module()
    model.stack.weight = nn.Parameter(torch.zeros(4, 3, 2))
    groups = [
        {"params": model[0].parameters()},
        {"params": [*model[2].parameters(), model.stack.weight], "sigma": 1.0},
    ]
    trainer = make(model=model, params=groups, noise_dtype="param")
    for _ in range(2):
        trainer.ask()
        trainer.tell(scores())
    as_it_was = copy.deepcopy(trainer)
    CHANGES[change](trainer)
    anew = copy.deepcopy(trainer)  # which keeps nothing
    members, expected, before = (of.ask().state_dict(3) for of in (trainer, anew, as_it_was))
    assert_identical(members, expected)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in members.items())


# What a generation tells.


@every_trainer
def test_metrics(kind: type):
    trainer = make(kind)
    assert trainer.best_fitness == -math.inf
    trainer.ask()
    first = trainer.tell([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert first == {
        "generation": 1,
        "mean_fitness": 4.5,
        "std_fitness": pytest.approx(math.sqrt(5.25)),
        "max_fitness": 8.0,
        "best_fitness": 8.0,
    }
    trainer.ask()
    second = trainer.tell([0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert (second["generation"], second["max_fitness"], second["best_fitness"]) == (2, 4.0, 8.0)
    assert trainer.fitness_history == [4.5, 0.5]


@every_trainer
def test_train_says_how_it_went(kind: type):
    trainer = make(kind, fitness_fn=quadratic)
    trainer.train(2, verbose=False)
    result = trainer.train(3, verbose=False)
    assert result == {
        "generation": 5,
        "best_fitness": trainer.best_fitness,
        "fitness_history": trainer.fitness_history,
    }
    assert len(result["fitness_history"]) == 5
    assert trainer.train(0, verbose=False)["generation"] == 5


def test_the_progress_bar_shows_mean_and_best(capfd: pytest.CaptureFixture[str]):
    trainer = make(fitness_fn=quadratic)
    trainer.train(3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert f"mean={trainer.fitness_history[-1]:.4g}" in err
    assert f"best={trainer.best_fitness:.4g}" in err
    trainer.train(3, verbose=False)
    assert capfd.readouterr() == ("", "")


@every_trainer
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_best_model_is_the_best_member(kind: type, chunk_size: int | None):
    members = []

    def fitness_fn(model: nn.Module) -> float:
        fitness = float(loss_of_member(model))
        members.append((fitness, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return fitness

    options = {"rank": 3} if kind is EGGROLLTrainer else {}
    trainer = make(kind, fitness_fn=fitness_fn, chunk_size=chunk_size, sigma=0.3, **options)
    assert_identical(dict(trainer.get_best_model().state_dict()), dict(trainer.model.state_dict()))
    trainer.train(5, verbose=False)
    best_fitness, best_state = max(members, key=lambda member: member[0])
    best = trainer.get_best_model()
    assert trainer.best_fitness == best_fitness
    assert_identical(dict(best.state_dict()), best_state)
    assert loss_of_member(best).item() == trainer.best_fitness
    assert best is not trainer.model
    with torch.no_grad():
        best[0].weight.zero_()
    assert_identical(dict(trainer.get_best_model().state_dict()), best_state)


def test_the_best_model_of_a_population_call():
    trainer = make(population_fitness_fn=loss_of_population, sigma=0.3)
    trainer.train(5, verbose=False)
    assert loss_of_member(trainer.get_best_model()).item() == pytest.approx(trainer.best_fitness, rel=1e-5)
    assert trainer.best_fitness > loss_of_member(mlp(3, 4, 2)).item()


def test_the_best_model_of_a_pruned_one():
    """Its weight is computed, and no parameter."""
    model = mlp(3, 4, 2)
    prune.random_unstructured(model[0], "weight", 0.5)
    trainer = make(model=model, population_fitness_fn=loss_of_population)
    trainer.step()
    assert loss_of_member(trainer.get_best_model()).item() == pytest.approx(trainer.best_fitness, rel=1e-5)


@every_trainer
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_reset_goes_back_to_the_start(kind: type, optimizer: Any):
    trainer = make(kind, fitness_fn=quadratic, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer, 0.5)

    def run() -> dict[str, Any]:
        trainer.train(3, verbose=False)
        return run_state(trainer)

    start = run_state(trainer)
    first = run()
    scheduler.step()
    trainer.sigma = 0.7
    trainer.ask()
    trainer.reset()
    assert_identical(run_state(trainer), start)
    assert_identical(dict(trainer.get_best_model().state_dict()), start["parameters"])
    assert_identical(run(), first)


def test_zero_grad():
    trainer = make(fitness_fn=quadratic)
    trainer.step()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    trainer.zero_grad()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.step()
    trainer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in trainer.model.parameters())


# A real optimizer takes the step.


OPTIMIZERS: list[tuple[Any, Any]] = [
    (torch.optim.SGD, lambda params: torch.optim.SGD(params, lr=0.05)),
    (torch.optim.AdamW, lambda params: torch.optim.AdamW(params, lr=0.05)),
    (
        functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    ),
    (lambda params, lr: torch.optim.RMSprop(params, lr=lr), lambda params: torch.optim.RMSprop(params, lr=0.05)),
]


@every_trainer
@pytest.mark.parametrize(("factory", "reference"), OPTIMIZERS, ids=["SGD", "AdamW", "momentum", "a function"])
def test_the_step_is_that_of_the_optimizer(kind: type, factory: Any, reference: Any):
    trainer = make(kind, fitness_fn=quadratic, optimizer=factory, learning_rate=0.05)
    copied = copy.deepcopy(trainer.model)
    optimizer = reference(copied.parameters())
    for _ in range(3):
        trainer.step()
        for mine, theirs in zip(copied.parameters(), trainer.model.parameters(), strict=True):
            mine.grad = theirs.grad.clone()
        optimizer.step()
        assert_identical(dict(trainer.model.state_dict()), dict(copied.state_dict()))
    assert trainer.state == trainer.optimizer.state
    assert trainer.param_groups is trainer.optimizer.param_groups


def test_groups_have_their_own_options():
    model = mlp(3, 4, 2)
    before = copy.deepcopy(model.state_dict())
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [model[2].weight], "lr": 0.2},
        {"params": [model[2].bias]},
    ]
    trainer = make(model=model, params=groups, learning_rate=0.1, fitness_fn=quadratic)
    assert [group["lr"] for group in trainer.param_groups] == [0.0, 0.2, 0.1]
    trainer.step()
    after = model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    for name, lr in (("2.weight", 0.2), ("2.bias", 0.1)):
        gradient = model.get_parameter(name).grad
        assert_close(after[name], before[name] - lr * gradient, 1e-6)
    trainer.learning_rate = 0.5
    assert {group["lr"] for group in trainer.param_groups} == {0.5}
    assert trainer.learning_rate == 0.5


def test_groups_and_named_parameters_leave_the_noise_as_it_is():
    model = mlp(3, 4, 2)
    plain = make(fitness_fn=quadratic)
    grouped = make(
        model=model, params=[{"params": [p]} for p in reversed(list(model.parameters()))], fitness_fn=quadratic
    )
    named_model = mlp(3, 4, 2)
    named = make(model=named_model, params=named_model.named_parameters(), fitness_fn=quadratic)
    for trainer in (plain, grouped, named):
        trainer.train(2, verbose=False)
    assert_identical(dict(grouped.model.state_dict()), dict(plain.model.state_dict()))
    assert_identical(dict(named.model.state_dict()), dict(plain.model.state_dict()))


@pytest.mark.parametrize("on", ["trainer", "its optimizer"])
@pytest.mark.parametrize("kind", [EGGROLLTrainer, VanillaESTrainer])
def test_learning_rate_schedulers(kind: type, on: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make(kind, fitness_fn=quadratic, learning_rate=0.8)
        scheduler = torch.optim.lr_scheduler.StepLR(trainer if on == "trainer" else trainer.optimizer, 2, gamma=0.5)
        seen = []
        for _ in range(5):
            before = trainer.model[0].bias.detach().clone()
            trainer.step()
            seen.append(trainer.learning_rate)
            step = trainer.model[0].bias.detach() - before
            assert_close(step, -seen[-1] * trainer.model[0].bias.grad, 1e-4)
            scheduler.step()
    assert seen == [0.8, 0.8, 0.4, 0.4, 0.2]


def test_schedulers_with_ask_and_tell_and_those_that_change_momentum():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make(optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(trainer, max_lr=0.5, total_steps=4)
        momenta = []
        for _ in range(3):
            trainer.ask()
            trainer.tell(scores())
            scheduler.step()
            momenta.append(trainer.param_groups[0]["momentum"])
    assert len(set(momenta)) > 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, functools.partial(torch.optim.AdamW, weight_decay=0.5)])
def test_frozen_parameters_stay(optimizer: Any):
    model = mlp(3, 4, 2)
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)  # left over from something else
    before = copy.deepcopy(model.state_dict())
    trainer = make(model=model, fitness_fn=quadratic, optimizer=optimizer)
    assert torch.equal(trainer.ask().state_dict(0)["0.weight"], before["0.weight"])
    trainer.train(3, verbose=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("0."), name


def test_parameters_that_are_not_given_stay():
    model = mlp(3, 4, 2)
    before = copy.deepcopy(model.state_dict())
    make(model=model, params=model[2].parameters(), fitness_fn=quadratic).train(2, verbose=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("0."), name


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, functools.partial(torch.optim.AdamW, weight_decay=0.5)])
def test_freeze_nonlora_trains_matrices_only(optimizer: Any):
    model = mlp(3, 4, 2)
    before = copy.deepcopy(model.state_dict())
    trainer = make(model=model, fitness_fn=quadratic, freeze_nonlora=True, optimizer=optimizer)
    assert torch.equal(trainer.ask().state_dict(0)["0.bias"], before["0.bias"])
    trainer.train(2, verbose=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith("bias"), name


def test_freezing_a_parameter_leaves_the_noise_of_the_others():
    model, partly = mlp(3, 4, 2), mlp(3, 4, 2)
    partly[0].weight.requires_grad_(False)
    a, b = make(model=model).ask().state_dict(1), make(model=partly).ask().state_dict(1)
    for name in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(a[name], b[name])


def test_freezing_and_thawing_between_generations():
    model = mlp(3, 4, 2)
    trainer = make(model=model, fitness_fn=quadratic, optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
    trainer.step()
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        before = copy.deepcopy(model.state_dict())
        trainer.step()
        assert torch.equal(model.state_dict()["0.weight"], before["0.weight"]) == frozen
        assert not torch.equal(model.state_dict()["2.weight"], before["2.weight"])


def test_a_run_of_which_parts_are_frozen_goes_on_where_the_same_are():
    trainer, other = (make(model=mlp(3, 4, 2), fitness_fn=quadratic) for _ in range(2))
    for each in (trainer, other):
        each.step()
        each.model[0].requires_grad_(False)
    trainer.step()
    other.model.load_state_dict(trainer.model.state_dict())
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for each in (trainer, other):
        each.step()
    assert_identical(run_state(other), run_state(trainer))


def test_reset_takes_back_what_was_learned_by_what_is_frozen_now():
    trainer = make(model=mlp(3, 4, 2), fitness_fn=quadratic)
    start = copy.deepcopy(dict(trainer.model.state_dict()))
    trainer.step()
    trainer.model[0].requires_grad_(False)
    trainer.step()
    trainer.reset()
    assert_identical(dict(trainer.model.state_dict()), start)


def test_adding_named_parameters():
    model = mlp(3, 4, 2)
    trainer = make(model=model, params=model[2].named_parameters())
    trainer.add_param_group({"params": model[0].named_parameters()})
    assert [group["param_names"] for group in trainer.param_groups] == [["weight", "bias"]] * 2
    trainer.ask()
    trainer.tell(scores())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_numbers_of_numpy_are_numbers():
    assert make(noise_reuse=np.int64(2)).config.antithetic is True
    assert make(noise_reuse=np.int64(1)).config.antithetic is False


def test_adding_a_group():
    model = mlp(3, 4, 2)
    start = copy.deepcopy(model.state_dict())
    trainer = make(model=model, params=model[2].parameters(), fitness_fn=quadratic, sigma=0.01, learning_rate=1.0)
    trainer.step()
    best = trainer.best_fitness
    trainer.ask()
    with pytest.raises(RuntimeError, match="between two generations only"):
        trainer.add_param_group({"params": model[0].parameters()})
    trainer.tell([best - 1.0] * 7 + [best - 2.0])
    trainer.add_param_group({"params": model[0].parameters(), "lr": 2.0})
    trainer.ask()
    trainer.tell(best - 1.0 - scores().abs())
    assert not torch.equal(model[0].weight, start["0.weight"])
    # The best member is still that of the first generation, when the added layer was as it was at the start.
    assert quadratic(trainer.get_best_model()) == best == trainer.best_fitness
    trainer.reset()
    assert_identical(dict(model.state_dict()), dict(start))
    assert [group["lr"] for group in trainer.param_groups] == [1.0, 2.0]


@every_trainer
def test_a_copy_of_a_trainer_goes_on_by_itself(kind: type):
    trainer = make(kind, fitness_fn=quadratic, optimizer=torch.optim.Adam)
    torch.optim.lr_scheduler.StepLR(trainer, 1)
    trainer.train(2, verbose=False)
    before = run_state(trainer)
    copied = copy.deepcopy(trainer)
    copied.train(2, verbose=False)
    assert_identical(run_state(trainer), before)
    trainer.train(2, verbose=False)
    assert_identical(run_state(copied), run_state(trainer))


@every_trainer
def test_a_trainer_can_be_pickled_and_copied_while_a_generation_is_open(kind: type):
    trainer = make(kind, fitness_fn=quadratic)
    trainer.step()
    trainer.ask()
    copies = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    trainer.step()
    for copied in copies:
        copied.step()
        assert_identical(run_state(copied), run_state(trainer))
        assert copied.seed == trainer.seed


@every_trainer
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("around", ["the score", "the step"])
def test_inference_mode(kind: type, around: str, per_member: bool):
    """Who knows that nothing needs a gradient may say so, as around any other evaluation."""

    def fitness(population: Population) -> Tensor:
        x = torch.linspace(-1, 1, 3)
        x = x.expand(len(population), 3) if per_member else x
        return population(x, per_member=per_member).sum(1)

    expected = make(kind, population_fitness_fn=fitness)
    expected.train(2, verbose=False)
    scored = torch.inference_mode()(fitness) if around == "the score" else fitness
    trainer = make(kind, population_fitness_fn=scored)
    for _ in range(2):
        with torch.inference_mode(around == "the step"):
            trainer.step()
    for parameter, other in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(parameter, other)
    one_by_one = make(kind, fitness_fn=torch.inference_mode()(lambda model: float(model(torch.ones(3)).sum())))
    one_by_one.train(2, verbose=False)
    assert one_by_one.generation == 2


# Interrupted and resumed.


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_trainer
@pytest.mark.parametrize("passed", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("open_generation", [False, True], ids=["between", "within"])
def test_a_resumed_run_equals_the_uninterrupted_one(kind: type, passed: Any, optimizer: Any, open_generation: bool):
    options: dict[str, Any] = {"noise_lifetime": 2, "noise_reuse": 2} if kind is EGGROLLTrainer else {}
    if kind is EGGROLLTrainer and open_generation:
        options["rng"] = "philox"  # with either generator, in half of the cases each

    def start(seed: int) -> tuple[Any, Any]:
        trainer = make(kind, fitness_fn=quadratic, optimizer=optimizer, seed=seed, **options)
        return trainer, torch.optim.lr_scheduler.StepLR(trainer, 2, gamma=0.5)

    def run(trainer: Any, scheduler: Any, generations: int) -> None:
        for _ in range(generations):
            trainer.sigma = trainer.sigma * 0.9
            trainer.step()
            scheduler.step()

    whole, whole_scheduler = start(5)
    run(whole, whole_scheduler, 7)

    first, first_scheduler = start(5)
    run(first, first_scheduler, 3)
    if open_generation:
        first.ask()
    saved = passed(
        {
            "model": first.model.state_dict(),
            "trainer": first.state_dict(),
            "scheduler": first_scheduler.state_dict(),
        }
    )
    run(first, first_scheduler, 1)  # what is saved must not follow

    second, second_scheduler = start(99)
    second.step()
    second.ask()
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["trainer"])
    second_scheduler.load_state_dict(saved["scheduler"])
    assert second.generation == 3
    run(second, second_scheduler, 4)
    assert_identical(run_state(second), run_state(whole))
    assert_identical(dict(second.get_best_model().state_dict()), dict(whole.get_best_model().state_dict()))


# It learns.


@every_trainer
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_it_finds_the_top_of_a_quadratic(kind: type, optimizer: Any):
    model = nn.Linear(3, 2)
    lr = {
        torch.optim.SGD: {EGGROLLTrainer: 0.3, MyESTrainer: 0.3, VanillaESTrainer: 0.03}[kind],
        torch.optim.Adam: 0.1,
    }
    trainer = make(
        kind,
        model,
        fitness_fn=quadratic,
        population_size=32,
        learning_rate=lr[optimizer],
        optimizer=optimizer,
        sigma=0.1,
    )
    before = quadratic(model)
    trainer.train(60, verbose=False)
    assert quadratic(model) > before / 20


def test_it_learns_to_classify_from_accuracy_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = (x @ torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.9, -0.9]])).argmax(-1)

    def correct(outputs: Tensor) -> Tensor:
        return (outputs.argmax(-1) == y).float().mean(dim=-1)

    model = mlp(2, 3, seed=1)
    trainer = make(
        model=model,
        population_fitness_fn=lambda population: correct(population(x)),
        population_size=64,
        noise_reuse=2,
        learning_rate=0.1,
        sigma=0.2,
        optimizer=torch.optim.Adam,
    )
    with torch.no_grad():
        assert float(correct(model(x))) < 0.6
        trainer.train(40, verbose=False)
        assert float(correct(model(x))) > 0.95


# Memory.


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_the_memory_of_a_generation_does_not_grow_with_the_population():
    """Peak memory of a process for 100 and for 300 members, in chunks of 8."""
    program = """
        import torch
        from eggroll.torch import EGGROLLTrainer

        model = torch.nn.Linear(100, 100, bias=False)
        model.scale = torch.nn.Parameter(torch.ones(50_000))  # 0.2 MB of dense noise for a member
        for members in (100, 300):
            trainer = EGGROLLTrainer(
                model.parameters(), model=model, population_size=members, chunk_size=8, seed=0, unused="ignore"
            )
            trainer.ask()
            trainer.tell(torch.arange(float(members)))
            print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
            del trainer
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    few, many = map(int, done.stdout.split())
    # The first 80 or so members' noise is kept. That of 200 more would be 40 MB. The allocator adds up to ten.
    assert many < few + 20_000


# Full rank.


@pytest.mark.parametrize("change", ["shifted", "scaled", "sigma"])
def test_full_rank_steps_do_not_depend_on_the_unit_of_fitness(change: str):
    def trained(change: str) -> dict[str, Tensor]:
        trainer = VanillaESTrainer((model := mlp(3, 2)).parameters(), model=model, population_size=8, seed=0)
        trainer.ask()
        fitness = torch.arange(8.0, dtype=torch.float64).sin() * 1e3
        if change == "shifted":
            fitness = fitness + 1e9
        elif change == "scaled":
            fitness = fitness * 1e25
        elif change == "sigma":
            trainer.sigma = 0.2  # counts from the next `ask` on
        trainer.tell(fitness)
        assert trainer.sigma == (0.2 if change == "sigma" else 0.1)
        return dict(model.state_dict())

    for name, tensor in trained("nothing").items():
        assert_close(trained(change)[name], tensor, 1e-6)
