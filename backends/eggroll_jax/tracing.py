"""The user's function as a jaxpr: traced once, as ordinary JAX, before anything is perturbed.

The function thus never sees a perturbed array, what it does with each parameter is known before anything runs, and
quax interprets the jaxpr with perturbed arrays in the place of the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import quax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.extend.core.primitives import custom_vjp_call_p
from jax.interpreters import partial_eval

from .jaxprs import closed, equations_in
from .ragged import has_rules, ragged_dot_general

__all__ = ["Traced", "trace"]


class Traced(NamedTuple):
    """A function of parameters and arguments with everything flattened."""

    call: Callable[..., list[Any]]
    """From the parameters, perturbed or not, and the leaves of the arguments to the leaves of the output."""
    out_tree: Any
    used: tuple[bool, ...]
    """Of each parameter, whether the output depends on it."""
    jaxpr: ClosedJaxpr
    """The function itself, of the parameters and the leaves of the arguments."""
    stacked: tuple[bool, ...]
    """Of each leaf of the arguments, whether members have their own."""


def trace(fn: Callable[..., Any], arrays: Sequence[Any], args: Sequence[Any], stacked: Sequence[bool]) -> Traced:
    """Trace ``fn(arrays, *args)``.

    Args:
        arrays: the parameters, arrays or `jax.ShapeDtypeStruct`.
        args: pytrees of the same, those of one member.
        stacked: of each of `args`, whether members have their own.

    Raises:
        NotImplementedError: the function divides its work over devices with `jax.shard_map`.
    """
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(list(arrays), *args)
    if any(equation.primitive.name == "shard_map" for equation in equations_in(jaxpr.jaxpr)):
        raise NotImplementedError(
            "a population cannot run `jax.shard_map` inside the function of one member: divide the members over "
            "devices with `mesh=`, or a member's arrays with `jax.lax.with_sharding_constraint`"
        )
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    interpret = quax.quaxify(jaxpr_as_fun(vectorisable(jaxpr)))
    leaves = tuple(own for arg, own in zip(args, stacked, strict=True) for _ in jax.tree.leaves(arg))
    return Traced(interpret, jax.tree.structure(out), tuple(used[: len(arrays)]), jaxpr, leaves)


def vectorisable(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """`jaxpr` without what quax does not interpret or `jax.vmap` not vectorise.

    The forward function takes the place of a `jax.custom_vjp`, a product with rules that of `jax.lax.ragged_dot`.
    """
    if not _holds_what_is_replaced(jaxpr.jaxpr):
        return jaxpr
    return jax.make_jaxpr(lambda *args: _evaluate(jaxpr.jaxpr, jaxpr.consts, args))(*jaxpr.in_avals)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        if equation.primitive is custom_vjp_call_p:
            body = equation.params["call_jaxpr"]
            results = _evaluate(body.jaxpr, body.consts, operands)
        elif has_rules(equation):
            results = [ragged_dot_general(*operands, **equation.params)]
        else:
            params = {name: _rewritten(value) for name, value in equation.params.items()}
            bound = equation.primitive.get_bind_params(params)
            # Older versions of JAX return the functions of a call apart from its parameters.
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            results = equation.primitive.bind(*functions, *operands, **params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _rewritten(value: Any) -> Any:
    """A parameter of an equation with the jaxprs in it rewritten."""
    if isinstance(value, ClosedJaxpr):
        return vectorisable(value)
    if isinstance(value, Jaxpr) and not value.constvars:
        return vectorisable(closed(value)).jaxpr
    if type(value) is tuple:  # no dimension numbers, which are tuples with names
        return tuple(map(_rewritten, value))
    return value


def _holds_what_is_replaced(jaxpr: Jaxpr) -> bool:
    return any(equation.primitive is custom_vjp_call_p or has_rules(equation) for equation in equations_in(jaxpr))
