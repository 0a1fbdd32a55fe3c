"""The recorded runs 0 to 4, replayed through `es_value_and_grad` and through `eggroll(...)`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EggrollConfig
from eggroll.jax import eggroll, es_value_and_grad, population_apply, scale_by_eggroll

REFERENCE = Path(__file__).parents[1] / "reference"


def layer_norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)


ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "pqn": lambda x: jax.nn.relu(layer_norm(x))}


def load(index):
    with np.load(REFERENCE / f"trajectory_{index}.npz") as file:
        record = {name: file[name] for name in file.files}
    return record, json.loads(str(record["config"]))


def parameters(record, prefix):
    tree = {}
    for name, value in record.items():
        if name.startswith(prefix + "/"):
            layer, kind = name.removeprefix(prefix + "/").split("/")
            tree.setdefault(layer, {})[kind] = jnp.asarray(value)
    return tree


def forward_of(config):
    activation = ACTIVATIONS[config["act"]]

    def forward(params, x):
        layers = sorted(params, key=int)
        for layer in layers:
            x = x @ params[layer]["weight"].T + params[layer]["bias"]
            x = activation(x) if layer != layers[-1] else x
        return x

    return forward


def fitness_of(config):
    forward = forward_of(config)

    def fitness(params, x):
        target = 2.0 if config["task"] == "two" else jnp.sum(jnp.sin(x))
        return -((forward(params, x)[0] - target) ** 2)

    return fitness


def eggroll_config(config):
    return EggrollConfig(
        population_size=config["N"],
        sigma=config["sigma"],
        rank=config["rank"],
        noise_lifetime=config["reuse"] or None,
        group_size=config["group"],
        freeze_nonlora=config["freeze"],
        noise_dtype="param",
    )


def assert_close(params, expected, rtol):
    for layer, leaves in expected.items():
        for name, value in leaves.items():
            got, value = np.asarray(params[layer][name]), np.asarray(value)
            np.testing.assert_allclose(
                got, value, atol=rtol * np.abs(value).max(), rtol=rtol, err_msg=f"{layer}.{name}"
            )


@pytest.mark.parametrize("index", range(5))
def test_replay_with_es_value_and_grad(index):
    record, recorded = load(index)
    layout = "dense" if recorded["name"] == "open_es" else None
    step = es_value_and_grad(fitness_of(recorded), eggroll_config(recorded), maximize=True, layout=layout)
    optimizer = getattr(optax, recorded["solver"])(recorded["lr"], **recorded["skw"])
    params = parameters(record, "init")

    @jax.jit
    def generation(params, state, number, x):
        value, gradient = step(params, jnp.asarray(record["es_key"]), number, x, per_member=True)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for number in range(recorded["gens"]):
        params, state, value = generation(params, state, number, record["inputs"][number])
        np.testing.assert_allclose(value, record["raw"][number].mean(), rtol=1e-4)
        if number == 0:
            assert_close(params, parameters(record, "params1"), 1e-5)
    assert_close(params, parameters(record, f"params{recorded['gens']}"), 1e-5)


@pytest.mark.parametrize("index", range(5))
def test_replay_with_the_gradient_transformation(index):
    record, recorded = load(index)
    config, layout = eggroll_config(recorded), "dense" if recorded["name"] == "open_es" else None
    key = jax.random.wrap_key_data(jnp.asarray(record["es_key"]))
    if recorded["solver"] == "sgd" and not recorded["skw"]:
        optimizer = eggroll(recorded["lr"], config, key, layout=layout)
    else:
        solver = getattr(optax, recorded["solver"])(recorded["lr"], **recorded["skw"])
        optimizer = optax.chain(scale_by_eggroll(config, key, layout=layout), solver)
    params = parameters(record, "init")
    evaluate = population_apply(forward_of(recorded), config, layout=layout)

    @jax.jit
    def generation(params, state, inputs):
        outputs = evaluate(params, key, state[0].count, inputs, per_member=True)
        target = 2.0 if recorded["task"] == "two" else jnp.sum(jnp.sin(inputs), -1)
        updates, state = optimizer.update(params, state, params, fitness=-((outputs[:, 0] - target) ** 2))
        return optax.apply_updates(params, updates), state, outputs

    state = optimizer.init(params)
    for number in range(recorded["gens"]):
        params, state, outputs = generation(params, state, record["inputs"][number])
        np.testing.assert_allclose(outputs, record["outputs"][number], atol=1e-4, rtol=1e-4)
    assert_close(params, parameters(record, f"params{recorded['gens']}"), 1e-5)
