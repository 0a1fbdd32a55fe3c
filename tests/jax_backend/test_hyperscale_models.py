"""Noisers and model parts of the reference's interface against materialised weights, and under `lax.scan`."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core.support import assert_close

import eggroll.jax.hyperscale as hs
from eggroll import EggrollConfig, prng
from eggroll.perturbation import draw_keys, draws_and_signs, member_parameter
from eggroll.update import direction

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compilation")]

common = hs.models.common
NOISERS = hs.noiser.all_noisers
GROUP = {"eggrollbs": 4}
MEMBERS, EPOCH, SIGMA, RANK = 8, 5, 0.3, 2


def start(name, params, **options):
    options = {"noise_reuse": 2, "rank": RANK, "group_size": GROUP.get(name, 0), **options}
    return NOISERS[name].init_noiser(params, SIGMA, options.pop("lr", 0.1), **options)


def words(key):
    return np.asarray(jax.random.key_data(key))


def as_member(name, param, key, thread, kind):
    """`param` as a member sees it, by the core, in NumPy; `kind` is that of an es_map."""
    config = EggrollConfig(
        population_size=MEMBERS,
        sigma=SIGMA,
        rank=RANK,
        noise_lifetime=2,
        fitness_shaping="baseline" if name == "eggrollbs" else "zscore",
        group_size=GROUP.get(name, 0),
    )
    param = np.asarray(param)
    is_matrix = kind != common.PARAM
    if name == "noop" or kind == common.EXCLUDED:
        return param
    if name == "sparse" and is_matrix:
        draws, signs = draws_and_signs(np.asarray([thread], np.int32), config)
        where, what = prng.split(draw_keys(words(key), EPOCH, draws, config)[0], 2)
        entries = (max(param.shape),)
        unit = (prng.bits(where, entries) >> np.uint32(9)).astype(np.float32) * np.float32(2**-23)
        noise = np.zeros(param.size, np.float32)
        np.add.at(noise, np.floor(unit * np.float32(param.size)).astype(int), prng.normal(what, entries))
        return param + signs[0] * SIGMA * noise.reshape(param.shape)
    return member_parameter(param, words(key), EPOCH, thread, config, low_rank=is_matrix and name != "open_es")


def tree_as_member(name, params, keys, thread, es_map):
    def one(param, key, kind):
        return as_member(name, param, key, thread, kind)

    return jax.tree.map(one, params, keys, es_map)


# The noisers


@pytest.mark.parametrize("name", NOISERS)
def test_products_and_lookups_are_those_of_the_materialised_weight(name):
    noiser, key = NOISERS[name], jax.random.key(3)
    param = jax.random.normal(jax.random.key(0), (5, 3))
    wide, narrow = jax.random.normal(jax.random.key(1), (2, 4, 3)), jax.random.normal(jax.random.key(2), (2, 4, 5))
    ids = jnp.asarray([[0, 4, 4], [-1, 2, 9]])  # as `param[ids]` has it: from the end, or the last
    frozen, state = start(name, param)

    @jax.jit
    @jax.vmap
    def members(thread):
        common = (frozen, state, param, key, (EPOCH, thread))
        rows = noiser.do_emb(*common, ids), noiser.do_emb(*common, ids[0, 1]), noiser.do_emb(*common, 1)
        return noiser.do_mm(*common, wide), noiser.do_Tmm(*common, narrow), *rows

    seen = members(jnp.arange(MEMBERS))
    for thread in range(MEMBERS):
        weight = as_member(name, param, key, thread, common.MM_PARAM)
        expected = wide @ weight.T, narrow @ weight, jnp.asarray(weight)[ids], weight[4], weight[1]
        for got, want in zip(seen, expected, strict=True):
            assert_close(got[thread], want, 1e-5)
    for got, want in zip(
        [
            noiser.do_mm(frozen, state, param, key, None, wide),
            noiser.do_Tmm(frozen, state, param, key, None, narrow),
            noiser.do_emb(frozen, state, param, key, None, ids),
        ],
        [wide @ param.T, narrow @ param, param[ids]],
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", NOISERS)
def test_other_parameters(name, freeze):
    noiser, key = NOISERS[name], jax.random.key(3)
    param = jax.random.normal(jax.random.key(0), (2, 3, 4))
    frozen, state = start(name, param, freeze_nonlora=freeze)
    noisy = jax.vmap(lambda thread: noiser.get_noisy_standard(frozen, state, param, key, (EPOCH, thread)))
    seen = jnp.broadcast_to(noisy(jnp.arange(MEMBERS)), (MEMBERS, *param.shape))
    for thread in range(MEMBERS):
        expected = as_member(name, param, key, thread, common.EXCLUDED if freeze else common.PARAM)
        assert_close(seen[thread], expected, 1e-6)
    np.testing.assert_array_equal(noiser.get_noisy_standard(frozen, state, param, key, None), param)


@pytest.mark.parametrize("name", ["eggroll", "open_es"])
def test_an_update_is_the_direction_of_the_core(name):
    params = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
    keys = common.simple_es_tree_key(params, jax.random.key(1), {"b": (), "w": ()})
    frozen, state = start(name, params, lr=1.0)
    weights = np.random.default_rng(0).normal(size=MEMBERS).astype(np.float32)
    iterinfos = jnp.full(MEMBERS, EPOCH), jnp.arange(MEMBERS)
    es_map = {"b": common.PARAM, "w": common.MM_PARAM}
    _, updated = NOISERS[name].do_updates(frozen, state, params, keys, jnp.asarray(weights), iterinfos, es_map)
    config = EggrollConfig(population_size=MEMBERS, sigma=SIGMA, rank=RANK, noise_lifetime=2)
    for leaf, param in params.items():
        low_rank = leaf == "w" and name == "eggroll"
        step = direction(words(keys[leaf]), param.shape, EPOCH, weights, config, low_rank=low_rank)
        assert_close(param - updated[leaf], step, 1e-5)


def largest(jaxpr):
    """How many elements the largest array has that a jaxpr computes, in every jaxpr inside it."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [np.prod(variable.aval.shape) for variable in equation.outvars if hasattr(variable.aval, "shape")]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


