"""Bad input gets an error that names argument, rule and value, changes nothing, and spoils nothing."""

import copy
import functools
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_backend.support import assert_identical, make_trainer, mlp, quadratic, run_state, scores

from eggroll.torch import EGGROLLTrainer, VanillaESTrainer

NAN, INF = float("nan"), float("inf")

# What the constructor is given, the error, and what its message says.
CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"population_size": 7, "noise_reuse": 2},
        ValueError,
        "`population_size` must be even with antithetic pairs, got 7",
    ),
    ({"population_size": 7, "antithetic": True}, ValueError, "`population_size` must be even"),
    ({"population_size": 0}, ValueError, "`population_size` must be an int of at least 2, got 0"),
    ({"population_size": -4}, ValueError, "`population_size` must be an int of at least 2, got -4"),
    ({"population_size": 8.0}, TypeError, "`population_size` must be an int of at least 2, got 8.0"),
    ({"population_size": "8"}, TypeError, "`population_size` must be an int of at least 2, got '8'"),
    ({"population_size": True}, TypeError, "`population_size` must be an int of at least 2, got True"),
    ({"population_size": NAN}, TypeError, "`population_size` must be an int of at least 2, got nan"),
    ({"population_size": 2**31}, ValueError, "`population_size` must be below 2**31, got 2147483648"),
    ({"group_size": 3}, ValueError, "`group_size` must divide the population of 8, got 3"),
    ({"group_size": -2}, ValueError, "`group_size` must be a non-negative int, got -2"),
    ({"group_size": 2.0}, TypeError, "`group_size` must be a non-negative int, got 2.0"),
    ({"group_size": 2, "fitness_shaping": "baseline"}, ValueError, "`group_size` must be at least 3"),
    ({"rank": 0}, ValueError, "`rank` must be a positive int, got 0"),
    ({"rank": -1}, ValueError, "`rank` must be a positive int, got -1"),
    ({"rank": 1.5}, TypeError, "`rank` must be a positive int, got 1.5"),
    ({"rank": None}, TypeError, "`rank` must be a positive int, got None"),
    ({"sigma": 0.0}, ValueError, "`sigma` must be a positive finite number, got 0.0"),
    ({"sigma": -0.1}, ValueError, "`sigma` must be a positive finite number, got -0.1"),
    ({"sigma": NAN}, ValueError, "`sigma` must be a positive finite number, got nan"),
    ({"sigma": INF}, ValueError, "`sigma` must be a positive finite number, got inf"),
    ({"sigma": "0.1"}, TypeError, "`sigma` must be a positive finite number, got '0.1'"),
    ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be a positive finite number, got 0.0"),
    ({"learning_rate": -1}, ValueError, "`learning_rate` must be a positive finite number, got -1"),
    ({"learning_rate": NAN}, ValueError, "`learning_rate` must be a positive finite number, got nan"),
    ({"learning_rate": INF}, ValueError, "`learning_rate` must be a positive finite number, got inf"),
    ({"learning_rate": None}, TypeError, "`learning_rate` must be a positive finite number, got None"),
    (
        {"noise_reuse": 3},
        ValueError,
        "`noise_reuse` must be 0 or 1 (independent members) or 2 (antithetic pairs), got 3",
    ),
    ({"noise_reuse": 3}, ValueError, "use `noise_lifetime`"),
    ({"noise_reuse": -1}, ValueError, "`noise_reuse` must be 0 or 1"),
    ({"noise_reuse": True}, ValueError, "got True"),
    ({"noise_reuse": 2.0}, ValueError, "`noise_reuse` must be 0 or 1 (independent members) or 2 (antithetic pairs)"),
    ({"noise_reuse": np.arange(2)}, ValueError, "`noise_reuse` must be 0 or 1"),
    ({"noise_reuse": 2, "antithetic": False}, ValueError, "`noise_reuse` 2 means antithetic pairs"),
    ({"antithetic": 1}, TypeError, "`antithetic` must be a bool, got 1"),
    ({"noise_lifetime": 0}, ValueError, "`noise_lifetime` must be a positive int, got 0"),
    ({"noise_lifetime": 1.0}, TypeError, "`noise_lifetime` must be a positive int, got 1.0"),
    ({"freeze_nonlora": 1}, TypeError, "`freeze_nonlora` must be a bool, got 1"),
    ({"fitness_shaping": "z-score"}, ValueError, "`fitness_shaping` must be one of 'zscore', "),
    ({"fitness_shaping": "sign"}, ValueError, "it needs `antithetic=True`"),
    ({"gradient_scale": "big"}, ValueError, "`gradient_scale` must be one of 'reference', 'unbiased', got 'big'"),
    (
        {"noise_dtype": torch.float32},
        ValueError,
        "`noise_dtype` must be one of 'float32', 'param', got torch.float32",
    ),
    ({"rng": "pcg64"}, ValueError, "`rng` must be one of 'threefry', 'philox', got 'pcg64'"),
    ({"nonfinite": "ignore"}, ValueError, "`nonfinite` must be one of 'raise', 'worst', got 'ignore'"),
    ({"chunk_size": 0}, ValueError, "`chunk_size` must be a positive int"),
    ({"chunk_size": 2.5}, TypeError, "`chunk_size` must be a positive int"),
    ({"chunk_size": np.arange(2)}, TypeError, "`chunk_size` must be a positive int"),
    ({"seed": -1}, ValueError, "`seed` must be a non-negative int, got -1"),
    ({"seed": 2**64}, ValueError, "`seed` must be below 2**64"),
    ({"seed": 1.5}, TypeError, "`seed` must be a non-negative int, got 1.5"),
    ({"seed": "17"}, TypeError, "`seed` must be a non-negative int, got '17'"),
    ({"seed": b"17"}, TypeError, "`seed` must be a non-negative int, got b'17'"),
    ({"seed": np.array(1.5)}, TypeError, "`seed` must be a non-negative int, got 1.5"),
    ({"seed": (1, 2, 3)}, ValueError, "`seed` must be an int or a key of two words, got 3 words"),
    ({"seed": (1, 2**32)}, ValueError, "`seed` as a key must have words below 2**32"),
    ({"noise": "dense"}, TypeError, "`noise` must be a mapping from name patterns, got 'dense'"),
    ({"device": "gpu"}, RuntimeError, "`device` must be a device of PyTorch, got 'gpu'"),
    ({"device": 1.5}, TypeError, "`device` must be a device of PyTorch, got 1.5"),
    ({"model": "mlp"}, TypeError, "`model` must be a torch.nn.Module, got str"),
    ({"fitness_fn": 1.0}, TypeError, "`fitness_fn` must be callable, got 1.0"),
    ({"population_fitness_fn": 1.0}, TypeError, "`population_fitness_fn` must be callable, got 1.0"),
    ({"fitness_fn": quadratic, "population_fitness_fn": quadratic}, ValueError, "`population_fitness_fn`, not both"),
    ({"popsize": 8}, TypeError, "unexpected keyword argument 'popsize'"),
    ({"optimizer": "adam"}, TypeError, "`optimizer` must make an optimizer, such as torch.optim.AdamW"),
    (
        {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)},
        ValueError,
        "must leave the step size to `learning_rate`",
    ),
    (
        {"optimizer": torch.optim.LBFGS},
        TypeError,
        "`optimizer` must step without a `closure`, which evaluates a loss again: LBFGS does not",
    ),
    (
        {"optimizer": lambda params, lr: None},
        TypeError,
        "`optimizer` must make a torch.optim.Optimizer, it made None",
    ),
    ({"optimizer": functools.partial(torch.optim.SGD, momentum=-1.0)}, ValueError, "Invalid momentum value: -1.0"),
    ({"optimizer": functools.partial(torch.optim.SGD, momentun=0.9)}, TypeError, "'momentun'"),
]


