"""Parameters, linear maps and MLPs as class methods ``rand_init`` and ``forward``.

``rand_init(key, ...)`` returns ``(frozen_params, params, scan_map, es_map)``: what is static, the trainable arrays,
and for each array the leading axes that stack layers (a tuple, ``()`` for none) and what it is to a noiser.
``forward(noiser, frozen_noiser_params, noiser_params, frozen_params, params, es_tree_key, iterinfo, *args)`` runs
the part as the member of `iterinfo` sees it.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...keys import key_words, split

__all__ = [
    "EMB_PARAM",
    "EXCLUDED",
    "MLP",
    "MM",
    "MM_PARAM",
    "PARAM",
    "TMM",
    "Embedding",
    "Init",
    "Linear",
    "Parameter",
    "call_submodule",
    "merge_frozen",
    "merge_inits",
    "pqn",
    "relu",
    "silu",
    "simple_es_tree_key",
]

PARAM, MM_PARAM, EMB_PARAM, EXCLUDED = 0, 1, 2, 3


class Init(NamedTuple):
    """What `rand_init` returns."""

    frozen_params: Any
    params: Any
    scan_map: Any
    es_map: Any


def relu(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x)


def silu(x: jax.Array) -> jax.Array:
    return jax.nn.silu(x)


def pqn(x: jax.Array) -> jax.Array:
    """relu of a layer norm without affine parameters, epsilon 1e-5."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return jax.nn.relu(centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5))


_ACTIVATIONS = {"relu": relu, "silu": silu, "pqn": pqn}


class Parameter:
    """A parameter that is no matrix: the forward pass returns it."""

    @classmethod
    def rand_init(cls, key: Any, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = "float32") -> Init:
        """`scale` times standard normal; 0 for zeros."""
        value = scale * jax.random.normal(key, shape, dtype) if scale else jnp.zeros(shape, dtype)
        return Init(None, value, (), PARAM)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
    ) -> Any:
        return noiser.get_noisy_standard(frozen_noiser_params, noiser_params, params, es_tree_key, iterinfo)


class MM:
    """``x @ W.T`` with ``W`` of shape ``(out_dim, in_dim)``."""

    @classmethod
    def rand_init(cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32") -> Init:
        weight = jax.random.normal(key, (out_dim, in_dim), dtype) / math.sqrt(in_dim)
        return Init(None, weight.astype(dtype), (), MM_PARAM)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        return noiser.do_mm(frozen_noiser_params, noiser_params, params, es_tree_key, iterinfo, x)


class TMM:
    """``x @ W`` with ``W`` of shape ``(in_dim, out_dim)``."""

    @classmethod
    def rand_init(cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32") -> Init:
        weight = jax.random.normal(key, (in_dim, out_dim), dtype) / math.sqrt(in_dim)
        return Init(None, weight.astype(dtype), (), MM_PARAM)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        return noiser.do_Tmm(frozen_noiser_params, noiser_params, params, es_tree_key, iterinfo, x)


class Embedding:
    """``W[x]`` with ``W`` of shape ``(in_dim, out_dim)`` and integers ``x``."""

    @classmethod
    def rand_init(cls, key: Any, in_dim: int, out_dim: int, dtype: Any = "float32") -> Init:
        return Init(None, jax.random.normal(key, (in_dim, out_dim), dtype), (), EMB_PARAM)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        return noiser.do_emb(frozen_noiser_params, noiser_params, params, es_tree_key, iterinfo, x)


class Linear:
    """A matrix product and, if wanted, a bias that starts at zero."""

    @classmethod
    def rand_init(cls, key: Any, in_dim: int, out_dim: int, use_bias: bool = True, dtype: Any = "float32") -> Init:
        parts = {"weight": MM.rand_init(key, in_dim, out_dim, dtype)}
        if use_bias:
            parts["bias"] = Parameter.rand_init(key, (out_dim,), 0.0, dtype)
        return merge_inits(**parts)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        common = (noiser, frozen_noiser_params, noiser_params, frozen_params, params, es_tree_key, iterinfo)
        y = call_submodule(MM, "weight", *common, x)
        return y + call_submodule(Parameter, "bias", *common) if "bias" in params else y


class MLP:
    """Linear layers named ``"0"``, ``"1"``, ... with an activation between them."""

    @classmethod
    def rand_init(
        cls,
        key: Any,
        in_dim: int,
        out_dim: int,
        hidden_dims: Any,
        use_bias: bool = True,
        activation: str = "relu",
        dtype: Any = "float32",
    ) -> Init:
        """Split `key` once for each layer; weights ``normal(key_t, (out, in)) / sqrt(in)``, biases zero."""
        if activation not in _ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {activation!r}")
        dims = [in_dim, *hidden_dims, out_dim]
        layers = {}
        for place, (before, after) in enumerate(itertools.pairwise(dims)):
            key, own = jax.random.split(key)
            layers[str(place)] = Linear.rand_init(own, before, after, use_bias, dtype)
        return merge_frozen(merge_inits(**layers), activation=activation)

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        activation = _ACTIVATIONS[frozen_params["activation"]]
        common = (noiser, frozen_noiser_params, noiser_params, frozen_params, params, es_tree_key, iterinfo)
        for place in range(len(params)):
            x = call_submodule(Linear, str(place), *common, x)
            x = activation(x) if place < len(params) - 1 else x
        return x


def merge_inits(**parts: Init) -> Init:
    """The parts of a module as one, by name."""
    return Init(*({name: part[field] for name, part in parts.items()} for field in range(4)))


def merge_frozen(init: Init, **frozen: Any) -> Init:
    """`init` with more static values."""
    return Init({**init[0], **frozen}, *init[1:])


def call_submodule(
    module: Any,
    name: str,
    noiser: Any,
    frozen_noiser_params: Any,
    noiser_params: Any,
    frozen_params: Any,
    params: Any,
    es_tree_key: Any,
    iterinfo: Any,
    *args: Any,
) -> Any:
    """The forward pass of the part called `name`."""
    own = (values[name] for values in (frozen_params, params, es_tree_key))
    return module.forward(noiser, frozen_noiser_params, noiser_params, *own, iterinfo, *args)


def simple_es_tree_key(params: Any, base_key: Any, scan_map: Any) -> Any:
    """A key for each parameter: ``split(base_key, n)`` in the order in which JAX flattens `params`.

    A parameter that stacks layers gets one key for each of them.

    Returns:
        The structure of `params` with keys like `base_key` as leaves, of shape ``(*stack,)`` if typed and
        ``(*stack, 2)`` if not.

    Raises:
        ValueError: `scan_map` has another structure than `params`, or names axes that do not lead.
    """
    leaves, treedef = jax.tree.flatten(params)
    words = split(key_words(base_key), len(leaves))
    typed = jnp.issubdtype(base_key.dtype, jax.dtypes.prng_key)

    def keys_of(leaf: Any, own: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if axes != tuple(range(len(axes))):
            raise ValueError(f"`scan_map` must name leading axes, (), (0,), (0, 1) and so on, got {axes}")
        for axis in axes:
            own = split(own, leaf.shape[axis])
        return jax.random.wrap_key_data(own, impl="threefry2x32") if typed else own

    return jax.tree.map(keys_of, params, jax.tree.unflatten(treedef, list(words)), scan_map)
