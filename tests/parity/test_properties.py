"""For random shapes, ranks, populations, seeds, lifetimes, chunkings and dtypes NumPy, PyTorch and JAX agree."""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eggroll import EggrollConfig
from eggroll.parity.backends import Evaluation, backends_named
from eggroll.parity.models import initial, mlp
from eggroll.parity.numpy_backend import NumpyCore
from eggroll.parity.report import CHUNKED, EQUAL, NORMALS, OUTPUTS, SHAPED

CORE = NumpyCore()
ints = st.integers
keys = st.tuples(ints(0, 2**32 - 1), ints(0, 2**32 - 1)).map(lambda words: np.asarray(words, np.uint32))
examples = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def torch_cpu():
    pytest.importorskip("torch")
    return backends_named(["torch-cpu"])[0]


@pytest.fixture(scope="module")
def jax_cpu(quick_compilation):
    return backends_named(["jax-cpu"])[0]


def assert_within(tolerance, actual, expected):
    assert tolerance.excess(np.asarray(actual), np.asarray(expected)) <= 1


@st.composite
def configs(draw, max_rank=9, max_groups=12):
    antithetic = draw(st.booleans())
    shaping = draw(st.sampled_from(["zscore", "group_zscore", "centered_rank", "raw", "baseline"]))
    group = draw(st.sampled_from([0, 4, 6])) if shaping != "baseline" else draw(st.sampled_from([4, 6]))
    return EggrollConfig(
        population_size=draw(ints(1, max_groups)) * (group or 2),
        sigma=draw(st.floats(1e-3, 2.0)),
        rank=draw(ints(1, max_rank)),
        antithetic=antithetic,
        noise_lifetime=draw(st.none() | st.integers(1, 5)),
        fitness_shaping=shaping,
        group_size=group,
        freeze_nonlora=draw(st.booleans()),
        gradient_scale=draw(st.sampled_from(["reference", "unbiased"])),
        noise_dtype=draw(st.sampled_from(["float32", "param"])),
        rng=draw(st.sampled_from(["threefry", "philox"])),
    )


def assert_same_noise(backend, key, shape, generation, config, low_rank, dtype):
    members = range(config.population_size)
    actual, expected = (
        one.noise(key, shape, generation, members, config, low_rank=low_rank, dtype=dtype) for one in (backend, CORE)
    )
    np.testing.assert_array_equal(actual.signs, expected.signs)
    narrow = config.noise_dtype == "param" and dtype != "float32"
    for own, other in zip(actual.parts, expected.parts, strict=True):
        assert_within(EQUAL if narrow else NORMALS, own, other)