def identify(value: Any) -> str:
    return (
        ",".join(f"{name}={getattr(v, '__name__', v)}" for name, v in value.items())
        if isinstance(value, dict)
        else ""
    )


def assert_works(trainer: Any) -> None:
    generation = trainer.generation
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.ask()
    trainer.tell(scores(trainer.population_size))
    assert trainer.generation == generation + 1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTOR, ids=identify)
def test_the_constructor_says_what_is_wrong(options: dict[str, Any], error: type[Exception], message: str):
    model = mlp(3, 4, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(**{"params": model.parameters(), "model": model, **options})
    assert_identical(dict(model.state_dict()), before)
    assert_works(make_trainer(model))


@pytest.mark.parametrize("options", [{"sigma": NAN}, {"population_size": 1}, {"learning_rate": -1.0}, {"rank": 1}])
def test_vanilla_trainer_checks_too(options: dict[str, Any]):
    model = mlp(3, 2)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        VanillaESTrainer(model.parameters(), model=model, **options)
    assert_works(VanillaESTrainer(model.parameters(), model=model, population_size=8))


class WithComplex(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.phases = nn.Parameter(torch.tensor([1j, 2]))


class OnTwoDevices(nn.Module):
    def __init__(self):
        super().__init__()
        self.here = nn.Linear(3, 2)
        self.there = nn.Linear(2, 2, device="meta")


def frozen() -> nn.Module:
    return mlp(3, 2).requires_grad_(False)


# A model, what is given as `params`, and what the message says.
Params = Callable[[nn.Module], Any]
PARAMS: list[tuple[Callable[[], nn.Module], Params, type[Exception], str]] = [
    (frozen, lambda m: m.parameters(), ValueError, "at least one trainable parameter (one that requires a gradient)"),
    (lambda: mlp(3, 2), lambda m: [], ValueError, "`params` must hold at least one trainable parameter, got none"),
    (lambda: mlp(3, 2), lambda m: mlp(3, 2).parameters(), ValueError, "but number 0, of shape (2, 3), is not"),
    (
        lambda: mlp(3, 2),
        lambda m: [*m.parameters(), nn.Parameter(torch.ones(5))],
        ValueError,
        "`params` must be parameters of `model`, but number 2, of shape (5,), is not",
    ),
    (lambda: mlp(3, 2), lambda m: m[0].weight, TypeError, "`params` must be parameters, such as model.parameters()"),
    (lambda: mlp(3, 2), lambda m: m, TypeError, "got Sequential"),
    (lambda: mlp(3, 2), lambda m: None, TypeError, "got NoneType"),
    (lambda: mlp(3, 2), lambda m: ["0.weight"], TypeError, "str"),
    (
        lambda: mlp(3, 2),
        lambda m: [{"lr": 1.0}],
        ValueError,
        "`params` groups must have the key 'params', got ['lr']",
    ),
    (lambda: mlp(3, 2), lambda m: [{"params": None}], TypeError, "`params` of a group must be parameters, got None"),
    (lambda: mlp(3, 2), lambda m: [{1: 2, "lr": 1.0}], ValueError, "must have the key 'params', got [1, 'lr']"),
    (
        lambda: mlp(3, 2),
        lambda m: [{"params": m.parameters(), "lr": torch.ones(2)}],
        TypeError,
        "`lr` must be a non-negative finite number, got tensor([1., 1.])",
    ),
    (
        lambda: mlp(3, 2),
        lambda m: [{"params": m.parameters(), "learning_rate": 1.0}],
        ValueError,
        "got ['learning_rate']",
    ),
    (
        lambda: mlp(3, 2),
        lambda m: [{"params": m.parameters(), "lr": NAN}],
        ValueError,
        "`lr` must be a non-negative finite number, got nan",
    ),
    (
        lambda: mlp(3, 2),
        lambda m: [{"params": m.parameters(), "lr": "0.1"}],
        TypeError,
        "`lr` must be a non-negative finite number, got '0.1'",
    ),
    (
        lambda: mlp(3, 2),
        lambda m: [{"params": [m[0].weight]}, {"params": [m[0].weight]}],
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    (
        WithComplex,
        lambda m: m.parameters(),
        ValueError,
        "`params` must be floating point, but 'phases' is torch.complex64",
    ),
    (
        OnTwoDevices,
        lambda m: m.parameters(),
        ValueError,
        "`params` must be on one device, but 'here.weight' is on cpu and 'there.weight' on meta",
    ),
]


def test_frozen_parameters_may_be_of_any_dtype():
    model = mlp(3, 2)
    model.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    make_trainer(model).ask()(torch.ones(3))
    assert model.codes.tolist() == [1, 2]


@pytest.mark.parametrize(("make_model", "params", "error", "message"), PARAMS, ids=[row[-1][-40:] for row in PARAMS])
def test_the_parameters_are_checked(
    make_model: Callable[[], nn.Module], params: Params, error: type[Exception], message: str
):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.device.type == "cpu"}
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(model, params=params(model))
    assert_identical({name: model.state_dict()[name] for name in before}, before)
    fitting = [
        parameter.requires_grad_(True)
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.device.type == "cpu"
    ]
    trainer = make_trainer(model, params=fitting)
    trainer.ask()
    trainer.tell(scores())
    assert not torch.equal(fitting[0], next(iter(before.values())))


def test_freeze_nonlora_of_a_model_without_matrices():
    model = nn.LayerNorm(3)
    with pytest.raises(ValueError, match=r"must hold at least one|leaves no trainable parameter"):
        make_trainer(model, freeze_nonlora=True)


# Fitness that tell() refuses.
FITNESS: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(7), ValueError, "`fitness` has 7 values but the population has 8 members"),
    (torch.ones(9), ValueError, "`fitness` has 9 values but the population has 8 members"),
    (torch.ones(0), ValueError, "`fitness` has 0 values but the population has 8 members"),
    ([1.0] * 7, ValueError, "`fitness` has 7 values but the population has 8 members"),
    (torch.ones(8, 1), ValueError, "`fitness` must have the shape (8,), one value for each member, got (8, 1)"),
    (torch.tensor(1.0), ValueError, "`fitness` must have the shape (8,), one value for each member, got ()"),
    (np.ones((2, 4)), ValueError, "`fitness` must have the shape (8,), one value for each member, got (2, 4)"),
    (torch.ones(8, dtype=torch.int64), TypeError, "`fitness` must be floating point, got torch.int64"),
    (torch.ones(8, dtype=torch.bool), TypeError, "`fitness` must be floating point, got torch.bool"),
    (torch.ones(8, dtype=torch.complex64), TypeError, "`fitness` must be floating point, got torch.complex64"),
    (np.arange(8), TypeError, "`fitness` must be floating point, got int64"),
    (None, TypeError, "`fitness` must be a tensor, an array or a list of 8 numbers, got None"),
    (1.0, TypeError, "`fitness` must be a tensor, an array or a list of 8 numbers, got 1.0"),
    ("12345678", TypeError, "`fitness` must be a tensor, an array or a list of 8 numbers, got '12345678'"),
    ([None] * 8, TypeError, "`fitness` must be 8 numbers, got [None"),
    ([1.0] * 7 + ["2.0"], TypeError, "`fitness` must be 8 numbers, got [1.0"),
    (torch.tensor([1.0, NAN, 1, 1, 1, 1, 1, 1]), ValueError, "`fitness` must be finite, but it is not for member 1:"),
    ([1.0, NAN, 1, 1, INF, 1, 1, -INF], ValueError, "it is not for members 1, 4, 7: `nonfinite='worst'` scores"),
]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("fitness", "error", "message"), FITNESS, ids=[row[-1][:60] for row in FITNESS])
def test_tell_refuses_a_bad_fitness(fitness: Any, error: type[Exception], message: str, optimizer: Any):
    trainer = make_trainer(optimizer=optimizer)
    assert_works(trainer)
    before = run_state(trainer)
    population = trainer.ask()
    member = population.state_dict(3)
    with pytest.raises(error, match=re.escape(message)):
        trainer.tell(fitness)
    assert_identical(run_state(trainer), before)
    # The generation is still open, and the same.
    assert trainer.ask() is population
    assert_identical(population.state_dict(3), member)
    assert_works(trainer)


