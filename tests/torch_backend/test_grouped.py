"""Products of rows in groups, a matrix for each, whose weight has no low-rank noise: frozen, or with dense noise."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_backend.support import assert_close, make_trainer

MEMBERS = 6
ENDS = torch.tensor([2, 2, 4], dtype=torch.int32)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(3, 12, 8) / 3)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        hidden = torch.tanh(torch._grouped_mm(x, self.up, offs=ends))
        return torch._grouped_mm(hidden, self.down, offs=ends)[:4]  # what comes after the last group is anything


def trainer_of(first: str, second: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Experts()
    choices = {name: choice for name, choice in (("up", first), ("down", second)) if choice != "frozen"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in choices)
    return make_trainer(model, population_size=MEMBERS, sigma=0.3, rank=2, noise=choices, strict=True)


@pytest.mark.parametrize("shared_groups", [True, False])
@pytest.mark.parametrize("per_member", [True, False])
@pytest.mark.parametrize(
    ("first", "second"), [("low_rank", "frozen"), ("frozen", "low_rank"), ("dense", "frozen"), ("low_rank", "dense")]
)
def test_members_equal(first: str, second: str, per_member: bool, shared_groups: bool) -> None:
    population = trainer_of(first, second).ask()
    x = torch.randn(*((MEMBERS,) if per_member else ()), 5, 8)
    ends = ENDS.expand(MEMBERS, 3).clone() if per_member else ENDS
    if per_member and not shared_groups:
        ends[::2, 0] = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = population(x, ends, per_member=per_member)
    assert not any("batching rule" in str(w.message) for w in caught)
    for i in range(MEMBERS):
        with population.member(i) as model, torch.no_grad():
            assert_close(outputs[i], model(*((x[i], ends[i]) if per_member else (x, ends))), 1e-5)


class GroupedProducts(TorchDispatchMode):
    """Notes how many rows each grouped product has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.eggroll.grouped_linear.default:
            self.rows.append(args[0].shape[:2].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("second", ["low_rank", "frozen"])
def test_the_rows_of_all_members_are_multiplied_at_once(second: str) -> None:
    population = trainer_of("low_rank", second).ask()
    with GroupedProducts() as products:
        population(torch.randn(MEMBERS, 5, 8), ENDS.expand(MEMBERS, 3).clone(), per_member=True)
    assert products.rows == [MEMBERS * 5] * 2


def test_shared_rows_are_multiplied_once() -> None:
    population = trainer_of("low_rank", "frozen").ask()
    with GroupedProducts() as products:
        population(torch.randn(5, 8), ENDS)
    assert products.rows == [5, MEMBERS * 5]


CALLS = {
    "in place": lambda x, weight, ends: torch._grouped_mm(x, weight, ends),
    "by name": lambda x, weight, ends: torch._grouped_mm(x, mat2=weight, offs=ends),
    "no rows": lambda x, weight, ends: torch._grouped_mm(x[:0], weight, offs=ends * 0),
    "in a vmap": lambda x, weight, ends: torch.vmap(lambda y: torch._grouped_mm(y, weight, offs=ends))(
        torch.stack([x, 2 * x])
    ),
}


@pytest.mark.parametrize("noise", ["low_rank", "dense", "frozen"])
@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_it(call: str, noise: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(12))
            self.weight = nn.Parameter(torch.randn(3, 8, 12), requires_grad=noise != "frozen")

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return CALLS[call](x, self.weight, ends)[..., :4, :] + self.bias

    options = {} if noise == "frozen" else {"noise": {"weight": noise}}
    population = make_trainer(Model(), population_size=MEMBERS, sigma=0.3, **options).ask()
    x = torch.randn(5, 8)
    with warnings.catch_warnings():
        # The rule for low rank has the names of its own.
        warnings.simplefilter("ignore" if call == "by name" else "error")
        outputs = population(x, ENDS)
    for i in range(MEMBERS):
        with population.member(i) as model, torch.no_grad():
            assert_close(outputs[i], model(x, ENDS), 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_groups_without_a_matrix_are_refused() -> None:
    population = trainer_of("low_rank", "low_rank").ask()
    with pytest.raises(RuntimeError, match="batch sizes"):
        make_trainer(Experts(), population_size=MEMBERS).ask()(torch.randn(5, 8), ENDS[1:])
    with pytest.raises(NotImplementedError, match="no low-rank rule for _grouped_mm"):
        population(torch.randn(5, 8), ENDS[1:])
