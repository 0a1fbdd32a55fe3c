"""Noise by name pattern and by parameter group: kind, rank and sigma of single parameters."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch_backend.support import assert_close, assert_identical, make_trainer, run_state, scores

from eggroll import EggrollConfig
from eggroll.fitness import shape_fitness
from eggroll.perturbation import member_parameter, parameter_keys
from eggroll.prng import key
from eggroll.torch import EGGROLLTrainer

MEMBERS = 8
SEED = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 6, 3)
        self.experts = nn.Parameter(torch.randn(2, 5, 6))
        self.head = nn.Linear(5, 3)


def model_of(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def groups_of(model: nn.Module, options: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Parameter groups, of which one holds the named parameter alone and has `options`."""
    rest = [parameter for other, parameter in model.named_parameters() if other != name]
    return [{"params": rest}, {"params": [model.get_parameter(name)], **options}]


def expected_noise(model: nn.Module, name: str, kind: str, rank: int, sigma: float, generation: int) -> torch.Tensor:
    """``W_i - W`` of all members by the formula of `eggroll.perturbation`."""
    config = EggrollConfig(population_size=MEMBERS, rank=rank, sigma=sigma, antithetic=True)
    parameter = model.get_parameter(name).detach()
    keys = parameter_keys(key(SEED, xp=torch_namespace()), [other for other, _ in model.named_parameters()])
    if kind == "low_rank" and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d):
        matrix = parameter.flatten(1)
    else:
        matrix = parameter
    stack = matrix.ndim - 2 if kind == "low_rank" else 0
    zero = torch.zeros_like(matrix)
    members = [
        member_parameter(zero, keys[name], generation, i, config, low_rank=kind == "low_rank", stack_axes=stack)
        for i in range(MEMBERS)
    ]
    return torch.stack(members).view(MEMBERS, *parameter.shape)


def torch_namespace() -> Any:
    import array_api_compat.torch as xp

    return xp


CHOICES = [
    ("head.weight", {"rank": 3}, "low_rank", 3, 0.1),
    ("head.weight", {"sigma": 0.5}, "low_rank", 1, 0.5),
    ("head.weight", {"noise": "dense", "sigma": 0.02, "rank": 2}, "dense", 1, 0.02),
    ("head.bias", {"sigma": 0.7}, "dense", 1, 0.7),
    ("embedding.weight", {"noise": "dense"}, "dense", 1, 0.1),
    ("embedding.weight", {"noise": "low_rank", "rank": 2, "sigma": 1.5}, "low_rank", 2, 1.5),
    ("convolution.weight", {"noise": "dense"}, "dense", 1, 0.1),
    ("convolution.weight", {"rank": 4}, "low_rank", 4, 0.1),
    ("experts", {"rank": 2, "sigma": 0.3}, "low_rank", 2, 0.3),
    ("experts", {"noise": "dense"}, "dense", 1, 0.1),
]


@pytest.mark.parametrize("way", ["pattern", "group", "both"])
@pytest.mark.parametrize(("name", "options", "kind", "rank", "sigma"), CHOICES)
def test_members_and_direction_follow_the_formula(
    name: str, options: dict[str, Any], kind: str, rank: int, sigma: float, way: str
) -> None:
    model = model_of()
    pattern = name.replace("weight", "w*t")
    given: dict[str, Any] = {"params": model.parameters(), "noise": {pattern: options, "*": {}}}
    if way == "group":
        given = {"params": groups_of(model, options, name)}
    elif way == "both":  # a pattern goes first, the group completes it
        pattern_options = dict([next(iter(options.items()))])
        group = {**options, **dict.fromkeys(pattern_options.keys() & {"sigma"}, 9.0)}
        given = {"params": groups_of(model, group, name), "noise": {pattern: pattern_options}}
    trainer = EGGROLLTrainer(
        model=model, population_size=MEMBERS, sigma=0.1, seed=SEED, noise_reuse=2, learning_rate=1.0, **given
    )
    for generation in range(2):
        before = copy.deepcopy(model)
        population = trainer.ask()
        noise = expected_noise(model, name, kind, rank, sigma, generation)
        for i in range(MEMBERS):
            assert_close(population.state_dict(i)[name], model.get_parameter(name).detach() + noise[i], 1e-6)
        fitness = scores(MEMBERS, seed=generation)
        weights = shape_fitness(fitness, trainer.config).float()
        trainer.tell(fitness)
        wanted = -(MEMBERS**0.5) * torch.einsum("i,i...->...", weights, noise) / MEMBERS
        assert_close(model.get_parameter(name).grad, wanted, 1e-5)
        assert not torch.equal(model.get_parameter(name), before.get_parameter(name))


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "convolution.weight", "experts"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("way", ["pattern", "group"])
def test_frozen_parameters_stay_also_under_weight_decay(name: str, optimizer: Any, way: str) -> None:
    model = model_of()
    given: dict[str, Any] = {"params": model.parameters(), "noise": {name: "frozen"}}
    if way == "group":
        given = {"params": groups_of(model, {"noise": "frozen"}, name)}
    trainer = EGGROLLTrainer(
        model=model,
        population_size=MEMBERS,
        seed=SEED,
        learning_rate=0.1,
        optimizer=lambda groups, lr: optimizer(groups, lr=lr, weight_decay=0.5),
        **given,
    )
    before = copy.deepcopy(model.state_dict())
    for generation in range(2):
        population = trainer.ask()
        assert torch.equal(population.state_dict(1)[name], before[name])
        trainer.tell(scores(MEMBERS, seed=generation))
    for other, parameter in model.named_parameters():
        assert torch.equal(parameter, before[other]) == (other == name), other