def test_many_bad_members_are_not_all_listed():
    trainer = make_trainer(population_size=32)
    trainer.ask()
    with pytest.raises(ValueError, match=r"members 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more"):
        trainer.tell([NAN] * 30 + [0.0, 1.0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_worst_scores_as_the_worst_finite_member(bad: float):
    fitness = scores().tolist()
    fitness[2], fitness[5] = bad, bad
    worst = min(value for value in fitness if np.isfinite(value))
    replaced = [value if np.isfinite(value) else worst for value in fitness]
    trainer, other = make_trainer(nonfinite="worst"), make_trainer()
    for each, told in ((trainer, fitness), (other, replaced)):
        each.ask()
        each.tell(torch.tensor(told))
    assert_identical(run_state(trainer), run_state(other))


def test_nonfinite_worst_needs_one_finite_member():
    trainer = make_trainer(nonfinite="worst")
    trainer.ask()
    before = run_state(trainer)
    with pytest.raises(ValueError, match="must be finite for at least one member, got none"):
        trainer.tell([NAN] * 8)
    assert_identical(run_state(trainer), before)


def nth(member: int, then: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """A fitness function that is `quadratic` up to a member, and something else for it."""
    seen = [0]

    def fitness_fn(model: nn.Module) -> Any:
        seen[0] += 1
        return then(model) if seen[0] == member + 1 else quadratic(model)

    return fitness_fn


def raises(model: nn.Module) -> float:
    raise OSError("the simulator died")


RETURNS: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (raises, OSError, "the simulator died"),
    (lambda model: None, TypeError, "`fitness_fn` must return one number, got None"),
    (lambda model: torch.ones(3), TypeError, "`fitness_fn` must return one number, got Tensor of shape (3,)"),
    (lambda model: np.ones((2, 2)), TypeError, "`fitness_fn` must return one number, got ndarray of shape (2, 2)"),
    (lambda model: "0.5", TypeError, "`fitness_fn` must return one number, got '0.5'"),
    (lambda model: [0.5], TypeError, "`fitness_fn` must return one number, got [0.5]"),
    (lambda model: 1j, TypeError, "`fitness_fn` must return one number, got 1j"),
    (lambda model: NAN, ValueError, "it is not for member 5:"),
]


@pytest.mark.parametrize(("then", "error", "message"), RETURNS, ids=[row[-1][-40:] for row in RETURNS])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_bad_fitness_fn_changes_nothing(
    then: Callable[[nn.Module], Any], error: type[Exception], message: str, chunk_size: int | None
):
    trainer = make_trainer(fitness_fn=quadratic, optimizer=torch.optim.Adam, chunk_size=chunk_size)
    other = make_trainer(fitness_fn=quadratic, optimizer=torch.optim.Adam, chunk_size=chunk_size)
    for each in (trainer, other):
        each.step()
    before = run_state(trainer)
    trainer.fitness_fn = nth(5, then)
    with pytest.raises(error, match=re.escape(message)):
        trainer.step()
    assert_identical(run_state(trainer), before)
    # The generation that failed is evaluated again: the run is the one without the failure.
    trainer.fitness_fn = quadratic
    for each in (trainer, other):
        each.train(2, verbose=False)
    assert_identical(run_state(trainer), run_state(other))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.ones(7), ValueError, "`fitness` has 7 values but the population has 8 members"),
        (torch.ones(8, 2), ValueError, "got (8, 2)"),
        (None, TypeError, "got None"),
        (torch.full((8,), NAN), ValueError, "members 0, 1, 2, 3, 4, 5, 6, 7"),
        (OSError("no"), OSError, "no"),
    ],
    ids=str,
)
def test_a_bad_population_fitness_fn_changes_nothing(returned: Any, error: type[Exception], message: str):
    def population_fitness_fn(population: Any) -> Any:
        population(torch.ones(3))
        if isinstance(returned, Exception):
            raise returned
        return returned

    trainer = make_trainer(population_fitness_fn=population_fitness_fn)
    before = run_state(trainer)
    with pytest.raises(error, match=re.escape(message)):
        trainer.step()
    assert_identical(run_state(trainer), before)
    assert_works(trainer)


