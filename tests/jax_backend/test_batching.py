"""How many members are evaluated at a time where nobody says."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from eggroll import EggrollConfig
from eggroll.jax import eggroll, es_value_and_grad, population_apply
from eggroll_jax import batching
from eggroll_jax.batching import draws_to_evaluate, draws_to_sum, largest_value
from eggroll_jax.layout import plan
from eggroll_jax.tracing import trace

KEY = jax.random.key(0)
W, X = jnp.ones((50, 40)), jnp.ones((3, 40))
CONFIG = EggrollConfig(population_size=24)


def largest(fn, *inputs) -> int:
    return largest_value(jax.make_jaxpr(fn)(W, X), inputs or ("factored", "shared"))


def on_a_device(w, x):
    mesh, own = jax.sharding.AbstractMesh((1,), ("i",)), jax.sharding.PartitionSpec("i")
    return jax.shard_map(lambda w, x: x @ w.T, mesh=mesh, in_specs=(None, own), out_specs=own)(w, x)


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (lambda w, x: x @ w.T, 3 * 50),  # the transposed matrix stays in factors
        (lambda w, x: x @ jax.lax.stop_gradient(jnp.stack([w, w])[0]).T, 3 * 50),
        (lambda w, x: x @ jnp.concatenate([w, w]).T, 3 * 100),
        (lambda w, x: x @ jnp.pad(jnp.tile(w, (2, 1)), ((0, 3), (0, 0))).T, 3 * 103),
        (lambda w, x: x @ (w / (w @ x[0])[0]).T, 3 * 50),  # by a number of its own
        (on_a_device, 3 * 50),
        (lambda w, x: x @ (1 / w).T, 50 * 40),
        (lambda w, x: x @ jnp.concatenate([w, jnp.ones((9, 40))]).T, 59 * 40),
        (lambda w, x: jnp.sum(jnp.tile(x @ w.T, 7)), 3 * 50 * 7),
        (jax.jit(lambda w, x: jnp.sum(jax.jit(lambda y, v: jnp.exp(y @ v))(x, 2 * w.T))), 3 * 50),
        (lambda w, x: jax.lax.scan(lambda c, row: (c + (w @ row).sum(), None), 0.0, x)[0], 50),
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w, x: jnp.sum(x @ w.T), lambda w, x: 0.0, w, x), 3 * 50),
        (lambda w, x: jax.lax.cond(w.sum() > 0, lambda: 1.0, lambda: 2.0), 1),
        (lambda w, x: jax.lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y @ w.T @ w, x), 3 * 50),
        (jax.checkpoint(lambda w, x: jnp.sum(jnp.sin(x @ w.T))), 3 * 50),
        (lambda w, x: jnp.sum(jnp.exp(w)), 50 * 40),  # formed for each member
        (lambda w, x: jnp.sum(jnp.outer(x, x)), 0),  # shared
        (lambda w, x: jax.random.key(0), 0),
        (lambda w, x: jax.random.split(jax.random.wrap_key_data((x @ w.T)[0, :2].astype(jnp.uint32))), 3 * 50),
    ],
)
def test_the_largest_value_of_a_member(fn, values):
    assert largest(fn) == 4 * values


def test_whose_a_value_is():
    assert largest(lambda w, x: jnp.outer(x, x), "shared", "own") == 4 * 120 * 120
    assert largest(lambda w, x: w.T, "own", "shared") == 4 * 50 * 40
    assert largest(lambda w, x: x @ w.T, "shared", "shared") == 0


def draws(room: int, config: EggrollConfig, monkeypatch, platform: str = "cpu") -> int | None:
    """With 200 bytes for the values of a pair: of one member 25 numbers."""
    monkeypatch.setattr(batching, "_CACHED", room)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    w, x = jnp.ones((25, 4)), jnp.ones(4)
    traced = trace(lambda arrays, x: arrays[0] @ x, [w], [x], [False])
    return draws_to_evaluate("auto", config, plan([w], config, None), traced)


@pytest.mark.parametrize(
    ("room", "expected"),
    [(0, 1), (200, 1), (200 * 5, 4), (200 * 7, 6), (200 * 11, 6), (200 * 12, None)],
    ids=["none", "one pair", "no rest", "half", "not less than half", "all"],
)
def test_as_many_as_there_is_room_for(room, expected, monkeypatch):
    assert draws(room, CONFIG, monkeypatch) == expected
    assert draws(room, CONFIG, monkeypatch, "gpu") is None
    monkeypatch.setattr(batching, "_NOISE", 4 * 29 * 2)
    assert draws(room, CONFIG, monkeypatch, "gpu") == 2


def test_a_population_without_divisors_has_a_rest(monkeypatch):
    assert draws(5 * 100, EggrollConfig(population_size=13, antithetic=False), monkeypatch) == 5


def test_what_the_caller_says_counts():
    chosen, traced = plan(W, CONFIG, None), trace(lambda arrays: jnp.exp(arrays[0]), [W], [], [])
    assert draws_to_evaluate(None, CONFIG, chosen, traced) is None
    assert draws_to_evaluate(5, CONFIG, chosen, traced) == 3
    assert draws_to_sum(5, CONFIG, plan(W, CONFIG, None)) == 3


def test_noise_of_the_update(monkeypatch):
    chosen = plan({"w": W, "frozen": W, "b": jnp.ones(10)}, CONFIG, {"w": None, "frozen": "frozen", "b": None})
    monkeypatch.setattr(batching, "_NOISE", 4 * (90 + 10) * 6)
    assert draws_to_sum("auto", CONFIG, chosen) == 6
    assert draws_to_sum(None, CONFIG, chosen) is None


@pytest.mark.parametrize("per_member", [False, True])
def test_the_result_is_that_of_all_members_at_once(per_member, monkeypatch):
    x = jnp.sin(jnp.arange(24 * 3 * 40.0)).reshape(24, 3, 40)[slice(None) if per_member else 0]

    def generation(batch_size):
        step = es_value_and_grad(
            lambda w, x: jnp.mean(jnp.tanh(x @ w.T)), CONFIG, maximize=True, batch_size=batch_size
        )
        return jax.jit(lambda w, x: step(w, KEY, 0, x, per_member=per_member))(W, x)

    whole = generation(None)
    monkeypatch.setattr(batching, "_CACHED", 4 * 3 * 50 * 2 * 4)
    monkeypatch.setattr(batching, "_NOISE", 4 * 90 * 4)
    parts = generation("auto")
    assert jnp.allclose(whole[0], parts[0], rtol=1e-6)
    assert jnp.allclose(whole[1], parts[1], rtol=1e-5, atol=1e-6)


def temporaries(members: int) -> int:
    config = EggrollConfig(population_size=members)
    step = es_value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x @ w.T)), config, maximize=True)
    compiled = jax.jit(lambda w, x: step(w, KEY, 0, x)).lower(W, X).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("batch_size", ["auto", None, 4])
def test_branches_without_operands(batch_size):
    def fitness(w, x):
        return (x @ w.T).sum() * jax.lax.switch(jnp.int32(x[0, 0]), [lambda: 1.0, lambda: 2.0])

    assert population_apply(fitness, CONFIG, batch_size=batch_size)(W, KEY, 0, X).shape == (24,)


@pytest.mark.parametrize("batch_size", [None, 4, 10])
@pytest.mark.parametrize("per_member", [False, True])
def test_outputs_without_elements(per_member, batch_size):
    apply = population_apply(lambda w, x: {"y": x @ w.T, "sum": (x @ w.T).sum()}, CONFIG, batch_size=batch_size)
    x = jnp.ones((24, 0, 40) if per_member else (0, 40))
    found = apply(W, KEY, 0, x, per_member=per_member)
    assert {name: leaf.shape for name, leaf in found.items()} == {"y": (24, 0, 50), "sum": (24,)}
    assert not found["sum"].any()


@pytest.mark.parametrize("batch_size", [4, 10, 24])
def test_keys_of_members_in_batches(batch_size):
    """Arrays of other kinds go through batches, and a rest, as they are."""

    def noisy(w, key):
        return {"value": (X @ w.T).sum() + jax.random.normal(key), "key": key}

    keys = jax.random.split(KEY, 24)
    whole, parts = (
        population_apply(noisy, CONFIG, batch_size=size)(W, KEY, 0, keys, per_member=True)
        for size in (None, batch_size)
    )
    assert jnp.allclose(whole["value"], parts["value"], rtol=1e-5)
    assert jnp.array_equal(jax.random.key_data(parts["key"]), jax.random.key_data(keys))


@pytest.mark.parametrize("batch_size", ["auto", None, 4])
def test_sizes_that_are_symbols(batch_size):
    apply = population_apply(lambda w, x: jnp.tanh(x @ w.T).sum(), CONFIG, batch_size=batch_size)
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 40), jnp.float32)
    exported = jax.export.export(jax.jit(lambda w, x: apply(w, KEY, 0, x)))(jax.ShapeDtypeStruct(W.shape, W.dtype), x)
    assert jnp.allclose(exported.call(W, X), apply(W, KEY, 0, X), rtol=1e-5)


@pytest.mark.parametrize("layout", ["dense", None])
def test_memory_of_what_is_made_of_parameters_alone(layout):
    """A megabyte for each of 512 members, where nothing but parameters goes in."""
    config = EggrollConfig(population_size=512)
    step = es_value_and_grad(lambda p: jnp.sum(jnp.exp(jnp.outer(p, p))), config, maximize=True, layout=layout)
    compiled = jax.jit(lambda p: step(p, KEY, 0)).lower(jnp.ones(512)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24 << 20


def test_memory_of_the_noise_of_many_layers():
    config = EggrollConfig(population_size=2048, rank=4)

    def fitness(layers, x):
        for w in layers:
            x = jnp.tanh(w @ x)
        return x.sum()

    step = es_value_and_grad(fitness, config, maximize=True)
    layers = [jnp.ones((256, 256)) for _ in range(15)]
    compiled = jax.jit(lambda layers, x: step(layers, KEY, 0, x)).lower(layers, jnp.ones(256)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * batching._NOISE


def test_memory_does_not_follow_the_population(monkeypatch):
    monkeypatch.setattr(batching, "_CACHED", 1 << 16)
    monkeypatch.setattr(batching, "_NOISE", 1 << 16)
    few, many = temporaries(1 << 10), temporaries(1 << 14)
    # What is left are some numbers for each member: its fitness, its key.
    assert many - few < 40 * (1 << 14)
    monkeypatch.undo()
    assert temporaries(1 << 14) > 4 * many


@pytest.mark.parametrize("batch_size", ["all", 0, -3, 2.5, True])
def test_what_it_cannot_be(batch_size):
    for make in (
        lambda: population_apply(lambda w: w, CONFIG, batch_size=batch_size),
        lambda: es_value_and_grad(jnp.sum, CONFIG, maximize=True, batch_size=batch_size),
        lambda: eggroll(0.1, CONFIG, KEY, batch_size=batch_size),
    ):
        with pytest.raises((TypeError, ValueError), match="`batch_size` must be a positive int"):
            make()
