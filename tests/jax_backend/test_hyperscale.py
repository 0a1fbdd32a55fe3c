"""All nine recorded runs, replayed through the reference's own interface."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll.jax.hyperscale as hs

pytestmark = pytest.mark.usefixtures("quick_compilation")

common = hs.models.common

REFERENCE = Path(__file__).parents[1] / "reference"


def load(index):
    with np.load(REFERENCE / f"trajectory_{index}.npz") as file:
        record = {name: file[name] for name in file.files}
    return record, json.loads(str(record["config"]))


def parameters(record, prefix, dtype="float32"):
    tree = {}
    for name, value in record.items():
        if name.startswith(prefix + "/"):
            layer, kind = name.removeprefix(prefix + "/").split("/")
            tree.setdefault(layer, {})[kind] = jnp.asarray(value, None if prefix == "key" else dtype)
    return tree


def init_noiser(noiser, params, recorded):
    arguments = {
        "solver": getattr(optax, recorded["solver"]),
        "solver_kwargs": recorded["skw"],
        "group_size": recorded["group"],
        "freeze_nonlora": recorded["freeze"],
        "noise_reuse": recorded["reuse"],
        "rank": recorded["rank"],
        **recorded["extra"],
    }
    if recorded["reuse"]:
        return noiser.init_noiser(params, recorded["sigma"], recorded["lr"], **arguments)
    with pytest.warns(UserWarning, match="noise_reuse=0"):
        return noiser.init_noiser(params, recorded["sigma"], recorded["lr"], **arguments)


@pytest.mark.parametrize("index", range(9))
def test_recorded_run(index):
    record, recorded = load(index)
    dtype = recorded["dtype"]
    noiser = hs.noiser.all_noisers[recorded["name"]]
    init = common.MLP.rand_init(
        jax.random.key(0), recorded["in_dim"], recorded["out_dim"], recorded["hidden"], recorded["bias"],
        recorded["act"], dtype,
    )  # fmt: skip
    params = parameters(record, "init", dtype)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init.params)
    keys = common.simple_es_tree_key(params, jnp.asarray(record["es_key"]), init.scan_map)
    jax.tree.map(np.testing.assert_array_equal, keys, parameters(record, "key"))
    frozen, noiser_params = init_noiser(noiser, params, recorded)
    members = jnp.arange(recorded["N"])

    @jax.jit
    def forward(noiser_params, params, epoch, inputs):
        def one(thread, x):
            return common.MLP.forward(
                noiser, frozen, noiser_params, init.frozen_params, params, keys, (epoch, thread), x
            )

        return jax.vmap(one)(members, inputs)

    @jax.jit
    def update(noiser_params, params, epoch, raw):
        fitnesses = noiser.convert_fitnesses(frozen, noiser_params, raw)
        iterinfos = (jnp.full(recorded["N"], epoch), members)
        return fitnesses, noiser.do_updates(frozen, noiser_params, params, keys, fitnesses, iterinfos, init.es_map)

    # bfloat16 has 8 bits: one rounding is 2**-8 of a value, and a run has several.
    tolerance = {"float32": 1e-5, "bfloat16": 2**-6}[dtype]
    for epoch in range(recorded["gens"]):
        outputs = forward(noiser_params, params, epoch, jnp.asarray(record["inputs"][epoch], dtype))
        expected = record["outputs"][epoch]
        np.testing.assert_allclose(
            np.asarray(outputs, np.float32), expected, rtol=0, atol=10 * tolerance * np.abs(expected).max()
        )
        # Scores as recorded, so that a rounded output does not turn into another ranking.
        fitnesses, (noiser_params, params) = update(noiser_params, params, epoch, jnp.asarray(record["raw"][epoch]))
        tiled = np.tile(fitnesses, recorded["N"] // len(fitnesses))
        np.testing.assert_allclose(tiled, record["shaped"][epoch], atol=2e-6 if dtype == "float32" else 1e-2)
    expected = parameters(record, f"params{recorded['gens']}")
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        want = np.asarray(want)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=str(path)
        )
        assert got.dtype == dtype
