"""Where a linear layer has noise in its bias, too, one kernel draws it and does both; elsewhere a bias is formed."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_backend.kernels.support import random_keys, signs_of
from torch_backend.kernels.test_engine import close, on_the_fly, without_kernels

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import ops

MEMBERS, ROWS, IN, OUT = 6, 3, 4, 5

Does = Callable[[Any, Tensor], Tensor]


class Layer(nn.Module):
    """A linear layer, another parameter that can be a bias, and what a model does with them and an input."""

    def __init__(self, does: Does):
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.one = nn.Parameter(torch.randn(1))
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def of_layer(model: Any, x: Tensor) -> Tensor:
    return model.linear(x)


def outputs(does: Does, dtype: torch.dtype, device: torch.device, per_member: bool = False, **options: Any) -> Tensor:
    torch.manual_seed(0)
    model = Layer(does).to(device, dtype)
    x = torch.randn(*((MEMBERS,) if per_member else ()), ROWS, IN).to(device, dtype)
    options = {"population_size": MEMBERS, "sigma": 0.3, "seed": 1, "strict": True, "antithetic": True} | options
    population = EGGROLLTrainer(model.parameters(), model=model, device=device, **options).ask()
    return population(x, per_member=per_member)


def compare(
    monkeypatch: pytest.MonkeyPatch, does: Does, dtype: torch.dtype, device: torch.device, **options: Any
) -> int:
    """Members are those without kernels; how often a kernel put dense noise into memory."""
    form, formed = ops._dense_of_members, []

    def counted(weight: Tensor, *rest: Any) -> Tensor:
        formed.append(weight)
        return form(weight, *rest)

    monkeypatch.setattr(ops, "_dense_of_members", counted)
    found = outputs(does, dtype, device, **options)
    with without_kernels():
        close(found, outputs(does, dtype, device, **options), dtype)
    return len(formed)


OPTIONS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "independent members": {"antithetic": False},
    "a chunk at a time": {"chunk_size": 4},
    "inputs of their own": {"per_member": True, "rank": 3},
    "philox": {"rng": "philox"},
    "drawn in the dtype of parameters": {"noise_dtype": "param"},
    "members without noise": {"fitness_shaping": "baseline", "group_size": MEMBERS},
    "a sigma of its own": {"noise": {"linear.bias": {"sigma": 0.7}}},
    "a frozen bias": {"noise": {"linear.bias": "frozen"}},
    "noise of matrices alone": {"freeze_nonlora": True},
}


@pytest.mark.parametrize("way", [on_the_fly, contextlib.nullcontext], ids=["on the fly", "stored"])
@pytest.mark.parametrize("what", OPTIONS)
def test_one_kernel_does_both(what: str, way: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    with way():
        assert compare(monkeypatch, of_layer, torch.bfloat16, device, **OPTIONS[what]) == 0


def written_to(model: Any, x: Tensor) -> Tensor:
    model.linear.bias.mul_(2)
    return model.linear(x) - model.linear.bias


def differentiated(model: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: model.linear(x).square().sum())(x).sum() + model.linear(x)


# What a model does with the bias, and how often a kernel adds its noise, or another's, in memory.
USES: dict[str, tuple[Does, int]] = {
    "twice": (lambda model, x: model.linear(x) * model.linear(2 * x), 0),
    "by a vmap of the model": (lambda model, x: torch.vmap(model.linear)(x), 0),
    "one of several, by a vmap of the model": (
        lambda model, x: torch.vmap(lambda b: F.linear(x, model.linear.weight, b))(model.linear.bias.expand(2, -1)),
        1,
    ),
    "as data, by a vmap of the model": (
        lambda model, x: torch.vmap(lambda x: x[:1] + model.linear.bias)(x) * model.linear(x),
        1,
    ),
    "as data, afterwards": (lambda model, x: model.linear(x) * model.linear.bias * model.linear.bias, 1),
    "as data, before": (lambda model, x: model.linear.bias.exp() * model.linear(x), 1),
    "written to": (written_to, 1),
    "a part": (lambda model, x: F.linear(x, model.linear.weight[:2], model.linear.bias[:2]), 1),
    "wider": (lambda model, x: F.linear(x.double(), model.linear.weight.double(), model.linear.bias.double()), 1),
    "added": (lambda model, x: x @ model.linear.weight.mT + model.linear.bias, 1),
    "differentiated": (differentiated, 1),
    "one number for all features": (lambda model, x: F.linear(x, model.linear.weight, model.one), 1),
    "of a weight without noise": (lambda model, x: F.linear(x, torch.ones_like(x), model.linear.bias[:ROWS]), 1),
}


@pytest.mark.parametrize("what", USES)
def test_elsewhere_a_bias_is_formed_once(what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    does, times = USES[what]
    assert compare(monkeypatch, does, torch.float32, device) == times


def test_the_operations_for_one_member(device: torch.device):
    """Called outside of a `vmap` over members."""
    keys, scales = random_keys(3, device=device), 0.3 * signs_of(MEMBERS, 3, device)
    bias, weight, x = (torch.randn(*shape, device=device) for shape in ((OUT,), (OUT, IN), (MEMBERS, ROWS, IN)))
    how = "float32", "threefry"

    def formed(member: Tensor) -> Tensor:
        return ops.perturbed_dense(bias, keys, *how, member, scales)

    def linear(x: Tensor, member: Tensor) -> Tensor:
        return ops.perturbed_linear(x, weight, bias, [keys], [keys.flip(0), scales], 1, *how, member, scales)

    members = torch.arange(MEMBERS, device=device)
    together = torch.vmap(formed)(members), torch.vmap(linear)(x, members)
    for index, member in enumerate(members):
        torch.testing.assert_close(formed(member), together[0][index])
        torch.testing.assert_close(linear(x[index], member), together[1][index])
