"""`scale_by_eggroll` and `eggroll` among optax's own transformations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EggrollConfig
from eggroll.jax import eggroll, es_value_and_grad, population_apply, scale_by_eggroll

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EggrollConfig(population_size=32, sigma=0.1, rank=2)
KEY = jax.random.key(5)
PARAMS = {"bias": jnp.zeros(3), "kernel": jnp.ones((4, 3)) / 2}
X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(2), (4, 3)))


def loss(params, x=X, y=Y):
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


value_and_grad = jax.jit(es_value_and_grad(loss, CONFIG, maximize=False))


@jax.jit
def fitness(params, count, sigma=None):
    return -population_apply(loss, CONFIG)(params, KEY, count, X, Y, sigma=sigma)


def update_of(optimizer):
    """Compiled: what JAX runs operation by operation it compiles one by one."""
    return jax.jit(lambda state, params, fitness: optimizer.update(params, state, params, fitness=fitness))


def assert_trees_close(got, want, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), got, want)


def test_direction_equals_that_of_es_value_and_grad():
    _, gradient = value_and_grad(PARAMS, KEY, 0, X, Y)
    optimizer = scale_by_eggroll(CONFIG, KEY)
    direction, state = update_of(optimizer)(optimizer.init(PARAMS), PARAMS, fitness(PARAMS, 0))
    assert_trees_close(direction, gradient)
    assert int(state.count) == 1
    assert state.key == KEY


def test_maximize_is_minus_the_loss():
    value, gradient = value_and_grad(PARAMS, KEY, 3, X, Y)
    negated = jax.jit(es_value_and_grad(lambda *args: -loss(*args), CONFIG, maximize=True))
    negative, same = negated(PARAMS, KEY, 3, X, Y)
    assert_trees_close(gradient, same)
    np.testing.assert_allclose(value, -negative, rtol=1e-6)


def test_converges():
    optimizer = eggroll(0.5, CONFIG, KEY)

    @jax.jit
    def run(params):
        def generation(carry, _):
            params, state = carry
            updates, state = optimizer.update(
                params, state, params, fitness=fitness(params, optax.tree.get(state, "EggrollState").count)
            )
            return (optax.apply_updates(params, updates), state), loss(params)

        return jax.lax.scan(generation, (params, optimizer.init(params)), length=150)

    (params, state), losses = run(PARAMS)
    least = np.linalg.lstsq(np.c_[X, np.ones(len(X))], np.asarray(Y), rcond=None)[1].sum() / Y.size
    assert loss(params) < least + 0.1 * (losses[0] - least)
    assert int(optax.tree.get(state, "EggrollState").count) == 150


def test_schedules_weight_decay_and_mask():
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.1})
    optimizer = eggroll(schedule, CONFIG, KEY, weight_decay=0.01, mask={"bias": False, "kernel": True})
    state, params, scores = optimizer.init(PARAMS), PARAMS, jnp.linspace(-1, 1, 32)
    plain = scale_by_eggroll(CONFIG, KEY)
    plain_state = plain.init(PARAMS)
    update, plain_update = update_of(optimizer), update_of(plain)
    for rate in (0.5, 0.05):
        updates, state = update(state, params, scores)
        direction, plain_state = plain_update(plain_state, params, scores)
        np.testing.assert_allclose(updates["bias"], -rate * direction["bias"], rtol=1e-5)
        decayed = direction["kernel"] + 0.01 * params["kernel"]
        np.testing.assert_allclose(updates["kernel"], -rate * decayed, rtol=1e-5)


def test_weight_decay_leaves_frozen_parameters_as_they_are():
    params = {"w": jnp.ones((3, 2)), "fixed": jnp.ones((3, 2)), "b": jnp.ones(2), "steps": jnp.ones(2, jnp.int32)}
    layout = {"w": None, "fixed": "frozen", "b": None, "steps": "frozen"}
    optimizer = eggroll(0.5, replace(CONFIG, freeze_nonlora=True), KEY, weight_decay=0.01, layout=layout)
    updates, _ = update_of(optimizer)(optimizer.init(params), params, jnp.zeros(32))
    changed = optax.apply_updates(params, updates)
    np.testing.assert_allclose(changed.pop("w"), 0.995 * params["w"], rtol=1e-6)
    for name, leaf in changed.items():
        np.testing.assert_array_equal(leaf, params[name])


def test_injected_learning_rate_and_sigma_without_recompilation():
    optimizer = optax.inject_hyperparams(eggroll)(
        learning_rate=0.5, config=CONFIG, key=KEY, sigma=optax.exponential_decay(0.2, 1, 0.5)
    )
    traces = []

    @jax.jit
    def generation(params, state):
        traces.append(None)
        count = optax.tree.get(state, "EggrollState").count
        scores = fitness(params, count, sigma=0.2 * 0.5**count)
        updates, state = optimizer.update(params, state, params, fitness=scores)
        return updates, state

    state, params = optimizer.init(PARAMS), PARAMS
    for number in range(3):
        updates, state = generation(params, state)
        sigma = 0.2 * 0.5**number
        _, gradient = value_and_grad(PARAMS, KEY, number, X, Y, sigma=sigma)
        assert_trees_close(updates, optax.tree.scale(-float(state.hyperparams["learning_rate"]), gradient))
        state.hyperparams["learning_rate"] = jnp.float32(0.5 / (number + 2))
    assert len(traces) == 1


def test_multi_steps_average_the_directions_of_generations():
    solver = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
    optimizer = optax.chain(scale_by_eggroll(CONFIG, KEY), solver.gradient_transformation())
    state, update, directions = optimizer.init(PARAMS), update_of(optimizer), []
    for number in range(3):
        directions.append(value_and_grad(PARAMS, KEY, number, X, Y)[1])
        updates, state = update(state, PARAMS, fitness(PARAMS, number))
        if number < 2:
            assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert_trees_close(updates, jax.tree.map(lambda *gs: -sum(gs) / 3, *directions))


def test_a_generation_without_a_direction_can_be_left_out():
    w = jnp.ones((3, 2))
    optimizer = optax.chain(scale_by_eggroll(CONFIG, KEY), optax.apply_if_finite(optax.sgd(0.1), 3))
    state, update = optimizer.init(w), update_of(optimizer)
    for generation, bad in ((0, jnp.nan), (1, 0.0)):
        assert state[0].count == generation
        updates, state = update(state, w, jnp.arange(float(CONFIG.population_size)).at[2].add(bad))
        assert bool((updates == 0).all()) is (generation == 0)


def test_masked_needs_the_whole_tree_and_then_keeps_its_noise():
    mask = {"bias": False, "kernel": True}
    scores = jnp.linspace(-1, 1, 32) ** 2
    whole = scale_by_eggroll(CONFIG, KEY)
    want = update_of(whole)(whole.init(PARAMS), PARAMS, scores)[0]
    optimizer = optax.masked(scale_by_eggroll(CONFIG, KEY, template=PARAMS), mask)
    got, _ = update_of(optimizer)(optimizer.init(PARAMS), PARAMS, scores)
    np.testing.assert_array_equal(got["kernel"], want["kernel"])
    np.testing.assert_array_equal(got["bias"], PARAMS["bias"])
    with pytest.raises(ValueError, match="pass the whole tree as `template`"):
        optax.masked(scale_by_eggroll(CONFIG, KEY), mask).init(PARAMS)


def test_dtypes_and_structure_are_kept_and_extra_arguments_ignored():
    params = {"a": (jnp.ones((2, 3), jnp.bfloat16), jnp.ones(4, jnp.float16)), "b": None, "c": jnp.ones((3, 3))}
    optimizer = optax.chain(scale_by_eggroll(CONFIG, KEY), optax.scale(1.0))
    state = optimizer.init(params)
    updates, _ = jax.jit(lambda f: optimizer.update(params, state, params, fitness=f, value=3.0))(jnp.arange(32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_a_hundred_generations_in_one_program_equal_a_hundred_calls_and_donate():
    step = es_value_and_grad(loss, CONFIG, maximize=False, batch_size=12)
    optimizer = optax.adam(0.05)

    def generation(carry, number):
        params, state = carry
        value, gradient = step(params, KEY, number, X, Y)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = (PARAMS, optimizer.init(PARAMS))
    scanned, values = jax.jit(lambda carry: jax.lax.scan(generation, carry, jnp.arange(100)))(start)
    one = jax.jit(generation, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, start)
    for number in range(100):
        before = carry[0]["kernel"]
        carry, _ = one(carry, number)
        assert before.is_deleted()
    assert one._cache_size() == 1
    assert_trees_close(carry[0], scanned[0], atol=1e-5)
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_who_donates_the_state_keeps_the_key(make_key):
    key = make_key(5)
    state = scale_by_eggroll(CONFIG, key).init(PARAMS)
    jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)(state)
    assert state.key.is_deleted()
    assert not key.is_deleted()


def test_noise_is_the_same_whatever_the_partitionable_flag_says():
    apply = jax.jit(population_apply(loss, CONFIG))
    with jax.threefry_partitionable(True):
        want = apply(PARAMS, KEY, 0, X, Y)
    with jax.threefry_partitionable(False):
        got = apply(PARAMS, KEY, 0, X, Y)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(apply(PARAMS, jax.random.PRNGKey(5), 0, X, Y), want)


@pytest.fixture
def double_precision():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_fitness_in_double_precision_keeps_it(double_precision):
    """In float32 the scores below would be equal, and the direction zero."""
    key, w, config = jax.random.key(0), jnp.zeros(3), EggrollConfig(population_size=4)

    @jax.jit
    def found(offset):
        value, gradient = es_value_and_grad(lambda w: w.sum() + offset, config, maximize=True)(w, key, 0)
        scores = population_apply(lambda w: w.sum() + offset, config)(w, key, 0)
        optimizer = scale_by_eggroll(config, key)
        return value, gradient, optimizer.update(w, optimizer.init(w), w, fitness=scores)[0]

    for large, small in zip(found(1e9), found(0.0), strict=True):
        assert large.dtype == jnp.float64
        np.testing.assert_allclose(large, small + (1e9 if small.ndim == 0 else 0), rtol=1e-4)
