"""A member's perturbations as a LoRA adapter in PEFT's layout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_backend.support import make_trainer

from eggroll.torch import VanillaESTrainer

MEMBERS, RANK = 6, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.ModuleDict({"linear": nn.Linear(6, 8)})
        self.convolution = nn.Conv2d(2, 4, (3, 2))
        self.convolution1d = nn.Conv1d(2, 4, 3)


def delta(adapter: dict[str, Tensor], module: str, weight: Tensor) -> Tensor:
    """What PEFT adds to the weight, with scaling 1, from the shapes that PEFT gives its two layers."""
    prefix = f"base_model.model.{module}."
    if f"{prefix}lora_embedding_A" in adapter:
        A, B = adapter[f"{prefix}lora_embedding_A"], adapter[f"{prefix}lora_embedding_B"]
        assert A.shape == (RANK, weight.shape[0])
        assert B.shape == (weight.shape[1], RANK)
        return (B @ A).T
    A, B = adapter[f"{prefix}lora_A.weight"], adapter[f"{prefix}lora_B.weight"]
    if weight.ndim > 2:
        ones = (1,) * (weight.ndim - 2)
        assert A.shape == (RANK, *weight.shape[1:])
        assert B.shape == (weight.shape[0], RANK, *ones)
        return torch.einsum("or,r...->o...", B.flatten(1), A)
    assert A.shape == (RANK, weight.shape[1])
    assert B.shape == (weight.shape[0], RANK)
    return B @ A


@pytest.mark.parametrize("options", [{"noise_reuse": 0}, {"noise_reuse": 2}, {"rng": "philox"}], ids=str)
@pytest.mark.parametrize("index", [0, 3, -1])
def test_adapter_is_the_perturbation(index: int, options: dict[str, Any]) -> None:
    model = Model()
    population = make_trainer(model, population_size=MEMBERS, rank=RANK, sigma=0.2, **options).ask()
    adapter, member = population.lora(index), population.state_dict(index)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in adapter.values())
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert len(adapter) == 2 * len(matrices)
    for name in matrices:
        weight = model.get_parameter(name).detach()
        added = delta(adapter, name.removesuffix(".weight"), weight)
        assert float(added.abs().max()) > 0.01
        torch.testing.assert_close(added, member[name] - weight, atol=1e-6, rtol=0)


def test_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(5, 8))
    population = make_trainer(model, population_size=MEMBERS, rank=RANK).ask()
    adapter = population.lora(2)
    A, B = adapter["base_model.model.0.lora_A.weight"], adapter["base_model.model.0.lora_B.weight"]
    assert (A.shape, B.shape) == ((RANK, 8), (5, RANK))
    # PEFT transposes what it adds to this layer (fan_in_fan_out).
    difference = population.state_dict(2)["0.weight"] - model[0].weight.detach()
    torch.testing.assert_close((B @ A).T, difference, atol=1e-6, rtol=0)


def test_adapter_layers_compute_what_the_member_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False))
    population = make_trainer(model, population_size=MEMBERS, rank=RANK, sigma=0.5).ask()
    adapter = population.lora(1)
    x = torch.randn(2, 2, 6, 6)
    A, B = adapter["base_model.model.0.lora_A.weight"], adapter["base_model.model.0.lora_B.weight"]
    adapted = model(x) + F.conv2d(F.conv2d(x, A, padding=1, stride=2), B)
    torch.testing.assert_close(population(x)[1], adapted.detach(), atol=1e-5, rtol=1e-5)


def test_own_rank_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    noise = {"0.weight": {"rank": 2}, "1.weight": "frozen", "*bias": "frozen", "2.weight": "dense"}
    adapter = make_trainer(model, rank=RANK, noise=noise).ask().lora(0)
    assert {name: tuple(tensor.shape) for name, tensor in adapter.items()} == {
        "base_model.model.0.lora_A.weight": (2, 6),
        "base_model.model.0.lora_B.weight": (5, 2),
    }


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.MultiheadAttention(6, 2), "in_proj_weight"),
        (nn.Sequential(nn.ConvTranspose1d(2, 4, 3)), "0.weight"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "0.weight"),
        (nn.LSTM(3, 4), "weight_hh_l0"),
    ],
)
def test_what_peft_cannot_adapt_is_named(model: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=f"parameter '{name}' has no place in an adapter"):
        make_trainer(model).ask().lora(0)


def test_full_noise_makes_no_adapter() -> None:
    model = nn.Linear(3, 2)
    trainer = VanillaESTrainer(model.parameters(), model=model, population_size=4, seed=0)
    with pytest.raises(TypeError, match="use EGGROLLTrainer"):
        trainer.ask().lora(0)
