"""The contract: every member's output is that of the model with that member's weights, which are never formed."""

import math
from contextlib import nullcontext
from dataclasses import replace

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from eggroll import EggrollConfig
from eggroll.jax import Dense, Matrix, default_layout, materialise, perturb, population_apply

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EggrollConfig(population_size=10, rank=2, sigma=0.3)
KEY = jax.random.key(7)


def normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def population_of(fn, **options):
    return jax.jit(population_apply(fn, CONFIG, **options), static_argnames="per_member")


def member_of(fn, layout=None):
    """``(params, member, *args) -> output`` with the member's weights formed."""
    return jax.jit(
        lambda params, member, *args: fn(materialise(perturb(params, KEY, 0, member, CONFIG, layout=layout)), *args)
    )


def linen(module, *args):
    params = module.init(jax.random.key(1), *args)
    return module.apply, params, args, None


def nnx_model(model, *args):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, *args: nnx.merge(graph, params, rest, copy=True)(*args), params, args, None


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(13)(nn.LayerNorm()(nn.gelu(nn.Dense(31)(x))))


class LinenConv(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3), strides=(2, 1), kernel_dilation=(1, 2), feature_group_count=self.groups)(x))
        return nn.Conv(5, (2, 2), padding="VALID")(x)


class LinenEmbed(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(37, 11)
        return embed.attend(nn.Dense(11)(embed(ids)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=24)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(50)(nn.LayerNorm()(x))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), None


class LinenStack(nn.Module):
    """Layers stacked along axis 0 of every parameter, run by one `lax.scan`; rematerialised."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


def stacked_layout(path, leaf):
    return Matrix(rows=1, columns=2) if path[-1] == "kernel" else Dense(stack=1)


class EqxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, size, key):
        first, second = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(size)
        self.attention = eqx.nn.MultiheadAttention(3, size, use_query_bias=True, key=first)
        self.mlp = eqx.nn.MLP(size, size, 40, 1, key=second)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


class EqxConv(eqx.Module):
    conv: eqx.nn.Conv1d

    def __call__(self, x):
        return jax.vmap(self.conv)(x)


def plain(params, x):
    w, v, u = params["w"], params["v"], params["u"]
    x = jnp.einsum("oi,bi->ob", w, x)  # the weight on the left
    x = jnp.einsum("eio,eib->eob", v, x.reshape(2, 9, -1))  # one matrix for each expert
    x = jax.lax.cond(x.sum() > 0, lambda u, x: x @ (2.0 * u), lambda u, x: x @ -u, u, x.reshape(14, -1).T)
    q, k = jnp.split(u.T.astype(jnp.float32), 2)
    return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x + (x @ q.T) @ k[:, ::-1] @ u[:15]), x)


def plain_case():
    return plain, {"w": normal(18, 6), "v": normal(2, 9, 7) * 0.3, "u": normal(14, 14) * 0.3}, (normal(3, 6),), None


def joined(params, x):
    """Layers from a list run as a stack, and one of them is looked up."""
    layers = jnp.stack(params["layers"])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.concatenate([layers, 0.5 * params["more"]]))[0]
    return jnp.einsum("bi,oi->bo", x, jnp.stack(params["layers"], 1)[:, 1])


def joined_case():
    params = {"layers": [normal(17, 17), jnp.flip(normal(17, 17))], "more": normal(2, 17, 17)}
    layout = {"layers": None, "more": Matrix(1, 2)}
    return joined, params, (normal(3, 17),), lambda path, leaf: layout[path[0]]


def constrained_case():
    """What Flax does with partitioned parameters, and code that was written for gradients."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))

    def fn(w, x):
        sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
        w = jax.device_put(jax.lax.with_sharding_constraint(w, sharding), sharding)
        w, x = jax.lax.optimization_barrier((jax.lax.stop_gradient(w), x))
        return x @ checkpoint_name(w, "weight")

    return fn, normal(17, 5), (normal(3, 17),), None


def multiplied_case():
    """A gain that is learned, and one that follows from the weight: each member has another."""

    def fn(params, x):
        w = params["w"] * params["gain"]
        x = jnp.tanh(x @ (w / jnp.sqrt(jnp.sum((x @ w) ** 2))))
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, params["gain"] * params["layers"])[0]
        experts = params["layers"] / params["gain"]
        return x @ w.T + jax.lax.ragged_dot(x, experts, jnp.asarray([1, 2])) + w[jnp.asarray([4, 0, 2])]

    params = {"w": normal(17, 17), "layers": normal(2, 17, 17) * 0.3, "gain": jnp.full((), 1.5)}
    return fn, params, (normal(3, 17),), lambda path, leaf: Matrix(1, 2) if path[0] == "layers" else None


