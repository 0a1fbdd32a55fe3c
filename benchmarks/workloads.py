"""The workloads of the PyTorch benchmark: models, populations and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn


@dataclass(frozen=True)
class Workload:
    """One model and how its population is called.

    Attributes:
        name: short.
        title: for tables.
        model: makes the model.
        members: of the population.
        rows: makes one member's input, given a leading shape.
        per_member: whether every member gets its own input.
        rank: of the perturbation.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    members: int
    rows: Callable[..., torch.Tensor]
    per_member: bool = False
    rank: int = 1

    def inputs(self, device: torch.device) -> torch.Tensor:
        """The population's input: shared, or with an axis over members."""
        return self.rows(*((self.members,) if self.per_member else ())).to(device)

    def flat_inputs(self, device: torch.device) -> torch.Tensor:
        """As many distinct rows as the population evaluates, for the plain model."""
        x = self.rows(self.members)
        return x.flatten(0, 1).to(device)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SmallConvNet(nn.Module):
    """Two convolutions and two linear layers for 28x28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = mlp(32 * 7 * 7, 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(-3))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    # Encoders of unperturbed models may take PyTorch's fused inference path: the comparison is with that.
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


def normal_rows(*shape: int) -> Callable[..., torch.Tensor]:
    return lambda *lead: torch.randn(*lead, *shape)


W1 = Workload("W1", "MLP 784-256-256-10, shared inputs", lambda: mlp(784, 256, 256, 10), 1024, normal_rows(32, 784))
WORKLOADS = [
    W1,
    Workload("W2", "MLP 784-256-256-10, an input each", W1.model, 1024, normal_rows(32, 784), per_member=True),
    Workload("W3", "MLP 3 x 1024, shared inputs", lambda: mlp(1024, 1024, 1024, 1024), 256, normal_rows(16, 1024)),
    Workload("W4", "CNN on 28 x 28, shared inputs", SmallConvNet, 256, normal_rows(32, 1, 28, 28)),
    Workload("W5", "Transformer 4 x 256, shared inputs", transformer, 64, normal_rows(4, 64, 256)),
    Workload("W6-4", "W1 at rank 4", W1.model, 1024, normal_rows(32, 784), rank=4),
    Workload("W6-16", "W1 at rank 16", W1.model, 1024, normal_rows(32, 784), rank=16),
]
