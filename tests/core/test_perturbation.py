"""Which draw, which sign, which key, which noise: against the record and against itself in other shapes."""

from dataclasses import replace

import numpy as np
import pytest
from core.support import assert_close, compiled, recorded, recorded_cases, to_numpy, ulp_distance

from eggroll import EggrollConfig, prng
from eggroll.perturbation import (
    canonical_order,
    dense_noise,
    draw_keys,
    draws_and_signs,
    low_rank_noise,
    member_parameter,
    noise_precision,
    parameter_keys,
    stacked_keys,
)

pytestmark = pytest.mark.filterwarnings("error")

CASES = recorded_cases("perturbation")
SHAPES = [(4, 3), (10, 64), (16, 16), (1, 8)]
CONFIG = EggrollConfig(population_size=8, sigma=0.3, rank=2)
KEY_WORDS = (0x9E3779B9, 0x85EBCA6B)


def key_of(xp):
    return prng.key_from_words(KEY_WORDS, xp=xp)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_recorded_cases(xp, shape, rank):
    """Factors and dense noise of twelve cases, and what their members see.

    The record's A and dense noise hold the scale. It is taken off here, so that normals are compared, to 4 ULP and
    one more for each rounding: when the record multiplied with the scale and when the test divides by it.
    """
    noise = compiled(xp, lambda keys: (*low_rank_noise(keys, shape, rank), dense_noise(keys, shape)))
    cases = [case for case in CASES if tuple(case["shape"]) == shape and case["rank"] == rank]
    assert len(cases) == 12
    for case in cases:
        record = {name: recorded("perturbation")[f"{case['case']}.{name}"] for name in ("key", "A", "B", "dense")}
        member, sigma = case["thread"], case["sigma"]
        config = EggrollConfig(population_size=16, sigma=sigma, rank=rank, noise_lifetime=case["noise_reuse"] or None)
        draws, signs = draws_and_signs(xp.asarray([member], dtype=xp.int32), config)
        sign = float(signs[0])
        assert (int(draws[0]), sign) == (member // 2, -1.0 if member % 2 else 1.0)
        A, B, dense = noise(draw_keys(xp.asarray(record["key"]), case["epoch"], draws, config))
        unscaled = np.float32(record["A"] / np.float64(sign * sigma / np.sqrt(rank)))
        assert ulp_distance(to_numpy(A)[0], unscaled) <= 4 + 2, case
        assert ulp_distance(to_numpy(B)[0], record["B"]) <= 4, case
        assert ulp_distance(to_numpy(dense)[0], np.float32(record["dense"] / np.float64(sign * sigma))) <= 4 + 2, case


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:1])
def test_recorded_members(xp, shape, low_rank):
    parameter = xp.zeros(shape, dtype=xp.float32)
    for case in (case for case in CASES if tuple(case["shape"]) == shape and case["rank"] == 2):
        record = {name: recorded("perturbation")[f"{case['case']}.{name}"] for name in ("key", "A", "B", "dense")}
        config = EggrollConfig(
            population_size=16, sigma=case["sigma"], rank=2, noise_lifetime=case["noise_reuse"] or None
        )
        key = xp.asarray(record["key"])
        seen = member_parameter(parameter, key, case["epoch"], case["thread"], config, low_rank=low_rank)
        assert_close(seen, np.float64(record["A"]) @ record["B"].T if low_rank else record["dense"], 1e-6)


def test_every_recorded_case_is_replayed():
    assert len(CASES) == 144
    assert {tuple(case["shape"]) for case in CASES} == set(SHAPES)
    assert {case["noise_reuse"] for case in CASES} == {0, 1, 3}