def into_nothing(fitness: torch.Tensor) -> Any:
    return None


SHAPINGS: list[tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = [
    (into_nothing, ValueError, "must return a weight for each of the 8 members, got NoneType"),
    (lambda f: f[:3], ValueError, "must return a weight for each of the 8 members, got the shape (3,)"),
    (lambda f: f.numpy(), TypeError, "`fitness_shaping` must return a tensor, got ndarray"),
    (lambda f: f * NAN, ValueError, "`fitness_shaping` must return weights that are finite"),
    (lambda f: f * 1e300, ValueError, "`fitness_shaping` must return weights that are finite in float32"),
]


@pytest.mark.parametrize(("shaping", "error", "message"), SHAPINGS, ids=[row[-1][-40:] for row in SHAPINGS])
def test_a_bad_shaping_changes_nothing(shaping: Any, error: type[Exception], message: str):
    trainer = make_trainer(fitness_shaping=shaping)
    trainer.ask()
    before = run_state(trainer)
    with pytest.raises(error, match=re.escape(message)):
        trainer.tell(scores())
    assert_identical(run_state(trainer), before)


def test_scores_that_float32_does_not_hold_are_refused_unshaped():
    trainer = make_trainer(fitness_shaping="raw")
    trainer.ask()
    before = run_state(trainer)
    with pytest.raises(ValueError, match="finite in float32"):
        trainer.tell([1e300] * 8)
    assert_identical(run_state(trainer), before)


def test_a_shaping_that_works_in_place_does_not_change_the_metrics():
    trainer = make_trainer(fitness_shaping=lambda fitness: fitness.sub_(fitness.mean()))
    trainer.ask()
    metrics = trainer.tell([float(i) for i in range(8)])
    assert metrics["mean_fitness"] == 3.5
    assert trainer.best_fitness == 7.0


def with_another_lr(trainer: Any) -> dict[str, Any]:
    state = copy.deepcopy(trainer.state_dict())
    state["optimizer"]["param_groups"][0]["lr"] = 7.0
    return state


CALLS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda t: t.tell(scores()), RuntimeError, "tell() finishes the generation of an ask(), and none is open"),
    (lambda t: t.step(), RuntimeError, "step() needs a `fitness_fn` or a `population_fitness_fn`"),
    (lambda t: t.step(lambda: None), TypeError, "`closure` must be None"),
    (lambda t: t.train(-1), ValueError, "`num_generations` must be a non-negative int, got -1"),
    (lambda t: t.train(1.5), TypeError, "`num_generations` must be a non-negative int, got 1.5"),
    (lambda t: setattr(t, "sigma", NAN), ValueError, "`sigma` must be a positive finite number, got nan"),
    (lambda t: setattr(t, "sigma", 0), ValueError, "`sigma` must be a positive finite number, got 0"),
    (
        lambda t: setattr(t, "learning_rate", -1),
        ValueError,
        "`learning_rate` must be a positive finite number, got -1",
    ),
    (lambda t: setattr(t, "population_size", 4), AttributeError, "population_size"),
    (lambda t: setattr(t, "rank", 4), AttributeError, "rank"),
    (lambda t: t.add_param_group({"params": [nn.Parameter(torch.ones(2))]}), ValueError, "of shape (2,), is not"),
    (
        lambda t: t.add_param_group({"param": t.model[0].weight}),
        TypeError,
        "`param_group` must be a dict with the key 'params', got one with the keys ['param']",
    ),
    (lambda t: t.add_param_group(t.model[0].weight), TypeError, "with the key 'params', got Parameter"),
    (lambda t: t.add_param_group({"params": 1}), TypeError, "`params` of a group must be parameters, got 1"),
    (
        lambda t: t.add_param_group({"params": [1]}),
        TypeError,
        "`params` must be parameters of `model`, but number 4 is 1",
    ),
    (lambda t: t.ask()(torch.ones(3), per_member="no"), TypeError, "`per_member` must be a bool, got 'no'"),
    (lambda t: t.ask().state_dict(8), IndexError, "`index` must be in [-8, 8), got 8"),
    (lambda t: t.ask().state_dict(1.0), TypeError, "`index` must be an int, got 1.0"),
    (lambda t: t.ask().state_dict(0, torch.int8), TypeError, "`dtype` must be a floating-point dtype of PyTorch"),
    (lambda t: t.ask().state_dict(0, dtype="float32"), TypeError, "or None, got 'float32'"),
    (
        lambda t: pickle.dumps(t.ask()),
        TypeError,
        "send `population.state_dict(i)` to another process, or the trainer",
    ),
    (lambda t: t.load_state_dict({}), ValueError, "`state_dict` must have the keys"),
    (
        lambda t: t.load_state_dict("run.pt"),
        TypeError,
        "`state_dict` must be what state_dict() returned, got 'run.pt'",
    ),
    (
        lambda t: t.load_state_dict({**with_another_lr(t), "sigma": -1}),
        ValueError,
        "`sigma` must be a positive finite",
    ),
    (
        lambda t: t.load_state_dict({**with_another_lr(t), "generation": None}),
        TypeError,
        "`generation` must be a non-",
    ),
    (lambda t: t.load_state_dict({**with_another_lr(t), "fitness_history": None}), TypeError, "not iterable"),
    (lambda t: t.load_state_dict(make_trainer(rank=2).state_dict()), ValueError, "rank is 2 there and 1 here"),
    (
        lambda t: t.load_state_dict(make_trainer(rng="philox").state_dict()),
        ValueError,
        "rng is 'philox' there and 'threefry' here",
    ),
    (lambda t: t.load_state_dict(make_trainer(mlp(3, 5, 2)).state_dict()), ValueError, "other parameters"),
    (
        lambda t: t.load_state_dict(make_trainer(optimizer=torch.optim.Adam).state_dict()),
        ValueError,
        "optimizer is 'Adam' there and 'SGD' here",
    ),
    (
        lambda t: t.load_state_dict(make_trainer(randomness="same").state_dict()),
        ValueError,
        "randomness is 'same' there and 'different' here",
    ),
    (lambda t: t.load_state_dict({**t.state_dict(), "key": [1]}), ValueError, "`seed` must be an int or a key"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[row[-1][-50:] for row in CALLS])
