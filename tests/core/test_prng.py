"""Threefry and what is drawn with it, against the record, plain integers and `jax.random`."""

import functools

import numpy as np
import pytest
from core.support import compiled, recorded, to_numpy, ulp_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import prng

pytestmark = pytest.mark.filterwarnings("error")

RECORD = recorded("prng")
SHAPES = [name.removeprefix("bits.") for name in RECORD if name.startswith("bits.")]
WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
ODD_SHAPES = [(), (0,), (129,), (3, 0, 2), (7, 1, 3)]
PRECISIONS = ["float32", "bfloat16", "float16"]


def shape_of(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("x")))


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 as its authors write it, in unbounded integers."""
    word = 2**32
    schedule = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = (counter[0] + schedule[0]) % word, (counter[1] + schedule[1]) % word
    for round_ in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[round_ % 8]
        x0 = (x0 + x1) % word
        x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) % word ^ x0
        if round_ % 4 == 3:
            group = round_ // 4 + 1
            x0 = (x0 + schedule[group % 3]) % word
            x1 = (x1 + schedule[(group + 1) % 3] + group) % word
    return x0, x1


@pytest.mark.parametrize(
    ("key", "counter", "block"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_oracle_gives_the_known_answers_of_random123(key, counter, block):
    assert threefry(key, counter) == block


@pytest.mark.parametrize(
    ("seed", "words"),
    [(0, (0, 0)), (2**32 - 1, (0, 2**32 - 1)), (2**32 + 7, (1, 7)), (2**64 - 1, (2**32 - 1, 2**32 - 1))],
)
def test_key_is_the_high_and_the_low_word_of_the_seed(xp, seed, words):
    key = prng.key(seed, xp=xp)
    assert key.dtype == xp.uint32
    assert tuple(to_numpy(key)) == words
    np.testing.assert_array_equal(to_numpy(prng.key_from_words(words, xp=xp)), to_numpy(key))
    np.testing.assert_array_equal(to_numpy(prng.key_from_words(key, xp=xp)), to_numpy(key))


def test_recorded_key(xp):
    np.testing.assert_array_equal(to_numpy(prng.key(int(RECORD["seed"]), xp=xp)), RECORD["key"])


def test_recorded_fold_in(xp):
    key = xp.asarray(RECORD["key"])
    for data, expected in zip(RECORD["fold_in.data"], RECORD["fold_in.keys"], strict=True):
        np.testing.assert_array_equal(to_numpy(prng.fold_in(key, int(data))), expected)
    together = prng.fold_in(key, xp.asarray(RECORD["fold_in.data"]))
    np.testing.assert_array_equal(to_numpy(together), RECORD["fold_in.keys"])


def test_recorded_draws_in_jax_without_compilation():
    """The `xp` fixture compiles the rounds and the polynomial; here every operation is dispatched by itself."""
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    key = jnp.asarray(RECORD["key"])
    folded = prng.fold_in(key, jnp.asarray(RECORD["fold_in.data"]))
    np.testing.assert_array_equal(to_numpy(folded), RECORD["fold_in.keys"])
    np.testing.assert_array_equal(to_numpy(prng.bits(key, (7,))), RECORD["bits.7"])
    assert ulp_distance(prng.normal(key, (7,)), RECORD["normal_f32.7"]) <= 4


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_recorded_split(xp, n):
    np.testing.assert_array_equal(to_numpy(prng.split(xp.asarray(RECORD["key"]), n)), RECORD[f"split.{n}"])


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_bits_and_uniforms_are_equal(xp, name):
    key, shape = xp.asarray(RECORD["key"]), shape_of(name)
    bits, uniform = prng.bits(key, shape), prng.uniform(key, shape)
    assert bits.dtype == xp.uint32
    assert uniform.dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(bits), RECORD[f"bits.{name}"])
    np.testing.assert_array_equal(to_numpy(uniform), RECORD[f"uniform.{name}"])


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_normals(xp, name):
    key, shape = xp.asarray(RECORD["key"]), shape_of(name)
    assert ulp_distance(prng.normal(key, shape), RECORD[f"normal_f32.{name}"]) <= 4
    for precision, short in [("bfloat16", "bf16"), ("float16", "f16")]:
        normal = prng.normal(key, shape, precision)
        assert normal.dtype == xp.float32
        np.testing.assert_array_equal(to_numpy(normal), RECORD[f"normal_{short}.{name}"].astype(np.float32))


@pytest.mark.parametrize("high", WORDS)
def test_words_that_do_not_fit_a_signed_int(xp, high):
    key = xp.asarray([high, 2**32 - 1 - high], dtype=xp.uint32)
    words = tuple(map(int, to_numpy(key)))
    for data in WORDS:
        assert tuple(to_numpy(prng.fold_in(key, data))) == threefry(words, (0, data))
    for index, child in enumerate(to_numpy(prng.split(key, 3))):
        assert tuple(child) == threefry(words, (0, index))
    for index, bits in enumerate(to_numpy(prng.bits(key, (3,)))):
        y0, y1 = threefry(words, (0, index))
        assert bits == y0 ^ y1


word = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=200)
@given(high=word, low=word, data=word)
def test_fold_in_equals_plain_integers(high, low, data):
    key = np.asarray([high, low], dtype=np.uint32)
    assert tuple(prng.fold_in(key, data)) == threefry((high, low), (0, data))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int16", "uint8"])
def test_fold_in_takes_integers_of_no_dimensions_and_of_any_width(xp, dtype):
    key = prng.key(3, xp=xp)
    expected = to_numpy(prng.fold_in(key, 200 if dtype == "uint8" else 20000))
    data = 200 if dtype == "uint8" else 20000
    np.testing.assert_array_equal(to_numpy(prng.fold_in(key, xp.asarray(data, dtype=getattr(xp, dtype)))), expected)
    np.testing.assert_array_equal(to_numpy(prng.fold_in(key, np.dtype(dtype).type(data))), expected)


@pytest.mark.parametrize(
    ("keys", "data", "result"),
    [((2,), (0,), (0, 2)), ((4, 2), (), (4, 2)), ((4, 2), (3, 1), (3, 4, 2)), ((5, 1, 2), (4,), (5, 4, 2))],
)
def test_fold_in_broadcasts(xp, keys, data, result):
    key_values = np.arange(np.prod(keys), dtype=np.uint32).reshape(keys)
    data_values = np.arange(np.prod(data), dtype=np.int32).reshape(data)
    folded = to_numpy(prng.fold_in(xp.asarray(key_values), xp.asarray(data_values)))
    assert folded.shape == result
    all_keys = np.broadcast_to(key_values, result)
    all_data = np.broadcast_to(data_values, result[:-1])
    for index in np.ndindex(*result[:-1]):
        assert tuple(folded[index]) == threefry(tuple(map(int, all_keys[index])), (0, int(all_data[index])))


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("draw", [prng.bits, prng.uniform, prng.normal])
def test_batched_keys_draw_what_single_keys_draw(xp, draw, shape):
    keys = prng.split(prng.split(prng.key(11, xp=xp), 2), 3)
    draw_compiled = compiled(xp, lambda keys: draw(keys, shape))
    together = draw_compiled(keys)
    assert tuple(together.shape) == (2, 3, *shape)
    for i, j in np.ndindex(2, 3):
        single = draw_compiled(keys[i, j, :])
        assert tuple(single.shape) == shape
        np.testing.assert_array_equal(to_numpy(together)[i, j], to_numpy(single))


def test_batched_keys_split_as_single_keys_do(xp):
    keys = prng.split(prng.key(11, xp=xp), 3)
    together = to_numpy(prng.split(keys, 4))
    assert together.shape == (3, 4, 2)
    for index in range(3):
        np.testing.assert_array_equal(together[index], to_numpy(prng.split(keys[index, :], 4)))


@pytest.mark.parametrize("draw", [prng.bits, prng.uniform, prng.normal])
def test_a_longer_draw_begins_with_the_shorter_one(xp, draw):
    key = prng.key(5, xp=xp)
    np.testing.assert_array_equal(to_numpy(draw(key, (129,)))[:7], to_numpy(draw(key, (7,))))


def test_uniforms_are_mantissas_scaled_to_the_open_interval(xp):
    """What `jax.random.uniform` computes on [nextafter(-1, 0), 1), in float32 step by step."""
    key, n = prng.key(17, xp=xp), 2**16
    one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
    unit = ((to_numpy(prng.bits(key, (n,))) >> 9) | np.uint32(0x3F800000)).view(np.float32) - one
    expected = np.maximum(low, unit * (one - low) + low)
    np.testing.assert_array_equal(to_numpy(prng.uniform(key, (n,))), expected)
    assert np.abs(expected).max() < 1


@pytest.mark.parametrize(
    ("precision", "values", "smallest", "largest"),
    [("bfloat16", 128, -2.890625, 2.515625), ("float16", 1024, -3.486328125, 3.181640625)],
)
def test_a_narrow_dtype_has_few_normals_and_light_tails(xp, precision, values, smallest, largest):
    """2**17 draws miss one of 1024 values with a probability of about 1024 * exp(-128)."""
    normal = to_numpy(prng.normal(prng.key(2, xp=xp), (2**17,), precision))
    assert np.unique(normal).size == values
    assert normal.min() == smallest
    assert normal.max() == largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_libraries_agree_on_many_normals(xp, precision):
    actual = prng.normal(prng.key(23, xp=xp), (2**17,), precision)
    expected = prng.normal(prng.key(23), (2**17,), precision)
    assert ulp_distance(actual, expected) <= (4 if precision == "float32" else 0)


@functools.cache
def draws_of_jax(seed, shape):
    import jax

    key = jax.random.wrap_key_data(prng.key(seed), impl="threefry2x32")
    low = float(np.nextafter(np.float32(-1), np.float32(0)))
    uniform = jax.random.uniform(key, shape, minval=low, maxval=1.0)
    return jax.random.bits(key, shape), uniform, *(jax.random.normal(key, shape, p) for p in PRECISIONS)


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("shape", [(), (7, 1, 3), (1000, 33)])
def test_equals_jax_random(xp, shape):
    seed = 2**40 + 5
    key = prng.key(seed, xp=xp)

    def ours(key):
        return prng.bits(key, shape), prng.uniform(key, shape), *(prng.normal(key, shape, p) for p in PRECISIONS)

    bits, uniform, normal, *narrow = map(to_numpy, compiled(xp, ours)(key))
    expected_bits, expected_uniform, expected_normal, *expected_narrow = map(to_numpy, draws_of_jax(seed, shape))
    np.testing.assert_array_equal(bits, expected_bits)
    np.testing.assert_array_equal(uniform, expected_uniform)
    assert ulp_distance(normal, expected_normal) <= 4
    for actual, expected in zip(narrow, expected_narrow, strict=True):
        np.testing.assert_array_equal(actual, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda key: prng.key(-1), ValueError, "`seed` must be a non-negative int, got -1"),
        (lambda key: prng.key(2**64), ValueError, "`seed` must be below 2**64, got 18446744073709551616"),
        (lambda key: prng.key(1.0), TypeError, "`seed` must be a non-negative int, got 1.0"),
        (lambda key: prng.key(True), TypeError, "`seed` must be a non-negative int, got True"),
        (lambda key: prng.key("7"), TypeError, "`seed` must be a non-negative int, got '7'"),
        (
            lambda key: prng.key_from_words([1, 2, 3]),
            ValueError,
            "`seed` must be an int or a key of two words, got 3 words",
        ),
        (
            lambda key: prng.key_from_words([2**32, 0]),
            ValueError,
            "`seed` as a key must have words below 2**32, got [4294967296, 0]",
        ),
        (lambda key: prng.key_from_words([-1, 0]), ValueError, "`seed` must be a non-negative int, got -1"),
        (lambda key: prng.fold_in(key, -1), ValueError, "`data` must be a non-negative int, got -1"),
        (lambda key: prng.fold_in(key, 2**32), ValueError, "`data` must be below 2**32, got 4294967296"),
        (lambda key: prng.fold_in(key, 1.5), TypeError, "`data` must be a non-negative int, got 1.5"),
        (lambda key: prng.fold_in(key, True), TypeError, "`data` must be a non-negative int, got True"),
        (lambda key: prng.split(key, 0), ValueError, "`n` must be a positive int, got 0"),
        (
            lambda key: prng.bits(key, (2**16, 2**15)),
            ValueError,
            "one draw must have between 0 and 2**31 - 1 elements, got 2147483648",
        ),
        (lambda key: prng.bits(key, (-1,)), ValueError, "must have between 0 and 2**31 - 1 elements, got -1"),
        (
            lambda key: prng.normal(key, (3,), "float64"),
            ValueError,
            "`precision` must be one of 'float32', 'bfloat16', 'float16', got 'float64'",
        ),
    ],
)
def test_bad_input(xp, call, error, message):
    with pytest.raises(error) as caught:
        call(prng.key(0, xp=xp))
    assert message in str(caught.value)


def test_fold_in_refuses_fractions(xp):
    with pytest.raises(TypeError, match=r"`data` must hold integers, got .*float32"):
        prng.fold_in(prng.key(0, xp=xp), xp.asarray([1.5], dtype=xp.float32))


@pytest.mark.parametrize("draw", [lambda key: prng.bits(key, (2,)), lambda key: prng.fold_in(key, 1)])
@pytest.mark.parametrize(("shape", "dtype"), [((2,), "int32"), ((3,), "uint32"), ((), "uint32")])
def test_a_key_is_two_unsigned_words(xp, draw, shape, dtype):
    with pytest.raises(ValueError, match=r"`key` must be uint32 of shape \(\.\.\., 2\), got .*" + dtype):
        draw(xp.zeros(shape, dtype=getattr(xp, dtype)))
