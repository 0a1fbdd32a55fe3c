"""The direction against the sum over materialised members, in any chunks."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from core.support import assert_close, compiled, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import EggrollConfig, prng
from eggroll.perturbation import draw_keys, draws_and_signs, low_rank_noise, member_parameter
from eggroll.update import dense_sum, direction, direction_scale, weights_of_draws

pytestmark = pytest.mark.filterwarnings("error")

CONFIG = EggrollConfig(population_size=6, sigma=0.3, rank=2)
KEY = prng.key(2**63 + 11)
WEIGHTS = np.asarray([0.5, -1.5, 2.0, 0.25, -0.75, 1.0, -2.0, 0.1, 0.6, -0.3, 1.2, 0.9], np.float32)


def sum_over_members(shape, generation, weights, config, **options):
    """The definition: every member's parameter is formed, and its difference to the parameter weighted."""
    zero = np.zeros(shape, np.float32)
    members = config.population_size
    total = np.zeros(shape, np.float64)
    for member in range(members):
        seen = member_parameter(zero, KEY, generation, member, config, **options)
        total += np.float64(weights[member]) * np.float64(seen)
    scale = math.sqrt(members) / members if config.gradient_scale == "reference" else 1 / (members * config.sigma**2)
    return -scale * total


def direction_of(xp, weights, config, shape=(5, 3)):
    """The direction of generation 0, as the library runs it at best."""
    found = compiled(xp, lambda key, weights: direction(key, shape, 0, weights, config))
    return found(xp.asarray(KEY), xp.asarray(weights))


LAYOUTS = {
    "matrix": ((5, 3), {}),
    "one number": ((1, 1), {}),
    "row": ((1, 7), {}),
    "bias": ((7,), {}),
    "scalar": ((), {}),
    "convolution": ((2, 3, 2, 2), {}),
    "dense matrix": ((5, 3), {"low_rank": False}),
    "stacked matrices": ((3, 4, 2), {"stack_axes": 1}),
    "twice stacked matrices": ((2, 3, 4, 2), {"stack_axes": 2}),
    "stacked biases": ((3, 5), {"stack_axes": 1}),
    "nothing": ((0,), {}),
    "no rows": ((0, 3), {}),
    "no columns": ((3, 0), {}),
}
CONFIGS = {
    "reference": {},
    "unbiased": {"gradient_scale": "unbiased"},
    "independent": {"antithetic": False, "population_size": 5},
    "rank above the matrix": {"rank": 9},
    "frozen": {"freeze_nonlora": True},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, "reference") for name in LAYOUTS),
        *((name, options) for name in ("matrix", "bias") for options in CONFIGS if options != "reference"),
        ("stacked matrices", "independent"),
        ("stacked biases", "frozen"),
    ],
)
def test_equals_the_sum_over_materialised_members(xp, name, options):
    (shape, layout), config = LAYOUTS[name], replace(CONFIG, **CONFIGS[options])
    weights = WEIGHTS[: config.population_size]
    actual = compiled(xp, lambda key, weights: direction(key, shape, 4, weights, config, **layout))(
        xp.asarray(KEY), xp.asarray(weights)
    )
    assert actual.dtype == xp.float32
    assert_close(actual, sum_over_members(shape, 4, weights, config, **layout), 1e-6)


@pytest.mark.parametrize("lifetime", [None, 1, 3])
@pytest.mark.parametrize("generation", [0, 2, 3, 7])
def test_noise_lifetime(lifetime, generation):
    config = replace(CONFIG, noise_lifetime=lifetime)
    actual = direction(KEY, (5, 3), generation, WEIGHTS[:6], config)
    assert_close(actual, sum_over_members((5, 3), generation, WEIGHTS[:6], config), 1e-6)
    epoch = 0 if lifetime is None else generation // lifetime
    np.testing.assert_array_equal(actual, direction(KEY, (5, 3), epoch, WEIGHTS[:6], CONFIG))