def test_a_bad_call_changes_nothing(call: Callable[[Any], Any], error: type[Exception], message: str):
    trainer = make_trainer()
    assert_works(trainer)
    before = run_state(trainer)
    with pytest.raises(error, match=re.escape(message)):
        call(trainer)
    assert_identical(run_state(trainer), before)
    assert_works(trainer)


@pytest.mark.parametrize("lr", [NAN, INF, -1.0, "0.1", None], ids=str)
def test_a_bad_lr_that_a_scheduler_set(lr: Any):
    trainer = make_trainer()
    trainer.ask()
    before = run_state(trainer)["parameters"]
    trainer.param_groups[0]["lr"] = lr
    with pytest.raises((TypeError, ValueError), match="`lr` must be a non-negative finite number"):
        trainer.tell(scores())
    assert_identical(run_state(trainer)["parameters"], before)
    trainer.param_groups[0]["lr"] = 0.1
    trainer.tell(scores())
    assert trainer.generation == 1


def test_an_optimizer_whose_step_raises():
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise OSError("no step")

    trainer = make_trainer(optimizer=Broken)
    trainer.ask()
    before = run_state(trainer)
    with pytest.raises(OSError, match="no step"):
        trainer.tell(scores())
    assert_identical(run_state(trainer), before)


