"""Every shaping against the record and against a plain NumPy reading of its formula."""

import numpy as np
import pytest
from core.support import assert_close, recorded, recorded_cases, to_numpy

from eggroll import EggrollConfig
from eggroll.config import SHAPINGS
from eggroll.fitness import baseline, shape_fitness

pytestmark = pytest.mark.filterwarnings("error")

CASES = recorded_cases("fitness")
NAMED = [name for name in SHAPINGS if name != "raw"]


def config_of(shaping, population=24, group_size=0, **options):
    return EggrollConfig(population_size=population, fitness_shaping=shaping, group_size=group_size, **options)


def plain_weights(shaping, fitness, group):
    """The table of shapings, one member at a time, in double precision."""
    fitness = [float(f) for f in fitness]
    n = len(fitness)
    groups = [fitness[start : start + group] for start in range(0, n, group)]
    if shaping == "zscore":
        deviation = np.sqrt(np.var(fitness) + 1e-5)
        return [(f - np.mean(members)) / deviation for members in groups for f in members]
    if shaping == "group_zscore":
        return [
            (f - np.mean(members)) / np.std(members) if len(set(members)) > 1 else 0.0
            for members in groups
            for f in members
        ]
    if shaping == "centered_rank":
        below = [sum(g < f for g in fitness) for f in fitness]
        ties = [sum(g == f for g in fitness) for f in fitness]
        return [(b + (t - 1) / 2) / (n - 1) - 0.5 for b, t in zip(below, ties, strict=True)]
    if shaping == "sign":
        return [float(np.sign(f - fitness[i ^ 1])) for i, f in enumerate(fitness)]
    if shaping == "baseline":
        advantages = [[(f - q[0]) / (np.std(q) + 1e-8) for f in q] for q in groups]
        of_place = [np.mean([a[j] for a in advantages]) if j >= 2 else 0.0 for j in range(group)]
        return [of_place[i % group] for i in range(n)]
    return fitness


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['noiser']}-{case['population']}-{case['group_size']}"
)
def test_recorded_case(xp, case):
    raw, shaped = (recorded("fitness")[f"{case['case']}.{name}"] for name in ("raw", "shaped"))
    shaping = "baseline" if case["noiser"] == "eggrollbs" else "zscore"
    if shaping == "baseline":
        weights = baseline(xp.reshape(xp.asarray(raw), (-1, case["group_size"])))
        np.testing.assert_allclose(to_numpy(weights), shaped, rtol=0, atol=1e-6)
        shaped = np.tile(shaped, raw.size // case["group_size"])
    weights = shape_fitness(xp.asarray(raw), config_of(shaping, case["population"], case["group_size"]))
    np.testing.assert_allclose(to_numpy(weights), shaped, rtol=0, atol=1e-6)


RNG = np.random.default_rng(5)
NORMAL = RNG.normal(size=24).astype(np.float32)
SCORES = {
    "normal": NORMAL,
    "ties": RNG.integers(0, 4, size=24).astype(np.float32),
    "far from zero": NORMAL + np.float32(1e4),
    "wide": NORMAL * np.float32(1e5),
    "narrow": NORMAL * np.float32(1e-5),
    "variance overflows": NORMAL * np.float32(1e30),
    "differences overflow": np.where(NORMAL > 0, np.float32(3.4e38), np.float32(-3.4e38)),
    "one outlier": np.where(np.arange(24) == 7, np.float32(-1e6), NORMAL),
    "one group is constant": np.where(np.arange(24) // 6 == 2, np.float32(0.7), NORMAL),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("group_size", [0, 4, 6])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_equals_the_plain_formula(xp, shaping, group_size, scores):
    weights = shape_fitness(xp.asarray(scores), config_of(shaping, group_size=group_size))
    assert weights.dtype == xp.float32
    assert_close(weights, plain_weights(shaping, scores, group_size or 24), 1e-6)


@pytest.mark.parametrize("shaping", NAMED)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float16", 4e-3)])
def test_other_precisions(xp, shaping, dtype, tolerance):
    """float16 reaches 65504: its variance overflows far earlier."""
    if not hasattr(xp, dtype) or (xp.__name__ == "jax.numpy" and dtype == "float64"):
        pytest.skip(f"{xp.__name__} has no {dtype} here")
    scores = (RNG.permutation(24) * 5000.0 - 6e4).astype(dtype)
    weights = shape_fitness(xp.asarray(scores), config_of(shaping, group_size=6))
    assert weights.dtype == getattr(xp, dtype)
    assert_close(weights, plain_weights(shaping, scores, 6), tolerance)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize(("population", "group_size"), [(24, 0), (24, 6), (14, 0)])
@pytest.mark.parametrize("shaping", NAMED)
def test_constant_fitness_gives_zero_weights(xp, shaping, population, group_size, value):
    """Exactly zero, though the mean of 14 times 0.1 is not 0.1 in any float."""
    scores = xp.asarray([value] * population, dtype=xp.float32)
    weights = to_numpy(shape_fitness(scores, config_of(shaping, population, group_size)))
    np.testing.assert_array_equal(weights, np.zeros(population, np.float32))


@pytest.mark.parametrize("value", [0.1, 0.7, -0.3])
@pytest.mark.parametrize("shaping", ["zscore", "group_zscore"])
def test_a_constant_group_gives_zero_weights(xp, shaping, value):
    scores = np.where(np.arange(24) // 3 == 5, np.float32(value), NORMAL)
    weights = to_numpy(shape_fitness(xp.asarray(scores), config_of(shaping, group_size=3)))
    np.testing.assert_array_equal(weights == 0, np.arange(24) // 3 == 5)


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank", "sign", "group_zscore"])
def test_a_population_of_two(xp, shaping):
    weights = to_numpy(shape_fitness(xp.asarray([3.0, 1.0], dtype=xp.float32), config_of(shaping, 2)))
    one = {"zscore": 1 / np.sqrt(1 + 1e-5), "centered_rank": 0.5}.get(shaping, 1.0)
    np.testing.assert_allclose(weights, [one, -one], rtol=1e-6)


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_smallest_groups(xp, group_size):
    """A group of one has nothing to be compared with: its weights are zero."""
    weights = shape_fitness(xp.asarray(NORMAL), config_of("zscore", group_size=group_size))
    assert_close(weights, plain_weights("zscore", NORMAL, group_size), 1e-6)
    assert bool(to_numpy(weights).any()) == (group_size > 1)


@pytest.mark.parametrize("shaping", NAMED)
@pytest.mark.parametrize("scale", [3.0, 1e-3])
def test_more_fitness_is_more_weight(xp, shaping, scale):
    scores = np.linspace(-1, 1, 24, dtype=np.float32) * np.float32(scale)
    config = config_of(shaping)
    up, down = (to_numpy(shape_fitness(xp.asarray(s), config)) for s in (scores, -scores))
    assert up[-1] > up[0] or shaping == "sign"
    assert up[-1] > 0
    np.testing.assert_allclose(down, -up, atol=1e-6)


def test_a_callable_gets_the_scores_and_gives_the_weights(xp):
    seen = []

    def double(fitness):
        seen.append(fitness)
        return 2 * fitness

    scores = xp.asarray(NORMAL)
    weights = shape_fitness(scores, config_of(double))
    np.testing.assert_array_equal(to_numpy(weights), 2 * NORMAL)
    assert seen[0] is scores


@pytest.mark.parametrize("shape", [(23,), (24, 1), ()])
def test_a_callable_must_give_a_weight_for_each_member(xp, shape):
    config = config_of(lambda fitness: xp.zeros(shape, dtype=xp.float32))
    with pytest.raises(ValueError) as caught:
        shape_fitness(xp.asarray(NORMAL), config)
    assert (
        str(caught.value)
        == f"`fitness_shaping` must return a weight for each of the 24 members, got the shape {shape}"
    )


@pytest.mark.parametrize("shape", [(23,), (25,), (24, 1), (2, 12), ()])
@pytest.mark.parametrize("shaping", ["zscore", "raw"])
def test_fitness_of_the_wrong_shape(xp, shaping, shape):
    with pytest.raises(ValueError) as caught:
        shape_fitness(xp.zeros(shape, dtype=xp.float32), config_of(shaping))
    assert str(caught.value) == f"`fitness` must have the shape (24,), one value for each member, got {shape}"


@pytest.mark.parametrize("dtype", ["int32", "bool"])
@pytest.mark.parametrize("shaping", ["zscore", "raw", abs])
def test_fitness_of_the_wrong_dtype(xp, shaping, dtype):
    scores = xp.zeros((24,), dtype=xp.int32 if dtype == "int32" else xp.asarray(True).dtype)
    with pytest.raises(TypeError, match=f"`fitness` must be floating point, got .*{dtype}"):
        shape_fitness(scores, config_of(shaping))


def test_a_callable_must_give_an_array(xp):
    with pytest.raises(ValueError) as caught:
        shape_fitness(xp.asarray(NORMAL), config_of(lambda fitness: [0.0] * 24))
    assert str(caught.value) == "`fitness_shaping` must return a weight for each of the 24 members, got list"