def sliced_case():
    def fn(params, x, start):
        window = jax.lax.dynamic_slice(params["w"], (start, start), (4, 5))
        return x @ window + params["w"][start, 2:]  # a row is a matrix no more

    return fn, {"w": normal(13, 7)}, (normal(5, 4), jnp.asarray(-15)), None


def padded_case():
    """Rows, columns and layers that the model adds."""

    def fn(params, x):
        w = jnp.pad(params["w"], ((1, 2), (0, 3)), constant_values=0.5)
        layers = jnp.pad(params["layers"], ((1, 0), (0, 0), (2, 0)), constant_values=0.1)
        x = jnp.pad(x, ((0, 0), (1, 2))) @ w @ w.T
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    params = {"w": normal(13, 5) * 0.3, "layers": normal(2, 16, 14) * 0.3}
    return fn, params, (normal(3, 13),), lambda path, leaf: Matrix(1, 2) if path[0] == "layers" else None


def tiled_case():
    def fn(params, x):
        x = x @ jnp.tile(params["w"], (1, 3))
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.tile(params["layers"], (2, 1, 1)))[0]

    params = {"w": normal(13, 5) * 0.3, "layers": normal(2, 15, 15) * 0.3}
    return fn, params, (normal(3, 13),), lambda path, leaf: Matrix(1, 2) if path[0] == "layers" else None


def custom_vjp_case():
    @jax.custom_vjp
    def double(w, x):
        return 2 * (x @ w)

    double.defvjp(lambda w, x: (double(w, x), None), lambda saved, g: (None, None))

    def scan(w, x):
        x = x + w[jnp.asarray([4, 0, 2])]
        return jax.lax.scan(lambda x, _: (jnp.tanh(double(w, x)), None), x, length=2)[0]

    return scan, normal(17, 17), (normal(3, 17),), None


