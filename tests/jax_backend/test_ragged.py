"""`jax.lax.ragged_dot` in a population: every member's rows meet that member's matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eggroll import EggrollConfig
from eggroll.jax import Matrix, materialise, perturb, population_apply

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EggrollConfig(population_size=10, rank=2, sigma=0.3)
KEY = jax.random.key(7)
SIZES = jnp.asarray([2, 0, 4])


def normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize(
    ("noise", "dtype"),
    [(Matrix(1, 2), jnp.float32), (Matrix(1, 2), jnp.bfloat16), ("dense", jnp.float32), ("frozen", jnp.float32)],
)
def test_rows_of_no_group_and_groups_without_rows(noise, per_member, dtype):
    """Groups, inputs and experts that are a member's own or shared, in every combination."""
    sizes, shared = jnp.asarray([2, 0, 4]), normal(8, 5).astype(dtype)
    params = {"w": normal(3, 5, 4).astype(dtype), "b": normal(4).astype(dtype)}

    def fn(params, x, sizes):
        return lax.ragged_dot(x, params["w"], sizes), x.sum() + params["b"]

    given = (shared, jnp.stack([jnp.roll(sizes, member) for member in range(10)]))
    given = (jnp.stack([shared + member for member in range(10)]), given[1]) if per_member else given
    layout = {"w": noise, "b": None}
    apply = jax.jit(population_apply(fn, CONFIG, layout=layout, strict=True), static_argnames="per_member")
    out, _ = apply(params, KEY, 0, *given, per_member=(per_member, True))

    @jax.jit
    def one(member, x, sizes):
        return fn(materialise(perturb(params, KEY, 0, member, CONFIG, layout=layout)), x, sizes)[0]

    for member in range(10):
        x = given[0][member] if per_member else shared
        expected = np.asarray(one(member, x, given[1][member]), np.float32)
        assert not expected[6:].any()
        atol = (2e-5 if dtype == jnp.float32 else 2**-4) * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(out[member], np.float32), expected, rtol=0, atol=atol)


def check(fn, params, layout, *args, per_member=False, strict=True):
    apply = jax.jit(population_apply(fn, CONFIG, layout=layout, strict=strict), static_argnames="per_member")
    out = apply(params, KEY, 0, *args, per_member=per_member)
    each = (per_member,) * len(args) if isinstance(per_member, bool) else per_member

    @jax.jit
    def one(member, *args):
        return fn(materialise(perturb(params, KEY, 0, member, CONFIG, layout=layout)), *args)

    for member in range(CONFIG.population_size):
        given = (arg[member] if own else arg for arg, own in zip(args, each, strict=True))
        expected = np.asarray(one(member, *given))
        np.testing.assert_allclose(out[member], expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max()))


def both(x):
    return jnp.stack([x, 2 * x])


INSIDE = {
    "vmap": lambda w, x: jax.vmap(lax.ragged_dot)(both(x), both(w), jnp.stack([SIZES, SIZES[::-1]])),
    "grad": lambda w, x: jax.grad(lambda x: (lax.ragged_dot(x, w, SIZES) ** 2).sum())(x),
    "jvp": lambda w, x: jax.jvp(lambda x: jnp.tanh(lax.ragged_dot(x, w, SIZES)), (x,), (x + 1,))[1],
}


@pytest.mark.parametrize("noise", [Matrix(1, 2), "dense", "frozen"])
@pytest.mark.parametrize("case", INSIDE)
@pytest.mark.filterwarnings("ignore:eggroll has no low-rank rule")
def test_what_the_model_itself_makes_of_it(case, noise):
    """The bias makes the rows of each member its own."""
    params = {"w": normal(3, 5, 4), "b": normal(5)}
    layout = {"w": noise, "b": None}
    strict = not (case == "vmap" and isinstance(noise, Matrix))
    check(lambda params, x: INSIDE[case](params["w"], x + params["b"]), params, layout, normal(8, 5), strict=strict)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.parametrize("noise", [Matrix(1, 2), "frozen"])
def test_groups_of_all_members_are_larger_than_a_narrow_type(noise, dtype):
    params = {"w": normal(2, 3, 4), "b": normal(3)}
    x, sizes = normal(10, 120, 3), jnp.tile(jnp.asarray([50, 70], dtype), (10, 1))

    def fn(params, x, sizes):
        return lax.ragged_dot(x + params["b"], params["w"], sizes)

    check(fn, params, {"w": noise, "b": None}, x, sizes, per_member=True)


def test_further_operations_of_its_name_are_not_taken_for_it():
    """Axis 1 is one of a batch here, nothing is summed over."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((), ()), ((1,), (1,))), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def fn(params, x):
        return lax.ragged_dot_general(x, params["w"], SIZES, numbers)

    apply = population_apply(fn, CONFIG, layout={"w": Matrix(1, 2)}, strict=True)
    with pytest.raises(NotImplementedError, match="ragged_dot_general"):
        apply({"w": jnp.ones((3, 5, 4))}, KEY, 0, normal(8, 5))