def test_antithetic_pairs_share_a_draw(xp):
    draws, signs = draws_and_signs(xp.arange(8, dtype=xp.int32), CONFIG)
    assert (draws.dtype, signs.dtype) == (xp.int32, xp.float32)
    np.testing.assert_array_equal(to_numpy(draws), [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(to_numpy(signs), [1, -1, 1, -1, 1, -1, 1, -1])


def test_independent_members_have_their_own(xp):
    draws, signs = draws_and_signs(xp.arange(5, dtype=xp.int32), EggrollConfig(population_size=5, antithetic=False))
    assert signs.dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(draws), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(to_numpy(signs), [1, 1, 1, 1, 1])


def test_members_up_to_the_largest_index(xp):
    config = EggrollConfig(population_size=2**31 - 2)
    draws, signs = draws_and_signs(xp.asarray([2**31 - 4, 2**31 - 3], dtype=xp.int32), config)
    np.testing.assert_array_equal(to_numpy(draws), [2**30 - 2, 2**30 - 2])
    np.testing.assert_array_equal(to_numpy(signs), [1, -1])


@pytest.mark.parametrize(
    ("antithetic", "group_size", "expected"),
    [
        (True, 4, [0, 0, 1, -1, 0, 0, 1, -1, 0, 0, 1, -1]),
        (True, 0, [0, 0, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]),
        (False, 3, [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
    ],
)
def test_baseline_leaves_the_first_two_of_a_group_unperturbed(xp, antithetic, group_size, expected):
    config = EggrollConfig(
        population_size=12, fitness_shaping="baseline", group_size=group_size, antithetic=antithetic
    )
    _, signs = draws_and_signs(xp.arange(12, dtype=xp.int32), config)
    np.testing.assert_array_equal(to_numpy(signs), expected)
    parameter = xp.asarray([0.5, -0.25, 3.0], dtype=xp.float32)
    for member, sign in enumerate(expected):
        seen = to_numpy(member_parameter(parameter, key_of(xp), 0, member, config))
        assert (seen == to_numpy(parameter)).all() == (sign == 0)


@pytest.mark.parametrize(("lifetime", "epochs"), [(None, [0] * 7), (1, list(range(7))), (3, [0, 0, 0, 1, 1, 1, 2])])
def test_noise_lifetime(xp, lifetime, epochs):
    config = replace(CONFIG, noise_lifetime=lifetime)
    draws = xp.arange(4, dtype=xp.int32)
    for generation, epoch in enumerate(epochs):
        expected = [to_numpy(prng.fold_in(prng.fold_in(key_of(xp), epoch), draw)) for draw in range(config.draws)]
        for index in (generation, np.int64(generation), xp.asarray(generation, dtype=xp.int32)):
            np.testing.assert_array_equal(to_numpy(draw_keys(key_of(xp), index, draws, config)), expected)


def test_a_lifetime_that_the_dtype_of_the_generation_does_not_hold(xp):
    draws = xp.arange(1, dtype=xp.int32)
    first = to_numpy(draw_keys(key_of(xp), 0, draws, CONFIG))
    for dtype, lifetime in ((xp.int8, 300), (xp.int32, 2**40)):
        config = replace(CONFIG, noise_lifetime=lifetime)
        keys = draw_keys(key_of(xp), xp.asarray(100, dtype=dtype), draws, config)
        np.testing.assert_array_equal(to_numpy(keys), first)


@pytest.mark.parametrize(
    ("lifetime", "generation", "epoch"), [(None, 2**70, 0), (1, 2**32 - 1, 2**32 - 1), (3, 2**32, 2**32 // 3)]
)
def test_generations_far_away(xp, lifetime, generation, epoch):
    keys = draw_keys(key_of(xp), generation, xp.arange(1, dtype=xp.int32), replace(CONFIG, noise_lifetime=lifetime))
    expected = prng.fold_in(prng.fold_in(key_of(xp), epoch), 0)
    np.testing.assert_array_equal(to_numpy(keys)[0], to_numpy(expected))


@pytest.mark.parametrize(
    ("lifetime", "generation", "error", "message"),
    [
        (1, -1, ValueError, "`generation` must be a non-negative int, got -1"),
        (None, -1, ValueError, "`generation` must be a non-negative int, got -1"),
        (1, 1.5, TypeError, "`generation` must be a non-negative int, got 1.5"),
        (1, True, TypeError, "`generation` must be a non-negative int, got True"),
        (1, 2**32, ValueError, "`generation` must be below 2**32 times the `noise_lifetime` of 1, got 4294967296"),
    ],
)
def test_bad_generations(xp, lifetime, generation, error, message):
    with pytest.raises(error) as caught:
        draw_keys(key_of(xp), generation, xp.arange(1, dtype=xp.int32), replace(CONFIG, noise_lifetime=lifetime))
    assert message in str(caught.value)


def last_bits(xp) -> int:
    """By how many ULP one draw may differ between two programs: JAX's compiler vectorises each in its own way."""
    return 4 if xp.__name__ == "jax.numpy" else 0


@pytest.mark.parametrize(
    ("shape", "rank"), [((5, 3), 1), ((5, 3), 9), ((1, 1), 2), ((1, 7), 2), ((0, 3), 1), ((3, 0), 2)]
)
def test_factors_are_one_draw_with_the_rows_of_b_first(xp, shape, rank):
    out_features, in_features = shape
    keys = draw_keys(key_of(xp), 4, xp.arange(3, dtype=xp.int32), replace(CONFIG, rank=rank))
    A, B = compiled(xp, lambda keys: low_rank_noise(keys, shape, rank))(keys)
    both = to_numpy(compiled(xp, lambda keys: prng.normal(keys, (in_features + out_features, rank)))(keys))
    assert tuple(A.shape) == (3, out_features, rank)
    assert tuple(B.shape) == (3, in_features, rank)
    assert ulp_distance(to_numpy(B), both[:, :in_features]) <= last_bits(xp)
    assert ulp_distance(to_numpy(A), both[:, in_features:]) <= last_bits(xp)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 2), (2, 0, 2)])
def test_dense_noise_is_one_draw(xp, shape):
    keys = draw_keys(key_of(xp), 4, xp.arange(3, dtype=xp.int32), CONFIG)
    noise = compiled(xp, lambda keys: dense_noise(keys, shape))(keys)
    assert tuple(noise.shape) == (3, *shape)
    for draw in range(3):
        single = compiled(xp, lambda key: prng.normal(key, shape))(keys[draw, :])
        assert ulp_distance(to_numpy(noise)[draw], to_numpy(single)) <= last_bits(xp)


def test_any_chunk_of_members_draws_the_same(xp):
    """Keys of all members at once, of one at a time and in another order."""
    config = EggrollConfig(population_size=6, antithetic=False)
    order = [3, 0, 5, 1]
    together = to_numpy(draw_keys(key_of(xp), 2, xp.arange(6, dtype=xp.int32), config))
    shuffled = to_numpy(draw_keys(key_of(xp), 2, xp.asarray(order, dtype=xp.int32), config))
    np.testing.assert_array_equal(shuffled, together[order])


@pytest.mark.parametrize("stack", [(), (3,), (2, 3), (1, 1, 2)])
def test_stacked_layers_have_their_keys_from_split(xp, stack):
    keys = to_numpy(stacked_keys(key_of(xp), stack))
    assert keys.shape == (*stack, 2)
    for index in np.ndindex(*stack):
        expected = key_of(xp)
        for length, place in zip(stack, index, strict=True):
            expected = prng.split(expected, length)[place, :]
        np.testing.assert_array_equal(keys[index], to_numpy(expected))


@pytest.mark.parametrize("low_rank", [True, False])
def test_a_stacked_parameter_is_its_layers(xp, low_rank):
    values = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)

    def seen(stack_axes):
        return compiled(
            xp,
            lambda parameter, key: member_parameter(
                parameter, key, 1, 5, CONFIG, low_rank=low_rank, stack_axes=stack_axes
            ),
        )

    stacked = to_numpy(seen(2)(xp.asarray(values), key_of(xp)))
    keys, of_layer = stacked_keys(key_of(xp), (2, 3)), seen(0)
    for i, j in np.ndindex(2, 3):
        assert_close(stacked[i, j], to_numpy(of_layer(xp.asarray(values[i, j]), keys[i, j, :])), 1e-6)
    assert len({tuple((stacked - values)[i, j].ravel()) for i, j in np.ndindex(2, 3)}) == 6


@pytest.mark.parametrize(
    ("shape", "stack_axes", "low_rank"),
    [
        ((4, 3), 0, True),
        ((), 0, False),
        ((2, 4, 3), 0, False),
        ((2, 4, 3), 1, True),
        ((2, 4), 1, False),
    ],
)
def test_matrices_are_low_rank_and_the_rest_is_dense(xp, shape, stack_axes, low_rank):
    parameter = xp.zeros(shape, dtype=xp.float32)

    def seen(config, choice=None):
        return to_numpy(
            compiled(
                xp,
                lambda parameter, key: member_parameter(
                    parameter, key, 0, 2, config, stack_axes=stack_axes, low_rank=choice
                ),
            )(parameter, key_of(xp))
        )

    by_default = seen(CONFIG)
    np.testing.assert_array_equal(by_default, seen(CONFIG, low_rank))
    assert by_default.all()
    frozen = seen(replace(CONFIG, freeze_nonlora=True))
    np.testing.assert_array_equal(frozen, by_default if low_rank else np.zeros(shape, np.float32))


def test_a_pair_lies_on_both_sides_of_the_parameter(xp):
    parameter = xp.ones((5, 3), dtype=xp.float32)
    plus, minus, next_pair = (to_numpy(member_parameter(parameter, key_of(xp), 0, i, CONFIG)) for i in (2, 3, 4))
    np.testing.assert_allclose(plus - 1, 1 - minus, atol=2e-7)
    assert np.abs(plus - 1).min() > 1e-4
    assert np.abs(plus - next_pair).min() > 1e-4


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("noise_dtype", ["float32", "param"])
def test_a_member_keeps_the_dtype_of_the_parameter(xp, dtype, noise_dtype):
    jax = xp.__name__ == "jax.numpy"
    if not hasattr(xp, dtype) or (jax and dtype == "float64"):
        pytest.skip(f"{xp.__name__} has no {dtype} here")
    config = replace(CONFIG, noise_dtype=noise_dtype)
    parameter = xp.zeros((6, 5), dtype=getattr(xp, dtype))
    seen = member_parameter(parameter, key_of(xp), 0, 1, config)
    assert seen.dtype == parameter.dtype
    precision = dtype if noise_dtype == "param" and dtype != "float64" else "float32"
    both = to_numpy(prng.normal(prng.fold_in(prng.fold_in(key_of(np), 0), 0), (11, 2), precision))
    expected = -0.3 / np.sqrt(2) * both[5:] @ both[:5].T
    assert_close(seen, expected, {"float64": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}[dtype])


@pytest.mark.parametrize(
    ("noise_dtype", "dtype", "precision"),
    [
        ("float32", "bfloat16", "float32"),
        ("param", "bfloat16", "bfloat16"),
        ("param", "float16", "float16"),
        ("param", "float32", "float32"),
        ("param", "float64", "float32"),
    ],
)
def test_noise_precision(noise_dtype, dtype, precision):
    assert noise_precision(replace(CONFIG, noise_dtype=noise_dtype), dtype) == precision


@pytest.mark.parametrize(
    ("member", "error", "message"),
    [
        (8, ValueError, "`member` must be below the population of 8, got 8"),
        (2**31, ValueError, "`member` must be below the population of 8, got 2147483648"),
        (-1, ValueError, "`member` must be a non-negative int, got -1"),
        (0.5, TypeError, "`member` must be a non-negative int, got 0.5"),
    ],
)
def test_members_outside_the_population(xp, member, error, message):
    with pytest.raises(error) as caught:
        member_parameter(xp.zeros((2, 2)), key_of(xp), 0, member, CONFIG)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "bool"])