def experts(params, x):
    """Each row goes through the expert that the router chooses for it."""
    expert = jnp.argmax(x @ params["router"], axis=-1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    hidden = jnp.tanh(jax.lax.ragged_dot(x[order], params["up"], sizes))
    return jax.lax.ragged_dot(hidden, jnp.swapaxes(params["down"], 1, 2), sizes)[jnp.argsort(order)]


def experts_layout(path, leaf):
    return None if path[-1] == "router" else Matrix(1, 2)


def experts_case():
    params = {"router": normal(17, 3), "up": normal(3, 17, 11) * 0.3, "down": normal(3, 17, 11) * 0.3}
    return experts, params, (normal(9, 17),), experts_layout


CASES = {
    "linen.Dense": lambda: linen(LinenMLP(), normal(3, 17)),
    "linen.Conv": lambda: linen(LinenConv(), normal(2, 7, 6, 8)),
    "linen.Conv grouped": lambda: linen(LinenConv(groups=4), normal(2, 7, 6, 8)),
    "linen.Conv grouped, inputs apart": lambda: (
        *linen(nn.Conv(6, (3, 2), feature_group_count=2), normal(1, 4, 3, 8))[:3],
        lambda path, leaf: Matrix(2, (0, 1, 3)) if path[-1] == "kernel" else None,
    ),
    "linen.ConvTranspose": lambda: linen(nn.ConvTranspose(5, (3, 2), (2, 1)), normal(1, 4, 3, 6)),
    "linen.ConvTranspose, transposed kernel": lambda: linen(
        nn.ConvTranspose(5, (3, 2), (2, 1), transpose_kernel=True), normal(1, 4, 3, 6)
    ),
    "linen.Embed": lambda: linen(LinenEmbed(), jnp.asarray([3, 36, 0])),
    "linen.MultiHeadDotProductAttention": lambda: linen(LinenBlock(), normal(1, 4, 17)),
    "linen.LSTMCell": lambda: linen(nn.RNN(nn.LSTMCell(13)), normal(1, 3, 17)),
    "linen.OptimizedLSTMCell": lambda: linen(nn.RNN(nn.OptimizedLSTMCell(13)), normal(1, 3, 17)),
    "linen.GRUCell": lambda: linen(nn.RNN(nn.GRUCell(13)), normal(1, 3, 17)),
    "linen.scan": lambda: (*linen(LinenStack(), normal(2, 17))[:3], stacked_layout),
    "nnx.Linear": lambda: nnx_model(
        nnx.Sequential(nnx.Linear(17, 31, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(31, 13, rngs=nnx.Rngs(1))),
        normal(3, 17),
    ),
    "nnx.Conv": lambda: nnx_model(nnx.Conv(5, 12, (3, 3), rngs=nnx.Rngs(0)), normal(1, 5, 4, 5)),
    "nnx.Embed": lambda: nnx_model(nnx.Embed(37, 11, rngs=nnx.Rngs(0)), jnp.asarray([[3, 36], [0, 1]])),
    "nnx.MultiHeadAttention": lambda: nnx_model(
        nnx.MultiHeadAttention(3, 17, 24, decode=False, rngs=nnx.Rngs(0)), normal(1, 4, 17)
    ),
    "nnx.LSTMCell": lambda: nnx_model(nnx.RNN(nnx.LSTMCell(17, 13, rngs=nnx.Rngs(0))), normal(1, 3, 17)),
    "equinox.nn.MLP": lambda: (
        lambda model, x: jax.vmap(model)(x), eqx.nn.MLP(17, 5, 23, 2, key=KEY), (normal(3, 17),), None,
    ),
    "equinox Transformer block": lambda: (lambda model, x: model(x), EqxBlock(18, KEY), (normal(3, 18),), None),
    "equinox.nn.Conv1d": lambda: (
        lambda model, x: model(x), EqxConv(eqx.nn.Conv1d(6, 9, 3, key=KEY)), (normal(1, 6, 5),), None,
    ),
    "plain functions": plain_case,
    "layers stacked by the model": joined_case,
    "constrained to devices": constrained_case,
    "multiplied with a number": multiplied_case,
    "a slice before the first row": sliced_case,
    "padded": padded_case,
    **({"tiled": tiled_case} if hasattr(jax.lax, "tile_p") else {}),
    "custom_vjp": custom_vjp_case,
    "ragged_dot": experts_case,
}  # fmt: skip


def shapes_in(jaxpr):
    """The shape of everything a jaxpr computes, in every jaxpr inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def assert_never_formed(traced, params, layout, config):
    """No value is as large as one copy of a matrix for each draw, with the matrix's own axes at its end."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        words = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
        if not eqx.is_array(leaf) or leaf.ndim < 2:
            continue
        if not isinstance((layout or default_layout)(words, leaf) or default_layout(words, leaf), Matrix):
            continue
        for shape in shapes_in(traced.jaxpr.jaxpr):
            tail, lead = shape[len(shape) - leaf.ndim :], shape[: max(len(shape) - leaf.ndim, 0)]
            formed = sorted(tail) == sorted(leaf.shape) and math.prod(lead) >= config.draws
            assert not formed, f"{words}: {shape}"


@pytest.mark.parametrize(
    ("case", "rng"),
    [
        *((case, "threefry") for case in CASES),
        *((case, "philox") for case in ("linen.Dense", "linen.Conv", "linen.Embed", "linen.scan", "equinox.nn.MLP")),
    ],
)
def test_members_equal_their_materialised_selves(case, rng):
    fn, params, args, layout = CASES[case]()
    config = replace(CONFIG, rng=rng)
    apply = population_apply(fn, config, layout=layout, strict=True)
    arrays, static = eqx.partition(params, eqx.is_array)
    jitted = jax.jit(lambda arrays, *args: apply(eqx.combine(arrays, static), KEY, 3, *args))
    assert_never_formed(jitted.trace(arrays, *args), params, layout, config)
    out = jitted(arrays, *args)

    @jax.jit
    def one(arrays, member, *args):
        dense = materialise(perturb(eqx.combine(arrays, static), KEY, 3, member, config, layout=layout))
        return fn(dense, *args)

    for member in range(config.population_size):
        expected = np.asarray(one(arrays, member, *args))
        # 1e-5 of the output's scale, which is at least that of the activations before it, about 1.
        np.testing.assert_allclose(out[member], expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))
    assert np.abs(np.asarray(out[0]) - np.asarray(out[1])).max() > 1e-3


@pytest.mark.parametrize("case", ["linen.Dense", "linen.Embed", "linen.Conv"])
def test_bfloat16(case):
    fn, params, args, layout = CASES[case]()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    args = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, args)
    out = population_of(fn, layout=layout, strict=True)(params, KEY, 0, *args)
    assert out.dtype == jnp.bfloat16
    one = member_of(fn, layout)
    for member in range(3):
        expected = np.asarray(one(params, member, *args), np.float32)
        np.testing.assert_allclose(
            np.asarray(out[member], np.float32), expected, rtol=0, atol=2**-4 * np.abs(expected).max()
        )


