"""Every rule of the hyperparameters, by the message that its breach gives: argument, rule, value."""

import dataclasses

import numpy as np
import pytest

from eggroll import EggrollConfig
from eggroll.config import as_bool, as_choice, as_int, as_positive_float

pytestmark = pytest.mark.filterwarnings("error")

NAN, INF = float("nan"), float("inf")
SHAPING_NAMES = "'zscore', 'group_zscore', 'centered_rank', 'sign', 'baseline', 'raw'"


def breaches():
    """Option, value, error, what the message says of the rule."""
    for name, minimum, rule in [
        ("population_size", 2, "an int of at least 2"),
        ("rank", 1, "a positive int"),
        ("noise_lifetime", 1, "a positive int"),
        ("group_size", 0, "a non-negative int"),
    ]:
        for value in (minimum - 1, -7, -(2**70)):
            yield name, value, ValueError, rule
        for value in (NAN, INF, 4.0, True, np.True_, "4", b"4", [4], (), np.float32(4), np.asarray([4, 4])):
            yield name, value, TypeError, rule
    for name in ("population_size", "rank", "group_size"):
        yield name, None, TypeError, "int"
    for value in (0, 0.0, -0.1, -INF, INF, NAN, np.float32("nan"), 10**400, -(10**400)):
        yield "sigma", value, ValueError, "a positive finite number"
    for value in (None, True, np.True_, "0.1", b"0.1", "nan", [0.1], np.asarray([0.1]), 0.1j):
        yield "sigma", value, TypeError, "a positive finite number"
    for name in ("antithetic", "freeze_nonlora"):
        for value in (0, 1, None, "yes", NAN, np.True_):
            yield name, value, TypeError, "a bool"
    for name, choices in [
        ("fitness_shaping", SHAPING_NAMES),
        ("gradient_scale", "'reference', 'unbiased'"),
        ("noise_dtype", "'float32', 'param'"),
        ("rng", "'threefry', 'philox'"),
    ]:
        for value in ("Zscore", "", "float16", None, 1, True, ["raw"]):
            yield name, value, ValueError, f"one of {choices}"


@pytest.mark.parametrize(("name", "value", "error", "rule"), list(breaches()))
def test_a_breach_names_argument_rule_and_value(name, value, error, rule):
    with pytest.raises(error) as caught:
        EggrollConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"`{name}` must be ")
    assert rule in message
    assert message.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population_size": 7}, "`population_size` must be even with antithetic pairs, got 7"),
        ({"population_size": 2**31}, "`population_size` must be below 2**31, got 2147483648"),
        ({"population_size": 8, "group_size": 3}, "`group_size` must divide the population of 8, got 3"),
        ({"population_size": 8, "group_size": 16}, "`group_size` must divide the population of 8, got 16"),
        (
            {"fitness_shaping": "sign", "antithetic": False},
            "`fitness_shaping` 'sign' compares antithetic pairs: it needs `antithetic=True`",
        ),
        (
            {"fitness_shaping": "group_zscore", "group_size": 1},
            "`group_size` must be at least 2 with `fitness_shaping` 'group_zscore', got 1",
        ),
        (
            {"fitness_shaping": "baseline", "group_size": 2},
            "`group_size` must be at least 3 with `fitness_shaping` 'baseline', whose first two members of a group "
            "are not perturbed, got 2",
        ),
        (
            {"fitness_shaping": "baseline", "population_size": 2},
            "`group_size` must be at least 3 with `fitness_shaping` 'baseline', whose first two members of a group "
            "are not perturbed, got 2",
        ),
        (
            {"fitness_shaping": "baseline", "population_size": 6, "group_size": 3},
            "`group_size` must be even with `fitness_shaping` 'baseline' and antithetic pairs, got 3",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError) as caught:
        EggrollConfig(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["populaton_size", "lr", "epoch", "noise_reuse", "group"])
def test_unknown_options(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        EggrollConfig(**{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"population_size": 2},
        {"population_size": 3, "antithetic": False},
        {"population_size": 2**31 - 2},
        {"population_size": 8, "group_size": 8},
        {"population_size": 8, "group_size": 1},
        {"rank": 10**6},
        {"sigma": 1e-30},
        {"sigma": 1},
        {"noise_lifetime": None},
        {"noise_lifetime": 10**9},
        {"fitness_shaping": "sign"},
        {"fitness_shaping": len},
        {"fitness_shaping": "baseline", "population_size": 9, "group_size": 3, "antithetic": False},
        {"fitness_shaping": "baseline", "population_size": 8, "group_size": 4},
        {"gradient_scale": "unbiased", "noise_dtype": "param", "freeze_nonlora": True, "rng": "philox"},
    ],
)
def test_what_stays_within_the_rules_is_kept(options):
    config = EggrollConfig(**options)
    for name, value in options.items():
        assert getattr(config, name) == value


def test_numbers_of_numpy_become_python_numbers():
    config = EggrollConfig(
        population_size=np.int64(8),
        rank=np.uint8(2),
        group_size=np.int32(4),
        noise_lifetime=np.int16(3),
        sigma=np.float32(0.5),
    )
    assert config == EggrollConfig(population_size=8, rank=2, group_size=4, noise_lifetime=3, sigma=0.5)
    assert {type(getattr(config, name)) for name in ("population_size", "rank", "group_size", "noise_lifetime")} == {
        int
    }
    assert type(config.sigma) is float


def test_defaults_are_those_of_the_documentation():
    assert dataclasses.asdict(EggrollConfig()) == {
        "population_size": 256,
        "sigma": 0.1,
        "rank": 1,
        "antithetic": True,
        "noise_lifetime": 1,
        "fitness_shaping": "zscore",
        "group_size": 0,
        "freeze_nonlora": False,
        "gradient_scale": "reference",
        "noise_dtype": "float32",
        "rng": "threefry",
    }


def test_a_config_is_frozen_hashable_and_checked_again_when_replaced():
    config = EggrollConfig(population_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2
    assert hash(config) == hash(EggrollConfig(population_size=8))
    with pytest.raises(ValueError, match="`population_size` must be even with antithetic pairs, got 9"):
        dataclasses.replace(config, population_size=9)


@pytest.mark.parametrize(
    ("options", "group", "draws"),
    [
        ({}, 8, 4),
        ({"group_size": 2}, 2, 4),
        ({"antithetic": False}, 8, 8),
        ({"antithetic": False, "group_size": 4}, 4, 8),
    ],
)
def test_groups_and_draws(options, group, draws):
    config = EggrollConfig(population_size=8, **options)
    assert (config.group, config.draws) == (group, draws)


@pytest.mark.parametrize(
    ("check", "value", "checked"),
    [
        (lambda value: as_int("n", value, 3), 3, 3),
        (lambda value: as_positive_float("x", value), 2, 2.0),
        (lambda value: as_bool("flag", value), False, False),
        (lambda value: as_choice("name", value, ("a", "b")), "b", "b"),
    ],
)
def test_checks_return_what_they_checked(check, value, checked):
    assert check(value) == checked
    assert type(check(value)) is type(checked)