def test_a_parameter_that_would_lose_its_noise(xp, dtype):
    """Cast to it, noise below 1 is 0."""
    with pytest.raises(TypeError, match="`parameter` must be floating point, got .*" + dtype):
        member_parameter(xp.zeros((2, 2), dtype=getattr(xp, dtype)), key_of(xp), 0, 0, CONFIG)


def test_parameter_keys_come_from_split_in_canonical_order(xp):
    names = ["2.bias", "10.bias", "0.weight", "0.bias", "0"]
    ordered = ["0", "0.bias", "0.weight", "10.bias", "2.bias"]
    assert canonical_order(reversed(names)) == canonical_order(names) == ordered
    keys = parameter_keys(key_of(xp), names)
    assert list(keys) == ordered
    np.testing.assert_array_equal([to_numpy(key) for key in keys.values()], to_numpy(prng.split(key_of(xp), 5)))


def test_components_are_compared_not_characters():
    """ "a.b" sorts before "a-b" by components ("a" before "a-b"), after it by characters ("-" before ".")."""
    assert canonical_order(["a-b", "a.b"]) == ["a.b", "a-b"]


def test_canonical_order_is_that_of_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    names = ["b.10.w", "b.9.w", "a-b.w", "a.b.w", "B.w", "a.a.w"]
    tree = {}
    for name in names:
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = name
    assert canonical_order(names) == jax.tree.leaves(tree)


def test_no_parameters_and_repeated_names():
    assert parameter_keys(prng.key(0), []) == {}
    with pytest.raises(ValueError, match="`names` must be unique"):
        parameter_keys(prng.key(0), ["a", "a"])