@pytest.mark.parametrize(
    "name", ["antithetic", "fitness_shaping", "group_size", "noise_lifetime", "compile", "strict"]
)
def test_an_argument_that_cannot_be_changed_says_so(name: str) -> None:
    """An attribute of that name would be nothing that the trainer ever looks at."""
    trainer = make_trainer()
    with pytest.raises(AttributeError, match=f"`{name}` is an argument of the constructor that stays .*, got 2"):
        setattr(trainer, name, 2)
    trainer.anything_else = 2


RETURNED: list[tuple[str, Any, type[Exception], str]] = [
    ("sample_perturbations", np.zeros((8, 8)), TypeError, "a tensor of shape (8, 8), got ndarray"),
    ("sample_perturbations", torch.zeros(8, 7), ValueError, "a tensor of shape (8, 8), got the shape (8, 7)"),
    ("compute_update", None, TypeError, "a tensor of shape (8,), got NoneType"),
    ("compute_update", torch.zeros(8, 8), ValueError, "a tensor of shape (8,), got the shape (8, 8)"),
    ("compute_update", torch.full((8,), INF), ValueError, "finite values, got NaN or infinity"),
]


@pytest.mark.parametrize(("method", "returned", "error", "message"), RETURNED)
def test_what_a_strategy_of_your_own_returns_is_checked(
    method: str, returned: Any, error: type[Exception], message: str
) -> None:
    model = mlp(3, 2)
    trainer = VanillaESTrainer(model.parameters(), model, fitness_fn=quadratic, population_size=8, seed=0)
    before = run_state(trainer)
    setattr(trainer, method, lambda *args: returned)
    with pytest.raises(error, match=re.escape(f"`{method}` must return {message}")):
        trainer.step()
    assert_identical(run_state(trainer), before)


