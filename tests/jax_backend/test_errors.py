"""Bad input: an error at trace time that names the argument, the rule, the value and the path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import eggroll.jax.hyperscale as hs
from eggroll import EggrollConfig
from eggroll.jax import Dense, Matrix, eggroll, es_value_and_grad, perturb, population_apply, scale_by_eggroll

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EggrollConfig(population_size=8)
KEY = jax.random.key(0)
W = jnp.ones((3, 2))


def traced(function, *args):
    """The error must come before anything is computed."""
    return jax.eval_shape(function, *args)


@pytest.mark.parametrize("shape", [(7,), (8, 1), ()])
def test_wrong_fitness_shape(shape):
    optimizer = scale_by_eggroll(CONFIG, KEY)
    state = optimizer.init(W)
    with pytest.raises(ValueError, match=r"`fitness` must have the shape \(8,\)"):
        traced(lambda f: optimizer.update(W, state, W, fitness=f), jnp.zeros(shape))


def test_missing_fitness_and_unknown_options():
    optimizer = eggroll(0.1, CONFIG, KEY)
    with pytest.raises(TypeError, match="needs the keyword argument `fitness`"):
        optimizer.update(W, optimizer.init(W), W)
    with pytest.raises(TypeError, match="learning_rates"):
        eggroll(learning_rates=0.1, config=CONFIG, key=KEY)
    with pytest.raises(TypeError, match="chunk"):
        population_apply(lambda w: w, CONFIG, chunk=2)
    with pytest.raises(ValueError, match="`batch_size` must be a positive int, got 0"):
        population_apply(lambda w: w, CONFIG, batch_size=0)
    with pytest.raises(TypeError, match="`batch_size` must be a positive int, got array"):
        population_apply(lambda w: w, CONFIG, batch_size=np.arange(2))
    with pytest.raises(TypeError, match="`maximize` must be a bool"):
        es_value_and_grad(lambda w: w, CONFIG, maximize="yes")


def test_configuration():
    with pytest.raises(ValueError, match="`population_size` must be even with antithetic pairs, got 7"):
        EggrollConfig(population_size=7)
    with pytest.raises(ValueError, match="`group_size` must divide the population of 8, got 3"):
        EggrollConfig(population_size=8, group_size=3)
    for make in (
        lambda: population_apply(lambda w: w, None),
        lambda: perturb(W, KEY, 0, 0, None),
        lambda: scale_by_eggroll(None, KEY),
    ):
        with pytest.raises(TypeError, match="`config` must be an EggrollConfig, got None"):
            make()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (0, TypeError, "`key` must be a key such as"),
        (jnp.zeros(2), TypeError, r"float32 of shape \(2,\)"),
        (jnp.zeros(3, jnp.uint32), TypeError, r"uint32 of shape \(3,\)"),
        (jax.random.key(0, impl="rbg"), TypeError, "must be a threefry2x32 key, got one of rbg"),
        (jax.random.split(jax.random.key(0), 2), ValueError, r"single key, got an array of keys of shape \(2,\)"),
    ],
)
def test_keys_of_the_wrong_kind(key, error, message):
    with pytest.raises(error, match=message):
        perturb(W, key, 0, 0, CONFIG)
    with pytest.raises(error, match=message):
        scale_by_eggroll(CONFIG, key)


def test_leaves():
    params = {"layer": {"w": W, "steps": jnp.zeros(3, jnp.int32)}}
    with pytest.raises(TypeError, match=r"parameter 'layer.steps' must be floating point to be perturbed, got int32"):
        perturb(params, KEY, 0, 0, CONFIG)

    def steps(params):
        layout = {"layer": {"w": None, "steps": "frozen"}}
        assert perturb(params, KEY, 0, 0, CONFIG, layout=layout)["layer"]["steps"] is params["layer"]["steps"]

    traced(steps, params)
    with pytest.raises(ValueError, match="no parameter to perturb"):
        perturb(params, KEY, 0, 0, CONFIG, layout="frozen")
    with pytest.raises(ValueError, match="no parameter to perturb"):
        perturb(jnp.ones((0, 3, 2)), KEY, 0, 0, CONFIG, layout=Matrix(1, 2))


def test_a_parameter_without_a_part():
    params = {"used": W, "lost": {"w": W}}

    def fn(params, x):
        ignored = jax.jit(lambda w: w @ w.T)(params["lost"]["w"])
        del ignored
        return x @ params["used"]

    with pytest.raises(ValueError, match=r"parameter 'lost.w' took no part in the output"):
        traced(population_apply(fn, CONFIG), params, KEY, 0, jnp.ones((1, 3)))
    layout = {"used": None, "lost": "frozen"}
    assert traced(population_apply(fn, CONFIG, layout=layout), params, KEY, 0, jnp.ones((1, 3))).shape == (8, 1, 2)


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        (Matrix(0, 2), ValueError, r"'w' of shape \(3, 2\) does not have the axes"),
        (Matrix(0, -2), ValueError, "'w': the axes of .* must differ"),
        (Dense(3), ValueError, r"'w' of shape \(3, 2\) does not have the axes"),
        ({"v": "dense"}, ValueError, "`layout` must have the structure of `params` or be a prefix"),
        ("lora", TypeError, "`layout` must give .* for 'w', got 'lora'"),
        (lambda path, leaf: 3, TypeError, "`layout` must give .* for 'w', got 3"),
    ],
)
def test_layouts(layout, error, message):
    with pytest.raises(error, match=message):
        perturb({"w": W}, KEY, 0, 0, CONFIG, layout=layout)
    for axes in ("in", None, 1.5, (), b"x", {0}):
        with pytest.raises(TypeError, match="`rows` must be an axis or a non-empty tuple of axes, got "):
            Matrix(rows=axes)
    assert Matrix(np.int64(0), [1]) == Matrix((0,), (1,))
    with pytest.raises(ValueError, match="`stack` must be a non-negative int, got -1"):
        Dense(-1)


def test_arguments_and_outputs_of_the_function():
    apply = population_apply(lambda w, x: x @ w, CONFIG)
    with pytest.raises(ValueError, match=r"argument 0 must have a leading axis of 8 members, got shape \(7, 3\)"):
        traced(lambda x: apply(W, KEY, 0, x, per_member=True), jnp.ones((7, 3)))
    with pytest.raises(TypeError, match="`generation` must be an integer, got float32"):
        apply(W, KEY, jnp.asarray(1.5), jnp.ones(3))
    with pytest.raises(ValueError, match="`generation` must be a non-negative int, got -1"):
        apply(W, KEY, -1, jnp.ones(3))
    with pytest.raises(TypeError, match=r"must return one real number for a member, got float32 of shape \(2,\)"):
        es_value_and_grad(lambda w, x: x @ w, CONFIG, maximize=True)(W, KEY, 0, jnp.ones(3))
    with pytest.raises(TypeError, match="must return a pair"):
        es_value_and_grad(lambda w: w.sum(), CONFIG, maximize=True, has_aux=True)(W, KEY, 0)
    with pytest.raises(TypeError, match="one real number for a member, got tuple; with `has_aux=True`"):
        es_value_and_grad(lambda w: (w.sum(), w), CONFIG, maximize=True)(W, KEY, 0)
    with pytest.raises(TypeError, match="`has_aux` must be a bool, got 'no'"):
        es_value_and_grad(lambda w: w.sum(), CONFIG, maximize=True, has_aux="no")
    with pytest.raises(TypeError, match="`strict` must be a bool, got 'no'"):
        population_apply(lambda w, x: x @ w, CONFIG, strict="no")
    with pytest.raises(TypeError, match="`strict` must be a bool, got 'no'"):
        perturb(W, KEY, 0, 0, CONFIG, strict="no")
    with pytest.raises(TypeError, match="`fn` must be callable, got None"):
        population_apply(None, CONFIG)
    with pytest.raises(TypeError, match="`fn` must be callable, got 1"):
        es_value_and_grad(1, CONFIG, maximize=True)


@pytest.mark.parametrize("per_member", [1, None, "yes", ("yes",), (True, False)])
def test_what_is_per_member(per_member):
    with pytest.raises(ValueError, match="`per_member` must be a bool or one for each of the 1 arguments, got "):
        population_apply(lambda w, x: x @ w, CONFIG)(W, KEY, 0, jnp.ones(3), per_member=per_member)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("generation", 1.0, TypeError, "`generation` must be a non-negative int, got 1.0"),
        ("generation", np.int64(-1), ValueError, "`generation` must be a non-negative int, got"),
        ("generation", 2**32, ValueError, "`generation` must be below 2.*, got 4294967296"),
        ("generation", jnp.arange(2), TypeError, r"`generation` must be an integer, got int32 of shape \(2,\)"),
        ("member", 8, ValueError, "`member` must be below the population of 8, got 8"),
        ("member", -1, ValueError, "`member` must be a non-negative int, got -1"),
        ("member", 1.5, TypeError, "`member` must be a non-negative int, got 1.5"),
        ("sigma", -0.1, ValueError, "`sigma` must be a positive finite number, got -0.1"),
        ("sigma", "small", TypeError, "`sigma` must be a positive finite number, got 'small'"),
        ("sigma", np.array(-0.1), ValueError, "`sigma` must be a positive finite number, got -0.1"),
        ("sigma", jnp.asarray(True), TypeError, r"`sigma` must be a positive number, got bool of shape \(\)"),
        ("sigma", jnp.ones(8), TypeError, r"`sigma` must be a positive number, got float32 of shape \(8,\)"),
    ],
)
def test_numbers(name, value, error, message):
    numbers = {"generation": 0, "member": 0, "sigma": None} | {name: value}
    sigma = numbers.pop("sigma")
    with pytest.raises(error, match=message):
        perturb(W, KEY, config=CONFIG, sigma=sigma, **numbers)
    if name == "sigma":
        optimizer = scale_by_eggroll(CONFIG, KEY, sigma=sigma)
        with pytest.raises(error, match=message):
            traced(lambda f: optimizer.update(W, optimizer.init(W), W, fitness=f), jnp.ones(8))


def test_devices():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"no mesh is set or one with automatic axes, .* got "):
        population_apply(lambda w, x: x @ w, CONFIG, mesh=mesh, axis_name="data")(W, KEY, 0, jnp.ones(3))
    inside = jax.shard_map(lambda w: w, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    with pytest.raises(NotImplementedError, match=r"cannot run `jax.shard_map` inside .* with `mesh=`"):
        population_apply(jax.jit(inside), CONFIG)(jnp.ones((3, 2)), KEY, 0)
    with pytest.raises(TypeError, match=r"`mesh` must be a jax.sharding.Mesh, got \['cpu'\]"):
        population_apply(lambda w, x: x @ w, CONFIG, mesh=["cpu"])(W, KEY, 0, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`axis_name` must be an axis of the mesh, .* got 'members'"):
        population_apply(lambda w, x: x @ w, CONFIG, mesh=mesh)(W, KEY, 0, jnp.ones(3))


def test_hyperscale():
    noiser = hs.noiser.eggroll.EggRoll
    with pytest.raises(TypeError, match="noise_resue"):
        noiser.init_noiser(W, 0.1, 0.1, noise_resue=1)
    with pytest.raises(ValueError, match=r"`group_size` must be given, it decides which members .*, got 0"):
        hs.noiser.eggroll_baseline_subtraction.EggRollBS.init_noiser(W, 0.1, 0.1, noise_reuse=1)
    with pytest.raises(ValueError, match=r"`group_size` must be even with .* antithetic pairs, got 5"):
        hs.noiser.eggroll_baseline_subtraction.EggRollBS.init_noiser(W, 0.1, 0.1, noise_reuse=1, group_size=5)
    with pytest.raises(TypeError, match="by position, got 1 more"):
        noiser.init_noiser(W, 0.1, 0.1, "sgd")
    with pytest.raises(TypeError, match="parameter 'n' must be floating point"):
        noiser.init_noiser({"n": jnp.zeros(2, jnp.int32)}, 0.1, 0.1)
    frozen, state = noiser.init_noiser(W, 0.1, 0.1, noise_reuse=1)
    with pytest.raises(ValueError, match=r"`fitnesses` must have the shape \(4,\)"):
        noiser.do_updates(frozen, state, W, KEY, jnp.zeros(3), (jnp.zeros(4, jnp.int32), jnp.arange(4)), 1)
    with pytest.raises(ValueError, match=r"`raw_scores` must have the shape \(N,\)"):
        noiser.convert_fitnesses(frozen, state, jnp.zeros((4, 2)))
