"""Perturbed arrays through `lax.scan`, `lax.while_loop`, `lax.cond` and `jax.checkpoint`; quax brings `jit`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import quax
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.core.primitives import cond_p, scan_p, while_p
from jaxtyping import ArrayLike

from .jaxprs import closed
from .perturbed import STACK, PerturbedArray, fall_back

__all__: list[str] = []

# Not every version of JAX exports it.
_REMAT = jax.make_jaxpr(jax.checkpoint(lambda x: x))(0.0).eqns[0].primitive


@quax.register(scan_p, precedence=1)
def _(
    *args: PerturbedArray | ArrayLike,
    jaxpr: ClosedJaxpr,
    length: int,
    reverse: bool,
    unroll: int | bool,
    **params: Any,
) -> Any:
    """A loop over stacked layers takes the leading axis of every factor; one over the rows of a matrix cannot."""
    consts, carry, xs = _inputs_of_scan(args, params)
    layers = tuple(
        fall_back(x, "scan over a matrix axis") if isinstance(x, PerturbedArray) and x.axes[0] != STACK else x
        for x in xs
    )
    interpret = quax.quaxify(jaxpr_as_fun(jaxpr))

    def body(carry: Any, layer: Any) -> Any:
        out = interpret(*consts, *carry, *layer)
        return tuple(out[: len(carry)]), tuple(out[len(carry) :])

    one_layer = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], layers)) if length else None
    settled = _settled("scan carry", lambda *args: body(*args)[0], carry, one_layer) if length else carry

    def settled_body(carry: Any, layer: Any) -> Any:
        new, ys = body(carry, layer)
        return _dense_like("scan carry", carry, new), ys

    last, ys = lax.scan(settled_body, settled, layers, length=length, reverse=reverse, unroll=unroll)
    return [*last, *ys]


def _settled(what: str, body: Callable[..., Any], carry: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
    """A loop's carry as it can be bound: a weight that comes back as it went in stays lazy, any other is dense.

    Args:
        what: the carry, in words.
        body: from the carry and `rest`, of which the shapes are enough, to the next carry.
    """
    while True:
        after = jax.eval_shape(lambda carry, *rest: _dense_like(what, carry, body(carry, *rest)), carry, *rest)
        settled = tuple(
            fall_back(old, what) if isinstance(old, PerturbedArray) and not _same_structure(old, new) else old
            for old, new in zip(carry, after, strict=True)
        )
        if all(now is before for now, before in zip(settled, carry, strict=True)):
            return settled
        carry = settled  # what is dense now may make another so


def _dense_like(what: str, carry: Iterable[Any], new: Iterable[Any]) -> tuple[Any, ...]:
    """What a step of a loop makes of its carry, dense where that is."""
    return tuple(
        fall_back(x, what) if isinstance(x, PerturbedArray) and not isinstance(old, PerturbedArray) else x
        for old, x in zip(carry, new, strict=True)
    )


@quax.register(while_p, precedence=1)
def _(
    *args: PerturbedArray | ArrayLike,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> Any:
    of_cond, of_body = args[:cond_nconsts], args[cond_nconsts : cond_nconsts + body_nconsts]
    go_on, step = (quax.quaxify(jaxpr_as_fun(jaxpr)) for jaxpr in (cond_jaxpr, body_jaxpr))

    def body(carry: Any) -> Any:
        return step(*of_body, *carry)

    carry = _settled("while carry", body, args[cond_nconsts + body_nconsts :])
    return list(
        lax.while_loop(
            lambda carry: go_on(*of_cond, *carry)[0],
            lambda carry: _dense_like("while carry", carry, body(carry)),
            carry,
        )
    )


def _inputs_of_scan(args: tuple[Any, ...], params: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Constants, what is carried, and what is scanned over. From JAX 0.11 on counts are in `ft_in`."""
    if "ft_in" in params:
        return tuple(tuple(part) for part in params["ft_in"].update(args).unpack())
    first = params["num_consts"]
    last = first + params["num_carry"]
    return args[:first], args[first:last], args[last:]


def _same_structure(old: Any, new: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(old), jax.tree.structure(new)]
    return bool(structures[0] == structures[1])


@quax.register(_REMAT)
def _(*args: PerturbedArray | ArrayLike, jaxpr: Any, prevent_cse: Any, policy: Any, **params: Any) -> Any:
    interpret = quax.quaxify(jaxpr_as_fun(closed(jaxpr)))
    return jax.checkpoint(interpret, prevent_cse=prevent_cse, policy=policy)(*args)


@quax.register(cond_p, precedence=1)
def _(index: ArrayLike, *args: PerturbedArray | ArrayLike, branches: Any, **params: Any) -> Any:
    """Members may differ in which branch they take, so all are computed, which is what `jax.vmap` makes of it too.

    It would also copy the operands, the weights among them, for every member; hence this rule.
    """
    if not any(isinstance(arg, PerturbedArray) for arg in args):
        return cond_p.bind(index, *args, branches=branches, **params)
    outs = [quax.quaxify(jaxpr_as_fun(branch))(*args) for branch in branches]
    dense = [[fall_back(x, "cond") if isinstance(x, PerturbedArray) else x for x in out] for out in outs]
    return [lax.select_n(index, *cases) for cases in zip(*dense, strict=True)]
