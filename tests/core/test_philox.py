"""Philox and what is drawn with it, against Random123's known answers, plain integers and Triton's own."""

from dataclasses import replace

import numpy as np
import pytest
from core.support import assert_close, compiled, to_numpy, ulp_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import EggrollConfig, philox, prng
from eggroll.perturbation import (
    dense_noise,
    draw_keys,
    draws_and_signs,
    factors_of,
    low_rank_draws,
    low_rank_noise,
    member_parameter,
)
from eggroll.update import direction

pytestmark = pytest.mark.filterwarnings("error")

CONFIG = EggrollConfig(population_size=8, sigma=0.3, rank=3, rng="philox")
KEYS = np.asarray([[0, 0], [2**32 - 1, 2**31], [0xA4093822, 0x299F31D0]], np.uint32)


def oracle(key: tuple[int, ...], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 as its authors write it, in unbounded integers."""
    word = 2**32
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 // word ^ c1 ^ k0, p1 % word, p0 // word ^ c3 ^ k1, p0 % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def words_of(key: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, key))


def block_of(xp, key, counter):
    words = (xp.asarray(np.asarray([word], np.uint32).view(np.int32)) for word in (*key, *counter))
    return tuple(int(to_numpy(word).view(np.uint32)[0]) for word in philox.block(*words))


# https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors
KNOWN = [
    ((0,) * 2, (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "block"), KNOWN)
def test_known_answers_of_random123(xp, key, counter, block):
    assert oracle(key, counter) == block
    assert block_of(xp, key, counter) == block


word = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=200)
@given(key=st.tuples(word, word), counter=st.tuples(word, word, word, word))
def test_a_block_equals_plain_integers(key, counter):
    assert block_of(np, key, counter) == oracle(key, counter)


@pytest.mark.parametrize(
    ("shape", "stream"),
    [*((shape, 0) for shape in [(), (1,), (4,), (9,), (2, 3, 5), (0,), (3, 0), (0, 3)])]
    + [((3, 6), stream) for stream in (0, 1, 2**31 - 1)],
)
def test_the_counter_of_an_element(xp, shape, stream):
    """Word ``j % 4`` of the block at ``(j // 4, row, stream, 0)``, `row` counting along all axes but the last."""
    drawn = to_numpy(prng.bits(xp.asarray(KEYS), shape, rng="philox", stream=stream))
    assert drawn.shape == (3, *shape)
    assert drawn.dtype == np.uint32
    for place, key in enumerate(KEYS):
        for flat, element in enumerate(drawn[place].flat):
            row, j = divmod(flat, shape[-1] if shape else 1)
            assert element == oracle(words_of(key), (j // 4, row, stream, 0))[j % 4]


def test_batched_keys_draw_what_single_keys_draw(xp):
    keys = prng.split(prng.split(prng.key(11, xp=xp), 2), 3)
    together = to_numpy(prng.bits(keys, (3, 5), rng="philox"))
    assert together.shape == (2, 3, 3, 5)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(together[i, j], to_numpy(prng.bits(keys[i, j, :], (3, 5), rng="philox")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_uniforms_and_normals_are_those_of_the_bits(xp, precision):
    """The transform is Threefry's: what differs is where the bits come from."""
    key, shape = prng.key(5), (1000, 9)
    bits = prng.bits(key, shape, rng="philox")
    mantissa_bits = prng.MANTISSA_BITS[precision]
    k = (bits >> prng.MANTISSA_SHIFTS[precision]).astype(np.int64) & (2**mantissa_bits - 1)
    expected = (4 * k + 1 - 2 ** (mantissa_bits + 1)) / 2 ** (mantissa_bits + 1)

    def draw(key):
        return (
            prng.uniform(key, shape, precision, rng="philox"),
            prng.normal(key, shape, precision, rng="philox"),
        )

    uniform, normal = compiled(xp, draw)(xp.asarray(key))
    np.testing.assert_array_equal(to_numpy(uniform), expected.astype(np.float32))
    on_numpy = prng.normal(key, shape, precision, rng="philox")
    assert ulp_distance(normal, on_numpy) <= (4 if precision == "float32" else 0)
    if precision != "float32":
        np.testing.assert_array_equal(on_numpy, prng.narrow_normals(precision)[k])


def test_dense_noise_is_one_row_whatever_the_shape(xp):
    keys = xp.asarray(KEYS)
    noise = to_numpy(dense_noise(keys, (3, 5), rng="philox"))
    flat = to_numpy(prng.normal(keys, (15,), rng="philox"))
    np.testing.assert_array_equal(noise, flat.reshape(3, 3, 5))
    assert to_numpy(dense_noise(keys, (), rng="philox")).shape == (3,)


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(5, 3, 1), (4, 9, 3), (1, 1, 2), (0, 3, 1)])
def test_factors_are_two_streams_of_rows_of_features(xp, out_features, in_features, rank):
    keys = xp.asarray(KEYS)
    A, B = low_rank_noise(keys, (out_features, in_features), rank, rng="philox")
    for factor, features, stream in [(B, in_features, 0), (A, out_features, 1)]:
        drawn = to_numpy(prng.normal(keys, (rank, features), rng="philox", stream=stream))
        assert tuple(factor.shape) == (3, features, rank)
        np.testing.assert_array_equal(to_numpy(factor), drawn.swapaxes(1, 2))


@pytest.mark.parametrize("rng", ["threefry", "philox"])
def test_factors_are_made_of_the_draws_that_are_listed(rng):
    draws = low_rank_draws((5, 3), 2, rng)
    drawn = [prng.normal(KEYS, draw.shape, rng=rng, stream=draw.stream) for draw in draws]
    for own, expected in zip(factors_of(drawn, 3), low_rank_noise(KEYS, (5, 3), 2, rng=rng), strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("low_rank", [True, False])
def test_a_member_sees_the_noise_of_the_generator(xp, low_rank):
    parameter, key = xp.zeros((5, 3), dtype=xp.float32), xp.asarray(KEYS[2])
    draws, signs = draws_and_signs(np.asarray([3], np.int32), CONFIG)
    keys = draw_keys(KEYS[2], 4, draws, CONFIG)
    if low_rank:
        A, B = low_rank_noise(keys, (5, 3), 3, rng="philox")
        noise = A[0] @ B[0].T / np.sqrt(3)
    else:
        noise = dense_noise(keys, (5, 3), rng="philox")[0]
    seen = member_parameter(parameter, key, 4, 3, CONFIG, low_rank=low_rank)
    assert_close(seen, signs[0] * 0.3 * noise, 1e-6)
    other = to_numpy(member_parameter(parameter, key, 4, 3, replace(CONFIG, rng="threefry"), low_rank=low_rank))
    assert np.abs(to_numpy(seen) - other).max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 3), {}), ((7,), {}), ((5, 3), {"low_rank": False}), ((3, 4, 2), {"stack_axes": 1})],
)
def test_the_direction_is_the_sum_over_members(xp, shape, layout):
    weights = np.asarray([0.5, -1.5, 2.0, 0.25, -0.75, 1.0, -2.0, 0.1], np.float32)
    zero = np.zeros(shape, np.float32)
    seen = np.stack([member_parameter(zero, KEYS[2], 4, member, CONFIG, **layout) for member in range(8)])
    expected = -np.sqrt(8) * np.tensordot(np.float64(weights), np.float64(seen), axes=1) / 8

    def found(key, weights):
        return direction(key, shape, 4, weights, CONFIG, chunk_size=4, **layout)

    assert_close(compiled(xp, found)(xp.asarray(KEYS[2]), xp.asarray(weights)), expected, 1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rng": "pcg64"}, ValueError, "`rng` must be one of 'threefry', 'philox', got 'pcg64'"),
        ({"rng": None}, ValueError, "`rng` must be one of 'threefry', 'philox', got None"),
        ({"stream": 1}, ValueError, "`stream` must be 0 with `rng` 'threefry', got 1"),
        ({"rng": "philox", "stream": -1}, ValueError, "`stream` must be a non-negative int, got -1"),
        ({"rng": "philox", "stream": 0.5}, TypeError, "`stream` must be a non-negative int, got 0.5"),
        ({"rng": "philox", "stream": 2**31}, ValueError, "`stream` must be below 2**31, got 2147483648"),
    ],
)
@pytest.mark.parametrize("draw", [prng.bits, prng.uniform, prng.normal])
def test_bad_input(xp, draw, options, error, message):
    with pytest.raises(error) as caught:
        draw(prng.key(0, xp=xp), (3,), **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2**16, 2**15), (-1,), (3, -1)])
def test_bad_sizes(shape):
    with pytest.raises(ValueError, match="must have between 0 and 2\\*\\*31 - 1 elements, got"):
        prng.bits(KEYS[0], shape, rng="philox")
