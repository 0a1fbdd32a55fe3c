"""Jaxprs of every version of JAX: 0.11 made one class of `ClosedJaxpr`, which holds its constants, and `Jaxpr`."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

__all__ = ["closed", "equations_in", "jaxprs_in"]


def closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    """The same with its constants: one that does not hold any must not need them."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def jaxprs_in(value: Any) -> list[Jaxpr]:
    """The jaxprs in a parameter of an equation, or in a tuple of them, without their constants where they can be."""
    if isinstance(value, tuple):
        return [jaxpr for entry in value for jaxpr in jaxprs_in(entry)]
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, Jaxpr) else []


def equations_in(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in(tuple(equation.params.values())):
            yield from equations_in(inner)