@pytest.mark.parametrize("name", sorted(set(NOISERS) - {"noop", "reeggroll"}))
def test_an_update_in_chunks_is_the_same(name, monkeypatch):
    """No noise of all members at once, whether or not the last chunk is full."""
    params = {"b": jnp.ones((2, 70)), "w": jnp.ones((2, 24, 16))}
    keys = common.simple_es_tree_key(params, jax.random.key(1), {"b": (0,), "w": (0,)})
    members, es_map = 64, {"b": common.PARAM, "w": common.EMB_PARAM}
    frozen, state = start(name, params, lr=1.0)
    fitnesses = jax.random.normal(jax.random.key(4), (members,))
    iterinfos = jnp.arange(members) // 20, jnp.arange(members)

    def update():
        return NOISERS[name].do_updates(frozen, state, params, keys, fitnesses, iterinfos, es_map)[1]

    whole = jax.jit(update)()
    in_one = largest(jax.make_jaxpr(update)().jaxpr)
    held = {"open_es": 2 * 24 * 16, "sparse": 4 * 24}.get(name, 2 * (24 + 16) * RANK) * 9
    monkeypatch.setattr(hs.noiser.eggroll, "_NUMBERS_HELD", held)
    assert held < in_one
    assert largest(jax.make_jaxpr(lambda: update())().jaxpr) < in_one / 2
    in_chunks = jax.jit(lambda: update())()
    for leaf in params:
        assert_close(in_chunks[leaf] - 1, whole[leaf] - 1, 1e-5)


# The models


def forward_of(part, init, name, frozen, state, keys, *args):
    def forward(params, iterinfo):
        return part.forward(NOISERS[name], frozen, state, init.frozen_params, params, keys, iterinfo, *args)

    return forward