def test_freezing_one_moves_no_other_noise() -> None:
    free, part = (
        make_trainer(model_of(), noise=noise).ask().state_dict(3) for noise in (None, {"embedding.*": "frozen"})
    )
    for name, tensor in free.items():
        assert torch.equal(tensor, part[name]) == (name != "embedding.weight"), name


def test_the_first_pattern_that_fits_counts() -> None:
    model = model_of()
    trainer = make_trainer(model, noise={"head.bias": "frozen", "head.*": {"sigma": 2.0}, "*": "dense"}, sigma=0.1)
    members = [trainer.ask().state_dict(i) for i in range(8)]

    def spread(name: str) -> float:
        return float(torch.stack([m[name] - model.state_dict()[name] for m in members]).std())

    assert spread("head.bias") == 0
    assert spread("head.weight") > 1
    assert 0.05 < spread("embedding.weight") < 0.2
    matrix = members[0]["embedding.weight"] - model.embedding.weight
    assert torch.linalg.matrix_rank(matrix.detach()) == 4  # dense
    matrix = members[0]["head.weight"] - model.head.weight
    assert torch.linalg.matrix_rank(matrix.detach(), rtol=1e-4) == 1  # low rank


def test_a_sigma_that_was_set_between_generations_counts_where_no_own_one_was_chosen() -> None:
    model = model_of()
    trainer = make_trainer(model, noise={"head.weight": {"sigma": 0.3}})
    trainer.sigma = 5.0
    member = trainer.ask().state_dict(0)
    assert float((member["head.bias"] - model.head.bias.detach()).abs().max()) > 2
    assert_close(
        member["head.weight"] - model.head.weight.detach(),
        make_trainer(model, sigma=0.3, rank=1).ask().state_dict(0)["head.weight"] - model.head.weight.detach(),
        1e-6,
    )


def test_a_parameter_that_is_frozen_for_a_while_keeps_its_choice() -> None:
    model = model_of()
    model.head.requires_grad_(False)
    trainer = make_trainer(model, noise={"head.weight": {"sigma": 0.3}})
    trainer.ask()
    trainer.tell(scores())
    model.head.requires_grad_(True)
    thawed = trainer.ask().state_dict(0)["head.weight"]
    other = make_trainer(copy.deepcopy(model), sigma=0.3)
    other.generation = 1
    assert_close(thawed, other.ask().state_dict(0)["head.weight"], 1e-6)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"noise": {"heads.*": "dense"}}, ValueError, "the pattern 'heads.*', which fits no parameter in `params`"),
    ({"noise": {"head.*": "sparse"}}, ValueError, "must be one of 'low_rank', 'dense', 'frozen', got 'sparse'"),
    (
        {"noise": {"head.*": {"ranks": 2}}},
        ValueError,
        "['noise', 'rank', 'sigma'], got ['ranks']",
    ),
    ({"noise": {"head.*": {1: 2, "ranks": 2}}}, ValueError, "got [1, 'ranks']"),
    ({"noise": {"head.*": 3}}, TypeError, "or a mapping, got 3"),
    ({"noise": {0: "dense"}}, TypeError, "`noise` must have name patterns, which are strings, as keys, got 0"),
    ({"noise": {"head.*": {"rank": 0}}}, ValueError, "noise['head.*']: rank` must be a positive int, got 0"),
    ({"noise": {"head.*": {"sigma": -1.0}}}, ValueError, "noise['head.*']: sigma` must be a positive finite number"),
    ({"noise": {"head.bias": "low_rank"}}, ValueError, "needs a parameter with two axes or more, 'head.bias' has 1"),
    ({"noise": {"*": "frozen"}}, ValueError, "at least one parameter that is perturbed, all are frozen"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_the_constructor_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(model, **options)
    assert_identical(model.state_dict(), before)


GROUPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"noise": "sparse"}, ValueError, "`params: noise` must be one of"),
    ({"rank": 1.5}, TypeError, "`params: rank` must be a positive int, got 1.5"),
    ({"sigma": "big"}, TypeError, "`params: sigma` must be a positive finite number"),
    ({"ranks": 1}, ValueError, "got ['ranks']"),
    ({"noise": "low_rank"}, ValueError, "'head.bias' has 1"),
]


@pytest.mark.parametrize(("options", "error", "message"), GROUPS)
def test_parameter_groups_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = model_of()
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(model, params=groups_of(model, options, "head.bias"))


@pytest.mark.parametrize(("options", "error", "message"), GROUPS[:3])
def test_an_option_that_was_spoilt_between_generations_is_refused_and_changes_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    trainer = make_trainer(model_of())
    before = run_state(trainer)
    group = trainer.param_groups[0]
    spoilt = {name: group.get(name) for name in options}
    group.update(options)
    with pytest.raises(error, match=re.escape(message)):
        trainer.ask()
    group.update(spoilt)
    for name, value in spoilt.items():
        if value is None:
            del group[name]
    assert_identical(run_state(trainer), before)
    trainer.ask()
    trainer.tell(scores())
