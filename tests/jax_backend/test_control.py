"""Weights in the carry of loops, and in what a function returns: every member's are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eggroll import EggrollConfig
from eggroll.jax import Matrix, materialise, perturb, population_apply

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:eggroll has no low-rank rule"),
]

CONFIG = EggrollConfig(population_size=6, rank=2, sigma=0.3)
KEY = jax.random.key(3)
X = jnp.linspace(-1, 1, 8).reshape(2, 4)


def normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def loop(body, w, carry=None):
    """Of a number of steps that is not known beforehand."""
    return lax.fori_loop(0, X.astype(jnp.int32)[1, 3] + 2, lambda i, c: body(c), w if carry is None else carry)


def through_both(params, x):
    """The second weight becomes dense only because the first does."""
    step = lambda c: (jnp.tanh(c[0]), c[0], c[2] + x @ c[1])  # noqa: E731
    return loop(step, (params["w"], params["w"], jnp.zeros((2, 4))))[2]


CASES = {
    "scan, a layer in the carry": lambda p, x: lax.scan(lambda c, w: (w, x @ c), jnp.zeros((4, 4)), p["s"]),
    "scan, a weight and then layers": lambda p, x: lax.scan(lambda c, w: (w, x @ c), p["w"], p["s"]),
    "scan, as it went in": lambda p, x: lax.scan(lambda c, w: (c, x @ c + x @ w), p["w"], p["s"])[1],
    "while, tanh": lambda p, x: x @ loop(jnp.tanh, p["w"]),
    "while, scaled": lambda p, x: x @ loop(lambda c: c * 0.9, p["w"]),
    "while, as it went in": lambda p, x: loop(lambda c: (c[0], jnp.tanh(c[1] @ c[0])), (p["w"], x))[1],
    "while, becomes a weight": lambda p, x: x @ loop(lambda c: p["w"], p["w"], jnp.zeros((4, 4))),
    "while, a weight in the condition": lambda p, x: lax.while_loop(
        lambda c: (x @ p["w"]).sum() * c < 3, lambda c: c + (x @ p["w"]).sum(), x.sum() + 1.0
    ),
    "while, one after the other": through_both,
    "a weight": lambda p, x: p["w"],
    "parts of weights": lambda p, x: {"rows": p["w"][::-2, 1::2], "one": p["s"][1, 2], "moved": p["w"].T * 2, "x": x},
    "cast": lambda p, x: (p["w"].astype(jnp.bfloat16).astype(jnp.float32), p["w"] - 1),
}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_members_are_equal(case, batch_size):
    params, layout = {"w": normal(4, 4), "s": normal(3, 4, 4)}, {"w": None, "s": Matrix(1, 2)}
    function = CASES[case]

    def fn(params, x):
        return function(params, x), sum(leaf.sum() for leaf in params.values()) * 0

    out, _ = jax.jit(population_apply(fn, CONFIG, layout=layout, batch_size=batch_size))(params, KEY, 0, X)

    @jax.jit
    def one(member):
        return fn(materialise(perturb(params, KEY, 0, member, CONFIG, layout=layout)), X)[0]

    tolerance = 2**-6 if case == "cast" else 2e-5
    for member in range(CONFIG.population_size):
        for got, expected in zip(jax.tree.leaves(out), jax.tree.leaves(one(member)), strict=True):
            scale = max(1.0, float(jnp.abs(expected).max()))
            np.testing.assert_allclose(got[member], expected, rtol=0, atol=tolerance * scale)


def test_strict_says_which_weight_is_returned():
    apply = population_apply(lambda params: params["w"], CONFIG, strict=True)
    with pytest.raises(NotImplementedError, match="no low-rank rule for this `output` of parameter 'w'"):
        apply({"w": normal(4, 4)}, KEY, 0)