X = jax.random.normal(jax.random.key(9), (6, 4))
IDS = jnp.asarray([3, 0, 3])


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "pqn": lambda x: np.maximum(layer_norm(x), 0),
}


def mlp(activation, layers, bias=True):
    def apply(params, x):
        for place in range(layers):
            layer = params[str(place)]
            assert ("bias" in layer) == bias
            x = x @ layer["weight"].T + layer.get("bias", 0)
            x = ACTIVATIONS[activation](x) if place < layers - 1 else x
        return x

    return apply


PARTS = {
    "Parameter": (common.Parameter, ((3, 4), 0.5), (), lambda w: w),
    "MM": (common.MM, (4, 5), (X,), lambda w, x: x @ w.T),
    "TMM": (common.TMM, (4, 5), (X,), lambda w, x: x @ w),
    "Embedding": (common.Embedding, (4, 5), (IDS,), lambda w, ids: w[ids]),
    "Linear": (common.Linear, (4, 5), (X,), lambda p, x: x @ p["weight"].T + p["bias"]),
    "Linear without bias": (common.Linear, (4, 5, False), (X,), lambda p, x: x @ p["weight"].T),
    "MLP": (common.MLP, (4, 2, [5, 3]), (X,), mlp("relu", 3)),
    "MLP, silu": (common.MLP, (4, 2, [5], True, "silu"), (X,), mlp("silu", 2)),
    "MLP, pqn": (common.MLP, (4, 2, [5], False, "pqn"), (X,), mlp("pqn", 2, bias=False)),
    "MLP of a layer": (common.MLP, (4, 2, []), (X,), mlp("relu", 1)),
}


@pytest.mark.parametrize(
    ("part", "name"),
    [(part, "eggroll") for part in PARTS]
    + [(part, name) for part in ("Embedding", "MLP") for name in ("noop", "open_es", "sparse")],
)
def test_a_forward_pass_is_that_of_the_materialised_parameters(part, name):
    module, sizes, args, plain = PARTS[part]
    init = module.rand_init(jax.random.key(0), *sizes)
    # Biases start at zero.
    params = jax.tree.map(lambda leaf: leaf + 0.1, init.params)
    keys = common.simple_es_tree_key(params, jax.random.key(1), init.scan_map)
    frozen, state = start(name, params)
    forward = forward_of(module, init, name, frozen, state, keys, *args)
    plain_args = [np.asarray(arg) for arg in args]
    assert_close(forward(params, None), plain(jax.tree.map(np.asarray, params), *plain_args), 1e-5)
    seen = jax.jit(
        lambda params: jax.vmap(lambda thread: forward(params, (EPOCH, thread)), axis_size=MEMBERS)(
            jnp.arange(MEMBERS)
        )
    )(params)
    expected = [
        plain(tree_as_member(name, params, keys, thread, init.es_map), *plain_args) for thread in range(MEMBERS)
    ]
    assert_close(seen, np.stack(expected), 1e-5)
    eager = forward(params, (EPOCH, 3))
    assert_close(eager, expected[3], 1e-5)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="`activation` must be one of 'relu', 'silu', 'pqn', got 'gelu'"):
        common.MLP.rand_init(jax.random.key(0), 2, 2, [3], True, "gelu")


# Stacked layers

LAYERS = 3


def stacked_init(bias=True):
    """Three linear layers of four features along a leading axis, as `lax.scan` takes them."""
    one = common.Linear.rand_init(jax.random.key(0), 4, 4, bias)
    params = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), (LAYERS, *leaf.shape)) / 2, one.params
    )
    return one._replace(params=params, scan_map=jax.tree.map(lambda leaf: (0,), params))


@pytest.mark.parametrize("typed", [True, False])
def test_a_stacked_parameter_gets_a_key_for_each_layer(typed):
    key = jax.random.key(7) if typed else jax.random.PRNGKey(7)
    params = {"a": jnp.zeros(4), "b": jnp.zeros((3, 4)), "c": jnp.zeros((3, 2, 5))}
    keys = common.simple_es_tree_key(params, key, {"a": (), "b": (0,), "c": (0, 1)})
    own = prng.split(prng.key(7), 3)
    expected = {"a": own[0], "b": prng.split(own[1], 3), "c": prng.split(prng.split(own[2], 3), 2)}
    for name, want in expected.items():
        assert keys[name].shape == (want.shape[:-1] if typed else want.shape)
        np.testing.assert_array_equal(words(keys[name]), want)