@pytest.mark.parametrize("name", ["seed", "device", "population_size", "rank", "chunk_size", "snapshots"])
def test_what_can_be_read_but_not_changed_says_so(name: str) -> None:
    trainer = make_trainer()
    with pytest.raises(AttributeError, match=f"'{name}' of 'EGGROLLTrainer' object has no setter"):
        setattr(trainer, name, 2)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("nonfinite", "wrost", ValueError, "`nonfinite` must be one of 'raise', 'worst', got 'wrost'"),
        ("randomness", None, ValueError, "`randomness` must be one of 'different', 'same', got None"),
        ("unused", "warn", ValueError, "`unused` must be one of 'raise', 'ignore', got 'warn'"),
        ("fused", 1, TypeError, "`fused` must be a bool, got 1"),
        ("sigma", -1.0, ValueError, "`sigma` must be a positive"),
    ],
)
def test_what_is_changed_later_is_checked_too(name: str, value: Any, error: type[Exception], message: str) -> None:
    trainer = make_trainer(fitness_fn=quadratic)
    before = getattr(trainer, name)
    with pytest.raises(error, match=re.escape(message)):
        setattr(trainer, name, value)
    assert getattr(trainer, name) == before
    trainer.step()


def test_classes_can_be_looked_at() -> None:
    for trainer in (EGGROLLTrainer, VanillaESTrainer):
        assert {"nonfinite", "sigma"} <= {name for name, _ in inspect.getmembers(trainer)}


def test_a_lazy_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(
        ValueError, match=re.escape("`params` must have shapes, but '1.weight' is lazy: call the model")
    ):
        make_trainer(model)
    model(torch.zeros(1, 3))
    make_trainer(model, fitness_fn=quadratic).step()


@pytest.mark.parametrize(
    ("shape", "options", "draws"),
    [
        ((2**31,), {}, "2147483648 for its dense noise"),
        ((2**16, 2**15), {"noise": {"weight": "dense"}}, "2147483648 for its dense noise"),
        ((2**28, 1), {"rank": 8}, "2147483656 for its low_rank noise"),
        ((2**28, 1), {"rank": 8, "rng": "philox"}, "2147483648 for its low_rank noise"),
    ],
)
def test_noise_of_more_elements_than_are_counted(shape: tuple[int, ...], options: dict[str, Any], draws: str):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(()).expand(shape))  # which takes no memory
    message = (
        f"`params` must draw at most 2147483647 numbers from a key, but 'weight', of shape {shape}, draws {draws}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        EGGROLLTrainer(model.parameters(), model=model, population_size=4, snapshots=False, **options)
