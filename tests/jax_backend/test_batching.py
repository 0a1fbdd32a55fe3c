"""How many members are evaluated at a time where nobody says."""

import jax
import jax.numpy as jnp
import pytest

from eggroll import EggrollConfig
from eggroll.jax import eggroll, es_value_and_grad, population_apply
from eggroll_jax import batching
from eggroll_jax.batching import draws_to_evaluate, draws_to_sum, largest_value
from eggroll_jax.layout import plan

KEY = jax.random.key(0)
W, X = jnp.ones((50, 40)), jnp.ones((3, 40))
CONFIG = EggrollConfig(population_size=24)


def largest(fn) -> int:
    return largest_value(jax.make_jaxpr(fn)(W, X), 1)


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (lambda w, x: x @ w.T, 3 * 50),  # the transposed matrix belongs to no member
        (lambda w, x: jnp.sum(jnp.tile(x @ w.T, 7)), 3 * 50 * 7),
        (jax.jit(lambda w, x: jnp.sum(jax.jit(lambda y, v: jnp.exp(y @ v))(x, 2 * w.T))), 3 * 50),
        (lambda w, x: jax.lax.scan(lambda carry, row: (carry + jnp.outer(row, row).sum(), None), 0.0, x)[0], 40 * 40),
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w, x: jnp.sum(x @ w.T), lambda w, x: 0.0, w, x), 3 * 50),
        (jax.checkpoint(lambda w, x: jnp.sum(jnp.sin(x @ w.T))), 3 * 50),
        (lambda w, x: jnp.sum(w * w), 0),
        (lambda w, x: jnp.sum(jnp.arange(9.0)[:, None] * x[0]), 9 * 40),
        (lambda w, x: jnp.zeros((0, 5)) @ jnp.zeros((5, 5)) + 0 * x.sum(), 1),
    ],
    ids=["product", "tiled", "jit in jit", "scan", "cond", "checkpoint", "parameters alone", "constants", "empty"],
)
def test_the_largest_value_of_a_member(fn, values):
    assert largest(fn) == 4 * values


@pytest.mark.parametrize(
    ("room", "draws"),
    [(0, 1), (2 * 100, 1), (2 * 100 * 5, 4), (2 * 100 * 7, 6), (2 * 100 * 11, 6), (2 * 100 * 12, None)],
    ids=["none", "one pair", "no rest", "half", "not less than half", "all"],
)
def test_as_many_as_there_is_room_for(room, draws, monkeypatch):
    monkeypatch.setattr(batching, "_CACHED", room)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert draws_to_evaluate("auto", CONFIG, 100) == draws
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert draws_to_evaluate("auto", CONFIG, 100) is None


def test_a_population_without_divisors_has_a_rest(monkeypatch):
    monkeypatch.setattr(batching, "_CACHED", 5 * 100)
    assert draws_to_evaluate("auto", EggrollConfig(population_size=13, antithetic=False), 100) == 5


def test_what_the_caller_says_counts():
    assert draws_to_evaluate(None, CONFIG, 1 << 40) is None
    assert draws_to_evaluate(5, CONFIG, 1 << 40) == 3
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
