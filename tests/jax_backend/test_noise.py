"""Keys and numbers of the JAX backend are those of the core, however many are drawn at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core.support import recorded, to_numpy, ulp_distance

from eggroll import prng
from eggroll_jax.keys import Draws, fold_in, parted, random_bits, split
from eggroll_jax.noise import normal, normals, uniform01

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compilation")]

RECORD = recorded("prng")
SHAPES = [name.removeprefix("bits.") for name in RECORD if name.startswith("bits.")]
PRECISIONS = ["float32", "bfloat16", "float16"]
ULPS = {"float32": 4, "bfloat16": 0, "float16": 0}
# Around a block of 32 and far beyond it; nothing first, in the middle and last.
DRAWS = [
    Draws(2, (0,)),
    Draws(3, (1,)),
    Draws(1, (31,)),
    Draws(2, (32,)),
    Draws(1, (0,)),
    Draws(3, (33,)),
    Draws(2, (1000,)),
    Draws(1, (0,)),
]
KEYS = prng.split(prng.key(2**40 + 5), sum(draw.keys for draw in DRAWS))


def shape_of(name):
    return tuple(map(int, name.split("x")))


def of_each_key(draw, keys, draws=DRAWS):
    """What the core draws from one key after the other: for each of `draws`, shape ``(number of keys, *shape)``."""
    own = iter(keys)
    return [np.stack([draw(next(own), shape) for _ in range(count)]) for count, shape, _ in draws]


def drawn_bits(keys):
    return parted(random_bits(keys, DRAWS), DRAWS)


def assert_drawn(actual, expected, ulps=0):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        got = to_numpy(got)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if ulps:
            assert ulp_distance(got, want) <= ulps
        else:
            np.testing.assert_array_equal(got, want)


# One draw after the other


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_recorded_split(n):
    np.testing.assert_array_equal(split(jnp.asarray(RECORD["key"]), n), RECORD[f"split.{n}"])


def test_recorded_fold_in():
    key = jnp.asarray(RECORD["key"])
    np.testing.assert_array_equal(fold_in(key, RECORD["fold_in.data"]), RECORD["fold_in.keys"])
    np.testing.assert_array_equal(fold_in(key, int(RECORD["fold_in.data"][1])), RECORD["fold_in.keys"][1])
    np.testing.assert_array_equal(fold_in(key, 2**32 - 1), prng.fold_in(RECORD["key"], 2**32 - 1))


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_draws(name):
    key, shape = jnp.asarray(RECORD["key"]), shape_of(name)
    draws = [Draws(1, shape)]
    (bits,) = parted(random_bits(key[None], draws), draws)
    np.testing.assert_array_equal(bits[0], RECORD[f"bits.{name}"])
    assert ulp_distance(normal(key, shape), RECORD[f"normal_f32.{name}"]) <= 4
    for precision, short in [("bfloat16", "bf16"), ("float16", "f16")]:
        numbers = normal(key, shape, precision)
        assert numbers.dtype == np.float32
        np.testing.assert_array_equal(numbers, RECORD[f"normal_{short}.{name}"].astype(np.float32))


@pytest.mark.parametrize(
    ("keys", "data"), [((2,), ()), ((2,), (0,)), ((4, 2), ()), ((4, 2), (3, 1)), ((5, 1, 2), (4,)), ((0, 2), (3, 1))]
)
def test_keys_broadcast_as_in_the_core(keys, data):
    words = np.random.default_rng(0).integers(0, 2**32, keys, dtype=np.uint32)
    numbers = np.random.default_rng(1).integers(0, 2**32, data, dtype=np.uint32)
    expected = prng.fold_in(words, np.asarray(numbers))
    np.testing.assert_array_equal(fold_in(jnp.asarray(words), numbers), expected)
    np.testing.assert_array_equal(jax.jit(fold_in)(words, numbers), expected)
    np.testing.assert_array_equal(split(jnp.asarray(words), 3), prng.split(words, 3))


def test_keys_under_vmap():
    data = np.arange(len(KEYS), dtype=np.int32) * 1000
    expected = prng.fold_in(KEYS, data)
    np.testing.assert_array_equal(jax.vmap(fold_in)(KEYS, data), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(fold_in))(KEYS, data), expected)
    np.testing.assert_array_equal(jax.vmap(fold_in, (None, 0))(KEYS[0], data), prng.fold_in(KEYS[0], data))
    np.testing.assert_array_equal(jax.vmap(fold_in, (0, None))(KEYS, 7), prng.fold_in(KEYS, 7))
    np.testing.assert_array_equal(jax.vmap(lambda key: split(key, 3))(KEYS), prng.split(KEYS, 3))


def test_no_flag_of_jax_changes_a_key_or_a_number():
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(split(jnp.asarray(KEYS), 3), prng.split(KEYS, 3))
        np.testing.assert_array_equal(fold_in(jnp.asarray(KEYS), 9), prng.fold_in(KEYS, 9))
        assert_drawn(drawn_bits(jnp.asarray(KEYS)), of_each_key(prng.bits, KEYS))


@pytest.mark.parametrize("shape", [(), (0,), (129,), (3, 0, 2), (7, 1, 3)])
def test_a_draw_of_any_shape_for_each_key(shape):
    keys = jnp.asarray(KEYS[:6].reshape(2, 3, 2))
    expected = prng.normal(KEYS[:6].reshape(2, 3, 2), shape)
    assert ulp_distance(normal(keys, shape), expected) <= 4
    assert ulp_distance(jax.jit(lambda keys: normal(keys, shape))(keys), expected) <= 4
    together = uniform01(keys, shape)
    assert (together.shape, together.dtype) == ((2, 3, *shape), np.float32)
    # The top 23 bits, exactly.
    bits = prng.bits(KEYS[:6].reshape(2, 3, 2), shape)
    np.testing.assert_array_equal(together, (bits >> np.uint32(9)).astype(np.float32) * np.float32(2**-23))
    np.testing.assert_array_equal(jax.vmap(lambda keys: uniform01(keys, shape))(keys), together)


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_numbers(precision):
    """Enough that the tails of float32 are among them, and every value of a narrow precision."""
    got = jax.jit(lambda key: normal(key, (2**17,), precision))(jnp.asarray(prng.key(23)))
    want = prng.normal(prng.key(23), (2**17,), precision)
    assert ulp_distance(got, want) <= ULPS[precision]
    if precision != "float32":
        assert np.unique(want).size == 2 ** prng.MANTISSA_BITS[precision]


# Several draws at once


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bits_of_several_draws_are_those_of_each(how):
    assert_drawn(how(drawn_bits)(jnp.asarray(KEYS)), of_each_key(prng.bits, KEYS))


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_normals_of_several_draws_are_those_of_each(how, precision):
    got = how(lambda keys: normals(keys, DRAWS, precision))(jnp.asarray(KEYS))
    assert_drawn(got, of_each_key(lambda key, shape: prng.normal(key, shape, precision), KEYS), ULPS[precision])


@pytest.mark.parametrize("draw", ["bits", "normals"])
def test_leading_axes_and_vmap(draw):
    lead = prng.split(prng.split(prng.key(11), 2), 3)  # (2, 3, 2)
    keys = np.stack([np.stack([prng.split(key, len(KEYS)) for key in row]) for row in lead])
    function, ours, ulps = {
        "bits": (drawn_bits, prng.bits, 0),
        "normals": (lambda keys: normals(keys, DRAWS), prng.normal, 4),
    }[draw]
    rows = [[of_each_key(ours, own) for own in row] for row in keys]
    expected = [np.stack([np.stack([own[part] for own in row]) for row in rows]) for part in range(len(DRAWS))]
    for mapped in (function, jax.vmap(function), jax.vmap(jax.vmap(function))):
        assert_drawn(jax.jit(mapped)(jnp.asarray(keys)), expected, ulps)
    swapped = jax.jit(jax.vmap(function, in_axes=1, out_axes=1))(jnp.asarray(keys))
    assert_drawn(swapped, expected, ulps)


def test_every_key_and_every_counter_is_its_own():
    """A draw that used its neighbour's key, or a block that began at another's counter, repeats or misses integers.

    Element ``j`` of key ``k`` is what the core gives for it alone, and no integer appears where it does not belong.
    """
    keys = prng.split(prng.key(3), 5)
    draws = [Draws(2, (65,)), Draws(3, (97,))]
    parts = parted(random_bits(jnp.asarray(keys), draws), draws)
    got = [row for part in parts for row in np.asarray(part)]
    assert [len(row) for row in got] == [65, 65, 97, 97, 97]
    for row, key in zip(got, keys, strict=True):
        whole = prng.bits(key, (128,))
        for start in range(0, len(row), 32):  # block by block, so that a failure names the place
            block = row[start : start + 32]
            np.testing.assert_array_equal(block, whole[start : start + len(block)], err_msg=f"from element {start}")
    everything = np.concatenate(got)
    assert len(np.unique(everything)) == len(everything)  # by chance two agree for one key in 50000


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it():
    keys = jnp.asarray(KEYS[:3])
    draw = jax.jit(normals, static_argnums=1)
    alone = draw(keys[1:2], (Draws(1, (50,)),))[0][0]
    for before, after in [(0, 31), (1000, 33)]:
        together = draw(keys, (Draws(1, (before,)), Draws(1, (50,)), Draws(1, (after,))))[1][0]
        np.testing.assert_array_equal(together, alone)


def test_too_many_elements():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, got 2147483648"):
        random_bits(jnp.asarray(KEYS[:2]), [Draws(2, (2**30,))])


# Philox

PHILOX = [Draws(2, (3, 5)), Draws(1, ()), Draws(3, (2, 33), 1), Draws(0, (3,)), Draws(2, (0,)), Draws(1, (2, 0, 3))]


@pytest.mark.parametrize("how", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_philox_draws_are_those_of_the_core(how):
    """Bits to the bit; of keys along two leading axes too, in every axis and stream."""
    keys = prng.split(prng.split(prng.key(11), 2), sum(draw.keys for draw in PHILOX))  # (2, keys, 2)
    drawn = how(lambda keys: parted(random_bits(keys, PHILOX, "philox"), PHILOX, "philox"))(jnp.asarray(keys))
    first = 0
    for draw, bits in zip(PHILOX, drawn, strict=True):
        own, first = keys[:, first : first + draw.keys], first + draw.keys
        np.testing.assert_array_equal(bits, prng.bits(own, draw.shape, rng="philox", stream=draw.stream))


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_philox_numbers(precision):
    draws = [Draws(1, (4, 2**15 + 3), 1)]
    (got,) = jax.jit(lambda keys: normals(keys, draws, precision, "philox"))(jnp.asarray(prng.key(23)[None]))
    want = prng.normal(prng.key(23), draws[0].shape, precision, rng="philox", stream=1)
    assert ulp_distance(got[0], want) <= ULPS[precision]
