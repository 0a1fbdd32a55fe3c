"""Which parameters get low-rank noise, dense noise or none, and which of their axes are rows and columns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from eggroll import EggrollConfig
from eggroll.config import as_int

__all__ = ["Dense", "Layout", "Leaf", "Matrix", "Plan", "default_layout", "plan"]


@dataclass(frozen=True)
class Matrix:
    """A parameter perturbed as one matrix, or as a stack of matrices: low-rank noise ``A @ B.T``.

    Attributes:
        rows: the axis, or axes, that rows of ``A`` belong to.
        columns: the axis, or axes, that rows of ``B`` belong to.

    Every axis named in neither stacks layers, each with noise of its own. Several axes are flattened in the order
    given. Noise is drawn as if `rows` were the output features and `columns` the input features of a PyTorch weight
    ``(out, in)``: ``Matrix(rows=-1, columns=-2)`` gives a Flax kernel ``(in, out)`` the transpose of that weight's
    noise.

    Example:
        >>> Matrix(rows=0, columns=(1, 2))          # a query kernel (features, heads, head_dim)
        Matrix(rows=(0,), columns=(1, 2))
    """

    rows: int | tuple[int, ...] = -2
    columns: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            given = getattr(self, name)
            axes = tuple(given) if isinstance(given, tuple | list) else (given,)
            if not axes or not all(isinstance(axis, Integral) and not isinstance(axis, bool) for axis in axes):
                raise TypeError(f"`{name}` must be an axis or a non-empty tuple of axes, got {given!r}")
            object.__setattr__(self, name, tuple(map(int, axes)))


@dataclass(frozen=True)
class Dense:
    """A parameter with dense noise; its first `stack` axes stack layers, each with a key of its own."""

    stack: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack", as_int("stack", self.stack, 0))


Choice = Matrix | Dense | Literal["dense", "frozen"] | None
Layout = Any
"""None; a pytree of choices with the structure of the parameters, or a prefix of it; or a callable
``(path, leaf) -> choice`` with the path as a tuple of strings. A choice is `Matrix(...)`, `Dense(...)`, ``"dense"``,
``"frozen"`` or None for what `default_layout` says."""


def default_layout(path: Sequence[str], leaf: Any) -> Choice:
    """What a parameter is when nothing else is said, by the naming habits of Flax and Equinox.

    - Fewer than two axes, or a name of ``bias``, ``scale`` or ``b``: dense.
    - Two axes: the matrix ``(rows, columns)``, whichever of them is the output.
    - Flax kernels (``kernel``) of three and more axes: the last axis against the others; for the ``query``, ``key``
      and ``value`` projections of attention the first against the others.
    - Equinox weights (``weight``) of three and more axes, ``(out, in, *window)``: the first axis against the others.
    - Anything else, of three and more axes: dense.
    """
    ndim = len(leaf.shape)
    # The array of an nnx variable; elsewhere `value` is a projection of attention.
    words = path[:-1] if path and path[-1] in ("value", "raw_value") else path
    name = words[-1] if words else ""
    if ndim < 2 or name in ("bias", "scale", "b"):
        return "dense"
    if ndim == 2:
        return Matrix(0, 1)
    every = tuple(range(ndim))
    if name == "kernel" and len(words) > 1 and words[-2] in ("query", "key", "value"):
        return Matrix(0, every[1:])
    if name == "kernel":
        return Matrix(every[:-1], every[-1])
    if name == "weight":
        return Matrix(0, every[1:])
    return "dense"


@dataclass(frozen=True)
class Leaf:
    """What is fixed about one parameter before anything is computed."""

    path: str
    index: int
    """Place in the canonical order, which decides the key."""
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["low_rank", "dense", "frozen"]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.stack)

    @property
    def layers(self) -> int:
        """How many layers are stacked, each with a key of its own; 0 for a frozen parameter."""
        return 0 if self.kind == "frozen" else math.prod(self.stack_shape)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Of one layer: ``(rows, columns)`` as a matrix, or the shape of its dense noise."""
        if self.kind == "low_rank":
            return self._length(self.rows), self._length(self.columns)
        return self.shape[len(self.stack) :]

    def numbers(self, rank: int) -> int:
        """How many random numbers a draw of it takes."""
        if self.kind == "low_rank":
            return self.layers * rank * sum(self.layer_shape)
        return 0 if self.kind == "frozen" else math.prod(self.shape)

    def _length(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


class Plan(NamedTuple):
    """The parameters of a model, each with its choice, in the order in which JAX flattens them."""

    leaves: tuple[Leaf, ...]
    parameters: int
    """How many keys the run's key is split into: all parameters, frozen ones included."""
    treedef: Any
    constants: tuple[Any, ...]
    """What the pytree holds besides arrays, such as activation functions, in its place; `HERE` for an array."""

    def arrays(self, params: Any) -> list[Any]:
        """The arrays among the leaves of `params`, as many as `leaves`."""
        return [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]

    def tree(self, arrays: Iterable[Any], constants: bool = True) -> Any:
        """The pytree with `arrays` in their places, and with what else it held or None."""
        rest = iter(arrays)
        filled = [next(rest) if leaf is HERE else leaf if constants else None for leaf in self.constants]
        return jax.tree.unflatten(self.treedef, filled)


HERE = object()


def plan(params: Any, config: EggrollConfig, layout: Layout = None, template: Any = None) -> Plan:
    """Choose for each parameter, and check that it can be done.

    Args:
        params: pytree of arrays, or of anything with `shape` and `dtype`.
        layout: see `Layout`.
        template: the tree whose paths decide the keys, where `params` is a part of it.

    Raises:
        TypeError: a trainable leaf is not floating point, or a choice is not one.
        ValueError: a choice does not fit the shape; no trainable parameter.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    index = canonical_index(params if template is None else template)
    choices = _choices(layout, params)
    leaves: list[Leaf] = []
    constants: list[Any] = []
    for (path, leaf), choice in zip(paths_and_leaves, choices, strict=True):
        constants.append(HERE if is_array(leaf) else leaf)
        if not is_array(leaf):
            continue
        words = words_of(path)
        if words not in index:
            raise ValueError(f"`template` has no parameter {'.'.join(words)!r}")
        if callable(choice) and not isinstance(choice, type):
            choice = choice(words, leaf)
        leaves.append(
            _leaf(words, index[words], leaf, default_layout(words, leaf) if choice is None else choice, config)
        )
    if not any(leaf.layers for leaf in leaves):
        raise ValueError("`params` has no parameter to perturb: it is empty, or all of it is frozen")
    return Plan(tuple(leaves), len(index), treedef, tuple(constants))


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def words_of(path: Sequence[Any]) -> tuple[str, ...]:
    """The components of a pytree path as strings."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def canonical_index(params: Any) -> dict[tuple[str, ...], int]:
    """The place of each parameter when paths are sorted by their components as strings (the core's rule)."""
    paths = [words_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_array(leaf)]
    index = {words: place for place, words in enumerate(sorted(paths))}
    if len(index) != len(paths):
        raise ValueError(f"`params` has two parameters with the same path, among {sorted(paths)}")
    return index


def _choices(layout: Layout, params: Any) -> list[Any]:
    """What `layout` says about each leaf of `params`: a choice, None, or a callable that makes it."""
    choices: list[Any] = []
    try:
        jax.tree.map(
            lambda choice, part: choices.extend([choice] * len(jax.tree.leaves(part))),
            layout,
            params,
            is_leaf=lambda node: node is None,
        )
    except ValueError as error:
        raise ValueError(f"`layout` must have the structure of `params` or be a prefix of it: {error}") from None
    return choices


def _leaf(words: tuple[str, ...], index: int, leaf: Any, choice: Any, config: EggrollConfig) -> Leaf:
    path, shape = ".".join(words) or "params", tuple(leaf.shape)  # one array has no path
    if choice == "frozen":
        return Leaf(path, index, shape, leaf.dtype, "frozen")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"parameter {path!r} must be floating point to be perturbed, got {leaf.dtype}; "
            "leave it out of `params` or make it 'frozen' in `layout`"
        )
    if choice == "dense":
        choice = Dense()
    if isinstance(choice, Dense):
        if choice.stack > len(shape):
            raise ValueError(f"parameter {path!r} of shape {shape} does not have the axes of {choice}")
        kind: Literal["dense", "frozen"] = "frozen" if config.freeze_nonlora else "dense"
        return Leaf(path, index, shape, leaf.dtype, kind, stack=tuple(range(choice.stack)))
    if not isinstance(choice, Matrix):
        raise TypeError(
            f"`layout` must give Matrix(...), Dense(...), 'dense', 'frozen' or None for {path!r}, got {choice!r}"
        )
    rows, columns = _axes(path, shape, choice.rows, choice), _axes(path, shape, choice.columns, choice)
    if len({*rows, *columns}) != len(rows) + len(columns):
        raise ValueError(f"parameter {path!r}: the axes of {choice} must differ")
    stack = tuple(axis for axis in range(len(shape)) if axis not in (*rows, *columns))
    return Leaf(path, index, shape, leaf.dtype, "low_rank", rows, columns, stack)


def _axes(path: str, shape: tuple[int, ...], axes: Any, choice: Matrix) -> tuple[int, ...]:
    if not all(-len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"parameter {path!r} of shape {shape} does not have the axes of {choice}")
    return tuple(axis % len(shape) for axis in axes)
