"""Autocast and parameters of other dtypes: a member computes what the model with its weights does, in its dtypes."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch_backend.support import assert_close, make_trainer, scores

from eggroll.torch import MaterialisedWarning

MEMBERS = 6
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Weights(nn.Module):
    """Products with a matrix that are not `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4) / 3)
        self.stack = nn.Parameter(torch.randn(3, 4, 8) / 3)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        experts = torch.einsum("bi,eoi->beo", x, self.stack)
        return torch.addmm(self.bias, x, self.weight), x @ self.weight, torch.matmul(self.weight.mT, x.mT), experts


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=torch.tensor([2, 5], dtype=torch.int32))


def image(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 4)), *layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "products": Weights,
    "convolutions": lambda: image(nn.Conv1d(2, 4, 2), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3, stride=2)),
    "grouped convolution": lambda: image(nn.Conv1d(2, 4, 2, groups=2), nn.GroupNorm(2, 4)),
    "batch norm, train": lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)),
    "batch norm, eval": lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval(),
    "instance norm": lambda: image(nn.InstanceNorm1d(2, affine=True), nn.Conv1d(2, 4, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
    "gru": lambda: nn.GRU(8, 4, 2),
    "lstm": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(8), nn.LSTM(8, 4)),
    "frozen layers": lambda: nn.Sequential(
        nn.Linear(8, 6), nn.Linear(6, 8).requires_grad_(False), nn.GRU(8, 4).requires_grad_(False)
    ),
    "frozen convolutions": lambda: image(
        nn.Conv1d(2, 4, 2), *(kind(4, 4, 2).requires_grad_(False) for kind in (nn.Conv1d, nn.ConvTranspose1d))
    ),
    "normalised": lambda: parametrizations.weight_norm(nn.Linear(8, 4)),
    "normalised convolution": lambda: image(parametrizations.weight_norm(nn.Conv1d(2, 4, 2))),
    "embedding": lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)),
}


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name](), torch.randint(0, 10, (5,)) if name == "embedding" else torch.randn(5, 8)


def assert_members_equal(population: Any, x: Tensor, tolerance: float | None = None) -> None:
    """Each member's output has dtype and values of the model with that member's weights."""
    outputs = [leaf for leaf in pytree.tree_leaves(population(x)) if isinstance(leaf, Tensor)]
    for i in range(len(population)):
        with population.member(i) as model, torch.no_grad():
            expected = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        for output, wanted in zip(outputs, expected, strict=True):
            assert_close(output[i], wanted, tolerance or TOLERANCES[wanted.dtype])


@pytest.fixture(autouse=True)
def _nothing_is_materialised() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaterialisedWarning)
        yield


@pytest.mark.parametrize(("enabled", "noise"), [(True, None), (True, {"*": "dense"}), (False, None)])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, enabled: bool, noise: Any) -> None:
    model, x = model_and_input(name)
    population = make_trainer(model, population_size=MEMBERS, rank=2, sigma=0.2, noise=noise).ask()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert_members_equal(population, x, 4e-2 if enabled else None)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 5), lambda: nn.Conv1d(2, 3, 3)], ids=["linear", "convolution"])
def test_autocast_leaves_float64_alone(make: Callable[[], nn.Module]) -> None:
    model, x = make().double(), torch.randn(3, 2, 8, dtype=torch.float64)
    population = make_trainer(model, population_size=MEMBERS, rank=2, sigma=0.2).ask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_members_equal(population, x, 1e-6)


def test_autocast_leaves_grouped_products_alone() -> None:
    population = make_trainer(Grouped(), population_size=MEMBERS, rank=2, sigma=0.2).ask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_members_equal(population, torch.randn(5, 8), 1e-5)


def test_members_and_directions_do_not_know_of_autocast() -> None:
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(nn.Linear(8, 5), population_size=MEMBERS, rank=2, sigma=0.2, learning_rate=1.0)
        population = trainer.ask()
        population(torch.randn(3, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            state = population.state_dict(2)
            trainer.tell(scores(MEMBERS))
        found.append([*state.values(), *(parameter.grad for parameter in trainer.model.parameters())])
    for without, with_autocast in zip(*found, strict=True):
        assert torch.equal(without, with_autocast)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_another_dtype(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    model, x = model_and_input(name)
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    trainer = make_trainer(model, population_size=MEMBERS, rank=2, sigma=0.2, noise_reuse=2, chunk_size=chunk_size)
    assert_members_equal(trainer.ask(), x, 2 * TOLERANCES[dtype])
    before = copy.deepcopy(model.state_dict())
    trainer.learning_rate = 1.0
    trainer.tell(scores(MEMBERS))
    for parameter_name, parameter in trainer._trainable.items():
        assert parameter.dtype == parameter.grad.dtype == dtype
        assert not torch.equal(parameter, before[parameter_name])


class MixedDtypes(nn.Module):
    """A trunk in a narrow dtype, norms and head in float32, a matrix in float64."""

    def __init__(self, narrow: torch.dtype):
        super().__init__()
        self.trunk = nn.Linear(8, 16).to(narrow)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)
        self.doubled = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(F.relu(self.trunk(x.to(self.trunk.weight.dtype))).float())
        out = self.head(hidden)
        widened = F.linear(x, self.trunk.weight.float())
        return {"out": out, "double": out.double() @ self.doubled, "widened": widened.to(self.trunk.weight)}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise_dtype", ["float32", "param"])
def test_mixed_dtypes(narrow: torch.dtype, noise_dtype: str) -> None:
    model = MixedDtypes(narrow)
    trainer = make_trainer(model, population_size=MEMBERS, sigma=0.2, noise_dtype=noise_dtype)
    population = trainer.ask()
    x = torch.randn(5, 8)
    assert [tensor.dtype for tensor in population(x).values()] == [torch.float32, torch.float64, narrow]
    assert_members_equal(population, x, 2 * TOLERANCES[narrow])
    trainer.tell(scores(MEMBERS))
    assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