def test_parameters_in_tuples_have_keys_too():
    params = (jnp.zeros(4), [jnp.zeros((3, 4))])
    keys = common.simple_es_tree_key(params, jax.random.key(7), ((), [(0,)]))
    own = prng.split(prng.key(7), 2)
    np.testing.assert_array_equal(words(keys[0]), own[0])
    np.testing.assert_array_equal(words(keys[1][0]), prng.split(own[1], 3))


def test_a_scan_map_or_a_key_that_does_not_fit():
    params = {"w": jnp.zeros((3, 4, 4))}
    with pytest.raises(ValueError, match=r"`scan_map` must name leading axes, .* got \(1,\)"):
        common.simple_es_tree_key(params, jax.random.key(0), {"w": (1,)})
    with pytest.raises(ValueError, match="key"):
        common.simple_es_tree_key(params, jax.random.key(0), {"v": ()})
    with pytest.raises(TypeError, match="`key` must be a key such as"):
        common.simple_es_tree_key(params, 0, {"w": ()})


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("name", NOISERS)
def test_layers_under_scan_are_the_layers_one_by_one(name, typed):
    init = stacked_init()
    key = jax.random.key(1) if typed else jax.random.PRNGKey(1)
    keys = common.simple_es_tree_key(init.params, key, init.scan_map)
    frozen, state = start(name, init.params)

    def layer(params, keys, iterinfo, x):
        return jnp.tanh(
            common.Linear.forward(NOISERS[name], frozen, state, init.frozen_params, params, keys, iterinfo, x)
        )

    def scanned(iterinfo):
        return jax.lax.scan(lambda x, own: (layer(*own, iterinfo, x), None), X, (init.params, keys))[0]

    seen = jax.jit(jax.vmap(lambda thread: scanned((EPOCH, thread)), axis_size=MEMBERS))(jnp.arange(MEMBERS))
    unperturbed = scanned(None)
    for thread in [None, *range(MEMBERS)]:
        x = np.asarray(X)
        for place in range(LAYERS):
            params, own = jax.tree.map(lambda leaf, place=place: leaf[place], (init.params, keys))
            if thread is not None:
                params = tree_as_member(name, params, own, thread, init.es_map)
            x = np.tanh(x @ np.asarray(params["weight"]).T + np.asarray(params["bias"]))
        assert_close(unperturbed if thread is None else seen[thread], x, 1e-5)


@pytest.mark.parametrize("name", NOISERS)
def test_the_update_of_stacked_layers_is_that_of_each(name):
    params = {
        "b": jax.random.normal(jax.random.key(1), (3, 4)),
        "w": jax.random.normal(jax.random.key(2), (3, 2, 5, 4)),
    }
    keys = common.simple_es_tree_key(params, jax.random.key(3), {"b": (0,), "w": (0, 1)})
    fitnesses = jax.random.normal(jax.random.key(4), (MEMBERS,))
    iterinfos = jnp.full(MEMBERS, EPOCH), jnp.arange(MEMBERS)

    def update(params, keys):
        frozen, state = start(name, params, solver=optax.adam)
        es_map = {leaf: common.PARAM if leaf[0] == "b" else common.MM_PARAM for leaf in params}
        return NOISERS[name].do_updates(frozen, state, params, keys, fitnesses, iterinfos, es_map)[1]

    together = jax.jit(update)(params, keys)
    places = [("b", (i,)) for i in range(3)] + [("w", place) for place in np.ndindex(3, 2)]
    layers = [{f"{leaf}{place}": tree[leaf][place] for leaf, place in places} for tree in (params, keys)]
    one_by_one = jax.jit(update)(*layers)
    for leaf, place in places:
        assert_close(together[leaf][place], one_by_one[f"{leaf}{place}"], 1e-5)
    assert (name == "noop") == bool((together["w"] == params["w"]).all())
    assert together["w"].shape == params["w"].shape


