"""The models of `eggroll.parity.models` as ordinary PyTorch modules."""

import torch.nn.functional as F
from torch import Tensor, nn

from .models import HEADS, Model

__all__ = ["module_of"]


class MLP(nn.Module):
    """Layers named by number."""

    def __init__(self, model: Model):
        super().__init__()
        self.depth = sum(name.endswith("weight") for name in model.shapes)
        self.activation = model.activation
        for layer in range(self.depth):
            out_features, in_features = model.shapes[f"{layer}.weight"]
            bias = f"{layer}.bias" in model.shapes
            self.add_module(str(layer), nn.Linear(in_features, out_features, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(self.depth):
            x = self.get_submodule(str(layer))(x)
            if layer < self.depth - 1:
                x = self.activate(x)
        return x

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.relu(F.layer_norm(x, x.shape[-1:]) if self.activation == "pqn" else x)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


class AttentionBlock(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.silu(self.up(x)))


def module_of(model: Model) -> nn.Module:
    """The module of a model, its parameters not yet those of the comparison."""
    if model.name == "MLP":
        return MLP(model)
    if model.name == "CNN":
        return CNN()
    vocabulary, width = model.shapes["embedding.weight"]
    return AttentionBlock(vocabulary, width, model.shapes["up.bias"][0])
