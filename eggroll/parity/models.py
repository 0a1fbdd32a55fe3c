"""The models that are compared: names and shapes of their parameters, and their forward passes on NumPy and JAX.

Each is written once against a namespace of operations, `Ops`; PyTorch runs ordinary modules with the same parameter
names (`eggroll.parity.torch_models`).
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ATTENTION", "CNN", "NUMPY_OPS", "Model", "Ops", "activate", "initial", "mlp"]

Array = Any
Parameters = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]

HEADS = 2


@dataclass(frozen=True)
class Ops:
    """What the forward passes need: an array namespace, and a convolution.

    Attributes:
        xp: `numpy` or `jax.numpy`.
        conv2d: ``(x, weight) -> y`` of ``(batch, channels, height, width)`` and ``(out, in, 3, 3)``, stride 2,
            padding 1.
    """

    xp: Any
    conv2d: Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Model:
    """A model by name.

    Attributes:
        name: what the table calls it.
        shapes: of its parameters, by dotted name.
        forward: ``(ops, parameters, x) -> y``.
        input_shape: of a batch.
        vocabulary: the number of tokens where inputs are tokens, else None.
        activation: between the layers of an MLP.
    """

    name: str
    shapes: Shapes
    forward: Callable[[Ops, Parameters, Array], Array]
    input_shape: tuple[int, ...]
    vocabulary: int | None = None
    activation: str = "relu"

    def inputs(self, rng: np.random.Generator) -> np.ndarray:
        """A random batch: float32, or int64 tokens."""
        if self.vocabulary is not None:
            return rng.integers(self.vocabulary, size=self.input_shape)
        return rng.standard_normal(self.input_shape, dtype=np.float32)


def initial(shapes: Shapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random parameters, float32: matrices scaled by their fan-in, the affine scale of a norm around one."""
    found = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        found[name] = values + np.float32(1) if name == "norm.weight" else values
    return found


def mlp(widths: tuple[int, ...], activation: str = "relu", bias: bool = True, batch: int = 5) -> Model:
    """An MLP of the given widths, with parameters ``<layer>.weight`` (out, in) and ``<layer>.bias``.

    Args:
        activation: ``"relu"``, ``"silu"``, or ``"pqn"``: relu of a LayerNorm without affine parameters.
    """
    layers = len(widths) - 1
    shapes: Shapes = {}
    for layer, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        if bias:
            shapes[f"{layer}.bias"] = (width_out,)
        shapes[f"{layer}.weight"] = (width_out, width_in)

    def forward(ops: Ops, p: Parameters, x: Array) -> Array:
        for layer in range(layers):
            x = x @ p[f"{layer}.weight"].T
            if bias:
                x = x + p[f"{layer}.bias"]
            if layer < layers - 1:
                x = activate(ops.xp, activation, x)
        return x

    return Model("MLP", shapes, forward, (batch, widths[0]), activation=activation)


def _cnn(ops: Ops, p: Parameters, x: Array) -> Array:
    for layer in ("first", "second"):
        x = ops.conv2d(x, p[f"{layer}.weight"]) + p[f"{layer}.bias"][:, None, None]
        x = activate(ops.xp, "relu", x)
    return x.reshape(x.shape[0], -1) @ p["head.weight"].T + p["head.bias"]


def _attention(ops: Ops, p: Parameters, tokens: Array) -> Array:
    """Embedding, pre-norm self-attention and an MLP, each with its residual."""
    xp = ops.xp
    x = xp.take(p["embedding.weight"], tokens, axis=0)  # (batch, length, width)
    h = _layer_norm(xp, x) * p["norm.weight"] + p["norm.bias"]
    qkv = h @ p["attention.in_proj_weight"].T + p["attention.in_proj_bias"]
    batch, length, width = x.shape
    heads = xp.permute_dims(qkv.reshape(batch, length, 3, HEADS, width // HEADS), (2, 0, 3, 1, 4))
    q, k, v = heads[0], heads[1], heads[2]  # each (batch, heads, length, width per head)
    scores = q @ xp.matrix_transpose(k) / np.sqrt(width // HEADS).astype(np.float32)
    scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = xp.permute_dims((scores / scores.sum(axis=-1, keepdims=True)) @ v, (0, 2, 1, 3))
    mixed = mixed.reshape(batch, length, width)
    x = x + mixed @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"]
    up = activate(xp, "silu", x @ p["up.weight"].T + p["up.bias"])
    return x + up @ p["down.weight"].T + p["down.bias"]


CNN = Model(
    "CNN",
    {
        "first.weight": (6, 2, 3, 3),
        "first.bias": (6,),
        "second.weight": (4, 6, 3, 3),
        "second.bias": (4,),
        "head.weight": (3, 16),
        "head.bias": (3,),
    },
    _cnn,
    (3, 2, 8, 8),
)

ATTENTION = Model(
    "attention block",
    {
        "embedding.weight": (11, 8),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "attention.in_proj_weight": (24, 8),
        "attention.in_proj_bias": (24,),
        "attention.out_proj.weight": (8, 8),
        "attention.out_proj.bias": (8,),
        "up.weight": (12, 8),
        "up.bias": (12,),
        "down.weight": (8, 12),
        "down.bias": (8,),
    },
    _attention,
    (2, 5),
    vocabulary=11,
)


def activate(xp: Any, name: str, x: Array) -> Array:
    """`x` through ``"relu"``, ``"silu"`` or ``"pqn"``, see `mlp`."""
    if name == "silu":
        return x / (1 + xp.exp(-x))
    return xp.maximum(_layer_norm(xp, x) if name == "pqn" else x, 0)


def _layer_norm(xp: Any, x: Array) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / xp.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5)


def _conv2d(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    return np.einsum("bihwkl,oikl->bohw", windows, weight)


NUMPY_OPS = Ops(np, _conv2d)
