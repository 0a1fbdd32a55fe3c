"""Members divided over 1, 2 and 8 host devices: the same fitness and the same parameters."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from eggroll import EggrollConfig
from eggroll.jax import Matrix, es_value_and_grad, population_apply

PROGRAM = """
import json, re, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec
from eggroll import EggrollConfig
from eggroll.jax import eggroll, es_value_and_grad, population_apply

config = EggrollConfig(population_size=32, rank=2)
key = jax.random.key(3)
params = {"w": jnp.ones((6, 5)) / 3, "b": jnp.zeros(5)}
x = jax.random.normal(jax.random.key(1), (32, 7, 6))
fitness = lambda p, x: -jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - 0.5) ** 2)
result = {}
for devices in (0, 1, 2, 8):
    mesh = jax.make_mesh((devices,), ("members",), devices=jax.devices()[:devices]) if devices else None
    step = es_value_and_grad(fitness, config, maximize=True, mesh=mesh, batch_size=3)
    apply = population_apply(fitness, config, mesh=mesh)
    optimizer = eggroll(0.3, config, key, mesh=mesh)

    @jax.jit
    def run(params):
        def generation(carry, number):
            params, state = carry
            scores = apply(params, key, number, x, per_member=True)
            updates, state = optimizer.update(params, state, params, fitness=scores)
            value, gradient = step(params, key, number, x, per_member=True)
            params = jax.tree.map(lambda p, u, g: p + u - 0.1 * g, params, updates, gradient)
            return (params, state), scores
        return jax.lax.scan(generation, (params, optimizer.init(params)), jnp.arange(5))

    (out, _), scores = run(params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(out))
    if devices == 8:
        text = jax.jit(lambda p: step(p, key, 0, x, per_member=True)).lower(params).compile().as_text()
        for line in text.splitlines():
            found = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\\(", line)
            if found:
                shapes = re.findall(r"\\w\\d+\\[([\\d,]*)\\]", found[1])
                sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
                result.setdefault("collectives", []).extend(sizes)
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(out)]
    result[devices] = {"scores": np.asarray(scores).tolist(), "params": leaves}
try:
    mesh = jax.make_mesh((3,), ("members",), devices=jax.devices()[:3])
    population_apply(fitness, config, mesh=mesh)(params, key, 0, x)
except ValueError as error:
    result["error"] = str(error)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.mark.parametrize("devices", ["1", "2", "8"])
def test_the_same_numbers(results, devices):
    def flat(value):
        return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]

    for what in ("scores", "params"):
        got, want = flat(results[devices][what]), flat(results["0"][what])
        assert got == pytest.approx(want, abs=1e-6), what


def test_a_mesh_that_is_set(quick_compilation):
    mesh = jax.make_mesh((1,), ("members",), axis_types=(AxisType.Auto,))
    config, x = EggrollConfig(population_size=4), jnp.ones((4, 3))

    def outputs(mesh):
        apply = population_apply(lambda w, x, b: x @ w + b, config, mesh=mesh)
        return jax.jit(partial(apply, per_member=(True, False)))(jnp.ones((3, 2)), jax.random.key(0), 0, x, 1.0)

    with jax.set_mesh(mesh):
        assert jnp.array_equal(outputs(mesh), outputs(None))


def test_a_population_on_each_device(quick_compilation):
    """Under `jax.shard_map`, which knows that the weights are shared and the inputs each device's own."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((3, 2)), "up": jnp.ones((2, 2, 5)), "down": jnp.ones((2, 5, 1))}

    def fitness(params, x, sizes):
        up = jax.lax.ragged_dot(x @ params["w"], params["up"], sizes)
        return jnp.sum(jax.lax.ragged_dot(up, params["down"], sizes))

    layout = {"w": None, "up": Matrix(1, 2), "down": "dense"}
    config = EggrollConfig(population_size=8)
    step = es_value_and_grad(fitness, config, maximize=True, layout=layout, batch_size=2, strict=True)

    def stacked(*args):
        return jax.tree.map(lambda leaf: leaf[None], step(params, jax.random.key(0), 0, *args))

    own = PartitionSpec("data")
    on_devices = jax.shard_map(stacked, mesh=mesh, in_specs=own, out_specs=own)
    args = jnp.ones((4, 3)), jnp.asarray([1, 3])
    assert jax.eval_shape(on_devices, *args) == jax.eval_shape(stacked, *args)


def test_devices_that_do_not_divide(results):
    assert results["error"] == "the 3 devices along 'members' must divide the 16 draws of the 32 members"


def test_only_fitness_and_sums_travel(results):
    """32 scores, or the sum for a parameter of 30 or 5 elements; the factors of a device's draws have 352."""
    assert results["collectives"]
    assert max(results["collectives"]) <= 35