# What is left alone


@pytest.mark.parametrize("name", NOISERS)
def test_an_excluded_leaf_is_left_alone(name):
    """To the bit, with a solver that would move it without a direction, too."""
    params = {"in": jnp.full((4, 3), 0.1), "left": jnp.full((4, 3), 0.1), "still": jnp.full(3, 0.1)}
    keys = common.simple_es_tree_key(params, jax.random.key(3), {"in": (), "left": (), "still": ()})
    es_map = {"in": common.MM_PARAM, "left": common.EXCLUDED, "still": common.EXCLUDED}
    frozen, state = start(name, params, solver=optax.adamw, solver_kwargs={"weight_decay": 0.1})
    updated = params
    for epoch in range(3):
        fitnesses = jax.random.normal(jax.random.key(epoch), (MEMBERS,))
        iterinfos = jnp.full(MEMBERS, epoch), jnp.arange(MEMBERS)
        state, updated = NOISERS[name].do_updates(frozen, state, updated, keys, fitnesses, iterinfos, es_map)
    for leaf in ("left", "still"):
        np.testing.assert_array_equal(updated[leaf], params[leaf])
    assert (name == "noop") == bool((updated["in"] == params["in"]).all())


@pytest.mark.parametrize("name", sorted(set(NOISERS) - {"noop"}))
def test_freeze_nonlora_leaves_all_but_matrices_alone(name):
    params = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
    keys = common.simple_es_tree_key(params, jax.random.key(3), {"b": (), "w": ()})
    frozen, state = start(name, params, freeze_nonlora=True, solver=optax.adamw)
    iterinfos = jnp.zeros(MEMBERS, int), jnp.arange(MEMBERS)
    es_map = {"b": common.PARAM, "w": common.EMB_PARAM}
    fitnesses = jnp.arange(MEMBERS, dtype=jnp.float32)
    _, updated = NOISERS[name].do_updates(frozen, state, params, keys, fitnesses, iterinfos, es_map)
    np.testing.assert_array_equal(updated["b"], params["b"])
    assert not (updated["w"] == params["w"]).all()


# Ordinary imports

IMPORTS = """
import sys

for statement in (
    "import eggroll.jax.hyperscale as hs; found = hs.models",
    "import eggroll.jax.hyperscale.models; found = eggroll.jax.hyperscale.models",
    "from eggroll.jax.hyperscale.models.common import MLP as found",
    "from eggroll.jax.hyperscale.noiser.eggroll import EggRoll as found",
    "import eggroll.jax.hyperscale.noiser.open_es; found = eggroll.jax.hyperscale.noiser.open_es",
):
    for name in [name for name in sys.modules if name.startswith("eggroll")]:
        del sys.modules[name]
    names = {}
    exec(statement, names)
    found = getattr(names["found"], "__module__", None) or names["found"].__name__
    assert found.startswith("eggroll_jax.hyperscale."), statement
"""


def test_an_ordinary_import_as_the_first_one():
    """Each without what the ones before it have loaded of eggroll, in a process that other tests have not touched."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "models",
        "models.common",
        "noiser",
        *(f"noiser.{module}" for module in hs.noiser.__all__ if module != "all_noisers"),
    ],
)
def test_an_ordinary_import_gives_the_very_module(name):
    found = hs
    for part in name.split("."):
        found = getattr(found, part)
    assert importlib.import_module(f"eggroll.jax.hyperscale.{name}") is found
    assert importlib.import_module(f"eggroll_jax.hyperscale.{name}") is found


def test_no_file_is_loaded_twice():
    files = [module.__file__ for module in {id(m): m for m in sys.modules.values()}.values() if is_ours(module)]
    assert len(files) == len(set(files)) > 10


def is_ours(module):
    return "eggroll_jax" in str(getattr(module, "__file__", None))