@pytest.mark.parametrize("where", [("attention",), ("params", "attention")])
@pytest.mark.parametrize("variable", [(), ("value",)])
def test_all_projections_of_attention_are_matrices_of_the_same_axes(where, variable):
    """A module called `value` is not the array of an nnx variable."""
    kernel = jnp.ones((6, 2, 3))
    for name in ("query", "key", "value"):
        assert default_layout((*where, name, "kernel", *variable), kernel) == Matrix(0, (1, 2))
    assert default_layout((*where, "out", "kernel", *variable), kernel) == Matrix((0, 1), 2)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.bfloat16])
def test_inputs_of_another_dtype_than_the_weights(dtype):
    w, x = normal(8, 5), (jnp.arange(24).reshape(3, 8) % 3).astype(dtype)
    for fn in (lambda w, x: x @ w, lambda w, x: jnp.einsum("io,bi->ob", w, x)):
        out, one = population_of(fn, strict=True)(w, KEY, 0, x), member_of(fn)
        for member in range(2):
            expected = one(w, member, x)
            np.testing.assert_allclose(out[member], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_inputs_without_elements():
    model = LinenConv()
    params = model.init(KEY, normal(1, 7, 6, 8))
    apply = population_of(model.apply, strict=True)
    assert apply(params, KEY, 0, normal(0, 7, 6, 8)).shape == (10, 0, 3, 5, 5)
    assert apply(params, KEY, 0, normal(10, 0, 7, 6, 8), per_member=True).shape == (10, 0, 3, 5, 5)


def test_what_is_joined_with_a_multiplied_weight_is_materialised():
    params = {"w": normal(5, 5), "gain": jnp.full((), 1.5)}

    def fn(params, x):
        w = params["w"] * params["gain"]
        layers = jnp.stack([w, w])
        return x @ jnp.concatenate([params["w"], w], 1), jnp.einsum("bi,lij->bj", x, layers)

    with pytest.warns(UserWarning, match="no low-rank rule for this `concatenate` of 'w'"):
        out = population_of(fn)(params, KEY, 0, normal(3, 5))
    expected = member_of(fn)(params, 3, normal(3, 5))
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_allclose(got[3], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_convolution_with_a_multiplied_kernel():
    params = {"kernel": normal(3, 3, 4, 6), "gain": jnp.full((), 1.5)}

    def fn(params, x):
        kernel = params["kernel"] * params["gain"]
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    out = population_of(fn, strict=True)(params, KEY, 0, normal(2, 5, 5, 4))
    expected = member_of(fn)(params, 3, normal(2, 5, 5, 4))
    np.testing.assert_allclose(out[3], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fill_value", [None, 0.0, 2.0])
def test_a_lookup_out_of_bounds_in_a_multiplied_weight(fill_value):
    """Only a number that is filled in makes the product with the weight's own number necessary beforehand."""
    params, ids = {"w": normal(5, 4), "gain": jnp.full((), 1.5)}, jnp.asarray([0, 7, 3])

    def fn(params, ids):
        return jnp.take(params["w"] * params["gain"], ids, axis=0, mode="fill", fill_value=fill_value)

    with pytest.warns(UserWarning, match="no low-rank rule for this `gather`") if fill_value else nullcontext():
        out = population_of(fn, strict=not fill_value)(params, KEY, 0, ids)
    np.testing.assert_allclose(out[3], member_of(fn)(params, 3, ids), atol=1e-5)


@pytest.mark.parametrize(("features", "window", "channels"), [(1, (3, 3), 4), (5, (1, 1), 1), (1, (1, 1), 1)])
def test_convolutions_of_a_row_or_a_column(features, window, channels):
    fn, params, (x,), _ = linen(nn.Conv(features, window), normal(2, 5, 4, channels))
    out = population_of(fn, strict=True)(params, KEY, 0, x)
    expected = member_of(fn)(params, 3, x)
    np.testing.assert_allclose(out[3], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def whole(quick_compilation):
    """A model, its parameters, inputs that members share and of their own, and what all at once make of them."""
    fn, params, (x,), _ = CASES["linen.Dense"]()
    own, apply = normal(10, 3, 17), population_of(fn)
    shared, separate = apply(params, KEY, 1, x), apply(params, KEY, 1, own, per_member=True)
    np.testing.assert_allclose(separate[5], apply(params, KEY, 1, own[5])[5], atol=1e-5)
    return fn, params, x, own, shared, separate


@pytest.mark.parametrize("batch_size", [1, 4, 6, 10, 64])
def test_chunks_change_nothing(batch_size, whole):
    fn, params, x, own, shared, separate = whole
    apply = population_of(fn, batch_size=batch_size)
    np.testing.assert_allclose(apply(params, KEY, 1, x), shared, atol=5e-6)
    np.testing.assert_allclose(apply(params, KEY, 1, own, per_member=True), separate, atol=5e-6)


def test_arguments_shared_and_per_member_together():
    def fn(w, x, scale, extra):
        return {"y": (x @ w) * scale, "z": extra["a"] + w.sum()}

    w, x, scales = normal(5, 4), normal(2, 5), jnp.arange(10.0)
    with pytest.warns(UserWarning, match=r"`reduce_sum` of 'params'"):
        out = population_of(fn)(w, KEY, 0, x, scales, {"a": 1.0}, per_member=(False, True, False))
    for member in (0, 9):
        dense = member_of(lambda w: w)(w, member)
        np.testing.assert_allclose(out["y"][member], (x @ dense) * scales[member], atol=1e-4)
        np.testing.assert_allclose(out["z"][member], 1.0 + dense.sum(), atol=1e-5)


def test_a_fallback_is_named_once_and_is_exact():
    params = {"a": normal(4, 4), "d": normal(4, 4), "c": normal(4, 4)}

    def fn(params, x):
        return x @ params["c"] + jnp.sum(jnp.sin(params["a"]) + jnp.sin(params["d"]))

    with pytest.warns(UserWarning, match="eggroll") as caught:
        out = population_of(fn)(params, KEY, 0, normal(2, 4))
    messages = [str(one.message) for one in caught]
    assert len(messages) == 1, messages
    assert "`sin`" in messages[0]
    assert "'a', 'd'" in messages[0]
    expected = member_of(fn)(params, 3, normal(2, 4))
    np.testing.assert_allclose(out[3], expected, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"`sin` of parameter 'a'"):
        population_apply(fn, CONFIG, strict=True)(params, KEY, 0, normal(2, 4))


@pytest.mark.parametrize("antithetic", [True, False])
def test_independent_and_paired_members(antithetic):
    config = EggrollConfig(population_size=6, antithetic=antithetic, sigma=0.5)
    out = jax.jit(population_apply(lambda w, x: x @ w, config))(jnp.zeros((3, 2)), KEY, 0, jnp.eye(3))
    mirrored = np.allclose(out[0], -out[1])
    assert mirrored is antithetic
    assert len({float(value) for value in np.abs(np.asarray(out))[:, 0, 0]}) == (3 if antithetic else 6)