@examples
@given(
    key=keys,
    shape=st.tuples(ints(1, 40), ints(1, 40)),
    generation=ints(0, 2**31 - 1),
    config=configs(),
    low_rank=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_noise_on_torch(torch_cpu, key, shape, generation, config, low_rank, dtype):
    assert_same_noise(torch_cpu, key, shape, generation, config, low_rank, dtype)


@settings(examples, max_examples=40)
@given(
    key=keys,
    shape=st.sampled_from([(3, 5), (7, 7)]),
    generation=ints(0, 2**31 - 1),
    sigma=st.floats(1e-3, 2.0),
    lifetime=st.none() | ints(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    low_rank=st.booleans(),
    rng=st.sampled_from(["threefry", "philox"]),
)
def test_noise_on_jax(jax_cpu, key, shape, generation, sigma, lifetime, dtype, low_rank, rng):
    config = EggrollConfig(
        population_size=6, sigma=sigma, rank=3, noise_lifetime=lifetime, noise_dtype="param", rng=rng
    )
    assert_same_noise(jax_cpu, key, shape, generation, config, low_rank, dtype)


@examples
@given(key=keys, data=st.lists(ints(0, 2**32 - 1), min_size=1, max_size=9), n=ints(1, 50), seed=ints(0, 2**64 - 1))
@example(key=np.asarray([2**32 - 1, 2**31], np.uint32), data=[2**31, 2**32 - 1], n=1, seed=2**64 - 1)
def test_keys_on_torch(torch_cpu, key, data, n, seed):
    data = np.asarray(data, np.uint32)
    np.testing.assert_array_equal(torch_cpu.fold_in(key, data), CORE.fold_in(key, data))
    np.testing.assert_array_equal(torch_cpu.split(key, n), CORE.split(key, n))
    np.testing.assert_array_equal(torch_cpu.key(seed), CORE.key(seed))


@examples
@given(
    config=configs(),
    data=st.data(),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
)
def test_shaped_fitness_on_torch(torch_cpu, config, data, offset, spread):
    scores = data.draw(
        st.lists(st.floats(-1, 1, width=32), min_size=config.population_size, max_size=config.population_size)
    )
    fitness = np.asarray(scores, np.float32) * np.float32(spread) + np.float32(offset)
    assert_within(SHAPED, torch_cpu.shape_fitness(fitness, config), CORE.shape_fitness(fitness, config))


@st.composite
def evaluations(draw):
    config = draw(configs(max_rank=4, max_groups=3))
    widths = (draw(ints(1, 6)), *draw(st.lists(ints(1, 7), max_size=2)), draw(ints(1, 4)))
    model = mlp(widths, draw(st.sampled_from(["relu", "silu", "pqn"])), draw(st.booleans()), batch=draw(ints(1, 4)))
    rng = np.random.default_rng(draw(ints(0, 2**32)))
    return Evaluation(
        model=model,
        parameters=initial(model.shapes, rng),
        key=draw(keys),
        generation=draw(ints(0, 1000)),
        inputs=model.inputs(rng),
        config=config,
        chunk_size=draw(st.none() | ints(1, 9)),
    ), rng.standard_normal(config.population_size, dtype=np.float32)


@settings(examples, max_examples=40)
@given(evaluations())
def test_outputs_and_direction_on_torch(torch_cpu, problem):
    evaluation, scores = problem
    # A LayerNorm of one or two numbers divides by next to nothing: what rounds becomes as large as the result.
    tame = evaluation.model.activation != "pqn" or all(shape[0] > 2 for shape in evaluation.model.shapes.values())
    if tame:
        assert_within(OUTPUTS, torch_cpu.outputs(evaluation), CORE.outputs(evaluation))
    actual, expected = torch_cpu.direction(evaluation, scores), CORE.direction(evaluation, scores)
    assert set(actual) == set(expected)
    for name, value in evaluation.parameters.items():
        assert_within(OUTPUTS, value - actual[name], value - expected[name])


@pytest.mark.slow
@settings(examples, max_examples=3)
@given(evaluation=evaluations(), seed=ints(0, 2**32))
def test_outputs_and_direction_on_jax(jax_cpu, evaluation, seed):
    problem, scores = evaluation
    model = mlp((3, 5, 2), "silu", batch=2)
    parameters = initial(model.shapes, np.random.default_rng(seed))
    inputs = model.inputs(np.random.default_rng(seed))
    mine = Evaluation(model, parameters, problem.key, problem.generation, inputs, problem.config, problem.chunk_size)
    assert_within(OUTPUTS, jax_cpu.outputs(mine), CORE.outputs(mine))
    actual, expected = jax_cpu.direction(mine, scores), CORE.direction(mine, scores)
    for name, value in parameters.items():
        assert_within(OUTPUTS, value - actual[name], value - expected[name])


@settings(examples, max_examples=20)
@given(evaluations(), ints(1, 40))
def test_any_chunking_gives_the_same_on_torch(torch_cpu, problem, chunk_size):
    evaluation, scores = problem
    whole = Evaluation(**{**vars(evaluation), "chunk_size": None})
    parts = Evaluation(**{**vars(evaluation), "chunk_size": chunk_size})
    one, other = torch_cpu.direction(whole, scores), torch_cpu.direction(parts, scores)
    for name, value in evaluation.parameters.items():
        assert_within(CHUNKED, value - other[name], value - one[name])