@pytest.mark.parametrize(
    ("antithetic", "chunk_size", "shape"), [(True, 5, (5, 3)), (False, 5, (7,)), (False, 8, (5, 3))]
)
def test_chunks_agree(xp, antithetic, chunk_size, shape):
    config = EggrollConfig(population_size=12, antithetic=antithetic)

    def sized(size):
        return compiled(xp, lambda key, weights: direction(key, shape, 1, weights, config, chunk_size=size))

    whole, chunked = (to_numpy(sized(size)(xp.asarray(KEY), xp.asarray(WEIGHTS))) for size in (None, chunk_size))
    assert_close(chunked, whole, 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.integers(1, 20),
    chunk_size=st.integers(1, 50),
    rank=st.integers(1, 5),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    antithetic=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_chunks_agree_whatever_the_run(pairs, chunk_size, rank, shape, antithetic, seed):
    config = EggrollConfig(population_size=2 * pairs, rank=rank, antithetic=antithetic)
    weights = np.random.default_rng(seed).normal(size=2 * pairs).astype(np.float32)
    whole = direction(prng.key(seed), shape, 0, weights, config)
    chunked = direction(prng.key(seed), shape, 0, weights, config, chunk_size=chunk_size)
    # Relative to the terms, which may cancel.
    scale = config.sigma / math.sqrt(2 * pairs) * np.abs(weights).sum()
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-6 * 16 * scale)
    assert whole.shape == shape


def test_generation_may_be_an_array(xp):
    at = compiled(
        xp, lambda generation: direction(xp.asarray(KEY), (5, 3), generation, xp.asarray(WEIGHTS[:6]), CONFIG)
    )
    actual = at(xp.asarray(3, dtype=xp.int32))
    assert_close(actual, sum_over_members((5, 3), 3, WEIGHTS[:6], CONFIG), 1e-6)


def test_the_unbiased_scale_is_the_other_over_sigma_squared_and_the_root_of_n(xp):
    reference, unbiased = (
        to_numpy(direction_of(xp, WEIGHTS[:6], replace(CONFIG, gradient_scale=scale)))
        for scale in ("reference", "unbiased")
    )
    np.testing.assert_allclose(unbiased * 0.3**2 * math.sqrt(6), reference, rtol=1e-6)


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("gradient_scale", ["reference", "unbiased"])
def test_the_scale_takes_the_sigma_and_rank_of_the_evaluation(gradient_scale, low_rank):
    config = replace(CONFIG, gradient_scale=gradient_scale)
    of_another_run = direction_scale(config, low_rank=low_rank, sigma=0.7, rank=5)
    assert of_another_run == direction_scale(replace(config, sigma=0.7, rank=5), low_rank=low_rank)
    assert of_another_run != direction_scale(config, low_rank=low_rank)


def test_plain_descent_steps_by_about_sigma_whatever_population_and_rank():
    """The rule of thumb of the documentation: with z-scored weights the direction's RMS is about sigma."""
    rng = np.random.default_rng(0)
    for population, rank in [(64, 1), (64, 8), (1024, 1), (1024, 8)]:
        config = EggrollConfig(population_size=population, rank=rank, sigma=0.2, antithetic=False)
        step = direction(KEY, (40, 40), 0, rng.normal(size=population).astype(np.float32), config)
        assert np.sqrt(np.mean(step**2)) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_noise_in_the_dtype_of_the_parameter(xp, dtype):
    config = replace(CONFIG, noise_dtype="param")
    key, weights = xp.asarray(KEY), xp.asarray(WEIGHTS[:6])
    draws, signs = draws_and_signs(xp.arange(6, dtype=xp.int32), config)
    noise = low_rank_noise(draw_keys(key, 0, draws, config), (5, 3), 2, dtype)
    A, B = (np.float64(to_numpy(factor)) for factor in noise)
    terms = (np.float64(WEIGHTS[:6]) * to_numpy(signs))[:, None, None] * (A @ B.swapaxes(1, 2))
    expected = -0.3 / np.sqrt(2) * np.sqrt(6) * terms.mean(axis=0)
    assert_close(direction(key, (5, 3), 0, weights, config, dtype=dtype), expected, 1e-6)
    in_float32 = to_numpy(direction(key, (5, 3), 0, weights, CONFIG, dtype=dtype))
    assert np.abs(in_float32 - expected).max() > 1e-3 * np.abs(expected).max()
    for untouched in ("float32", "float64"):
        wide = direction(key, (5, 3), 0, weights, config, dtype=untouched)
        np.testing.assert_array_equal(to_numpy(wide), in_float32)


