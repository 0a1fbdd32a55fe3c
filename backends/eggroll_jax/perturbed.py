"""The perturbed weight: an array that ordinary JAX code consumes without knowing that it is not dense."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax

__all__ = ["COLUMN", "ROW", "STACK", "PerturbedArray", "fall_back", "materialise", "one_warning_for_each_primitive"]

Array = jax.Array

ROW, COLUMN, STACK = "rcs"

_reported: ContextVar[dict[str, list[str]] | None] = ContextVar("eggroll_fallbacks", default=None)


class PerturbedArray(quax.ArrayValue):
    """``W + scale * A @ B.T`` without forming the sum, where ``scale = s * sigma / sqrt(rank)``.

    Every axis of ``W`` is a row axis (``r``), a column axis (``c``) or stacks layers (``s``). The factors have the
    axes of ``W``, of length 1 where they are constant, so that broadcasting says the rest:

        W_i = gain * (base + scale * sum_k A[..., k] * B[..., k])

    Attributes:
        base: ``W``, shape ``shape``, shared by the members.
        A: shape ``(*shape with column axes 1, rank)``, the dtype of `base`.
        B: shape ``(*shape with row axes 1, rank)``, the dtype of `base`.
        scale: shape ``shape`` with row and column axes 1, the dtype of `base`.
        kinds: one letter for each axis. Read from the last axis backwards, so that it stays true when `lax.scan`
            takes the leading, stacked axis away; an axis beyond its length stacks.
        name: the parameter's path, for messages.
        strict: whether materialising without being asked is an error.
        gain: the number that the model multiplied the weight with, which may be the member's own; shape and dtype of
            `scale`, or None.
    """

    base: Array
    A: Array
    B: Array
    scale: Array
    kinds: str = eqx.field(static=True)
    name: str = eqx.field(static=True)
    strict: bool = eqx.field(static=True)
    gain: Array | None = None

    @classmethod
    def from_factors(
        cls,
        base: Array,
        A: Array,
        B: Array,
        scale: Any,
        *,
        rows: Sequence[int],
        columns: Sequence[int],
        name: str = "a parameter",
        strict: bool = False,
    ) -> "PerturbedArray":
        """A perturbed array from factors as matrices.

        Args:
            base: shape `shape`; axes neither in `rows` nor in `columns` stack layers.
            A: shape ``(*stack, product of the lengths of rows, rank)``.
            B: shape ``(*stack, product of the lengths of columns, rank)``.
            scale: a number, or an array of shape ``()``.
            rows, columns: non-negative axes of `base`, in the order in which the factors' rows run through them.
        """
        axes = "".join(ROW if axis in rows else COLUMN if axis in columns else STACK for axis in range(base.ndim))
        stack = [axis for axis, kind in enumerate(axes) if kind == STACK]
        scale = jnp.broadcast_to(
            jnp.asarray(scale, base.dtype), [base.shape[axis] if axis in stack else 1 for axis in range(base.ndim)]
        )
        return cls(
            base=base,
            A=_placed(A.astype(base.dtype), base.shape, stack, list(rows)),
            B=_placed(B.astype(base.dtype), base.shape, stack, list(columns)),
            scale=scale,
            kinds=axes,
            name=name,
            strict=strict,
        )

    @property
    def axes(self) -> str:
        """The kind of each axis of `base`."""
        return axes_of(self.kinds, self.base.ndim)

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.base.shape, self.base.dtype)

    def materialise(self) -> Array:
        """The dense array, shape and dtype of `base`. Explicit: never warns."""
        every = list(range(self.base.ndim))
        rank = self.base.ndim
        a, a_axes = self.factor_a()
        b, b_axes = self.factor_b()
        # A contraction, because broadcasting would hold `rank` matrices.
        product = jnp.einsum(a, [*a_axes, rank], b, [*b_axes, rank], every, preferred_element_type=jnp.float32)
        return self.gained(self.base + (self.scale * product).astype(self.base.dtype))

    def gained(self, values: Array, place: Callable[[Array], Array] = lambda gain: gain) -> Array:
        """`values`, made of all but `gain`, times that, once `place` has brought it to their axes."""
        return values if self.gain is None else values * place(self.gain)

    def factor_a(self) -> tuple[Array, list[int]]:
        """`A` without its axes of length 1, and which axes of `base` are left; the rank axis stays last."""
        return _without(self.A, self.axes, COLUMN)

    def factor_b(self) -> tuple[Array, list[int]]:
        """`B` likewise."""
        return _without(self.B, self.axes, ROW)

    def stacked(self, part: Array) -> tuple[Array, list[int]]:
        """`scale` or `gain` with its stacked axes only, and which axes of `base` they are."""
        stack = [axis for axis, kind in enumerate(self.axes) if kind == STACK]
        return jnp.squeeze(part, [axis for axis in range(self.base.ndim) if axis not in stack]), stack

    @staticmethod
    def default(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """What quax calls for a primitive without a rule: materialise, and say so or refuse."""
        dense = [fall_back(value, str(primitive)) if isinstance(value, PerturbedArray) else value for value in values]
        return primitive.bind(*dense, **params)


def axes_of(kinds: str, ndim: int) -> str:
    """`kinds` for an array of `ndim` axes, read from the last axis backwards."""
    return kinds[max(len(kinds) - ndim, 0) :].rjust(ndim, STACK)


def _without(factor: Array, axes: str, absent: str) -> tuple[Array, list[int]]:
    dropped = [axis for axis, kind in enumerate(axes) if kind == absent]
    return jnp.squeeze(factor, dropped), [axis for axis in range(len(axes)) if axis not in dropped]


def _placed(factor: Array, shape: Sequence[int], stack: list[int], own: list[int]) -> Array:
    """``(*stack, product of own, rank)`` spread to the axes of `shape`, length 1 at the axes of neither."""
    spread = factor.reshape([shape[axis] for axis in (*stack, *own)] + [factor.shape[-1]])
    order = sorted(range(len(stack) + len(own)), key=lambda place: (*stack, *own)[place])
    ordered = jnp.transpose(spread, (*order, len(order)))
    return jnp.expand_dims(ordered, [axis for axis in range(len(shape)) if axis not in (*stack, *own)])


def materialise(tree: Any) -> Any:
    """`tree` with every perturbed array made dense.

    Args:
        tree: any pytree, such as what `perturb` returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eggroll import EggrollConfig
        >>> from eggroll.jax import materialise, perturb
        >>> member = perturb({"w": jnp.zeros((3, 2))}, jax.random.key(0), 0, 1, EggrollConfig(population_size=4))
        >>> materialise(member)["w"].shape
        (3, 2)
    """

    def is_perturbed(leaf: Any) -> bool:
        return isinstance(leaf, PerturbedArray)

    return jax.tree.map(lambda leaf: leaf.materialise() if is_perturbed(leaf) else leaf, tree, is_leaf=is_perturbed)


def fall_back(value: PerturbedArray, primitive: str) -> Array:
    """`value` materialised because `primitive` has no low-rank rule for this use of it.

    A row or a column, such as one that was sliced off, has no more numbers than its factors: nobody need know.

    Raises:
        NotImplementedError: `value` is strict.
    """
    longer = {kind for kind, length in zip(value.axes, value.base.shape, strict=True) if length > 1}
    if not longer >= {ROW, COLUMN}:
        return value.materialise()
    if value.strict:
        raise NotImplementedError(
            f"eggroll has no low-rank rule for this `{primitive}` of parameter {value.name!r}, and `strict=True` "
            "forbids to materialise it; `layout` can make the parameter 'dense' or 'frozen'"
        )
    reported = _reported.get()
    if reported is None:
        _warn(primitive, [value.name])
    else:
        names = reported.setdefault(primitive, [])
        if value.name not in names:
            names.append(value.name)
    return value.materialise()


@contextlib.contextmanager
def one_warning_for_each_primitive() -> Iterator[None]:
    """Collect what falls back inside, and warn once for each primitive at the end."""
    token = _reported.set({})
    try:
        yield
        fallbacks = _reported.get() or {}
    finally:
        _reported.reset(token)
    for primitive, names in fallbacks.items():
        _warn(primitive, names)


def _warn(primitive: str, names: Sequence[str]) -> None:
    listed = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    warnings.warn(
        f"eggroll has no low-rank rule for this `{primitive}` of {listed}: materialised for each member. "
        "`strict=True` makes this an error; `layout` can make a parameter 'dense' or 'frozen'",
        UserWarning,
        stacklevel=2,
    )