def test_members_that_baseline_does_not_perturb_do_not_count(xp):
    config = EggrollConfig(population_size=12, fitness_shaping="baseline", group_size=4)
    counted = np.arange(12) % 4 >= 2
    as_given, zeroed = (to_numpy(direction_of(xp, weights, config)) for weights in (WEIGHTS, WEIGHTS * counted))
    np.testing.assert_array_equal(as_given, zeroed)
    assert_close(as_given, sum_over_members((5, 3), 0, WEIGHTS, config), 1e-6)


def test_zero_weights_give_a_zero_direction(xp):
    for shape in ((5, 3), (7,)):
        assert not to_numpy(direction_of(xp, np.zeros(6, np.float32), CONFIG, shape)).any()


def test_weights_in_double_precision():
    weights = np.float64(WEIGHTS[:6])
    actual = direction(KEY, (5, 3), 0, weights, CONFIG)
    assert actual.dtype == np.float32
    assert_close(actual, sum_over_members((5, 3), 0, weights, CONFIG), 1e-6)


def test_weights_of_draws_are_signed_sums_over_pairs(xp):
    weights, signs = xp.asarray([5.0, 3.0, 1.0, 7.0]), xp.asarray([1.0, -1.0, 1.0, -1.0])
    pairs = weights_of_draws(weights, signs, EggrollConfig(population_size=4))
    np.testing.assert_array_equal(to_numpy(pairs), [2, -6])
    single = weights_of_draws(weights, signs, EggrollConfig(population_size=4, antithetic=False))
    np.testing.assert_array_equal(to_numpy(single), [5, -3, 1, -7])


def test_dense_sum_of_scalars(xp):
    coefficients, noise = xp.asarray([2.0, -1.0]), xp.asarray([0.5, 0.25])
    total = dense_sum(coefficients, noise)
    assert (tuple(total.shape), float(total)) == ((), 0.75)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be a positive int, got 0"),
        ({"chunk_size": -4}, ValueError, "`chunk_size` must be a positive int, got -4"),
        ({"chunk_size": 2.5}, TypeError, "`chunk_size` must be a positive int, got 2.5"),
        ({"generation": -1}, ValueError, "`generation` must be a non-negative int, got -1"),
        ({"members": 5}, ValueError, "`weights` must have the shape (6,), one value for each member, got (5,)"),
        ({"members": 12}, ValueError, "`weights` must have the shape (6,), one value for each member, got (12,)"),
    ],
)
def test_bad_input(xp, options, error, message):
    arguments = {"generation": 0, "members": 6, **options}
    weights = xp.asarray(WEIGHTS[: arguments.pop("members")])
    with pytest.raises(error) as caught:
        direction(xp.asarray(KEY), (5, 3), weights=weights, config=CONFIG, **arguments)
    assert str(caught.value) == message


def peak_memory(population, chunk_size, shape):
    config = EggrollConfig(population_size=population, rank=2)
    weights = np.ones(population, np.float32)
    tracemalloc.start()
    try:
        direction(KEY, shape, 0, weights, config, chunk_size=chunk_size)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(48, 32), (300,)])
def test_memory_does_not_grow_with_the_population(shape):
    small, large = (peak_memory(population, 64, shape) for population in (2**10, 2**13))
    assert large < 1.05 * small
    assert peak_memory(2**10, None, shape) > 4 * small, "what is measured does not see the noise"
