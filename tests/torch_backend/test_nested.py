"""What goes in and what comes out: tensors at any depth, next to other things, shared or one for each member."""

import collections
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch_backend.support import assert_close, make_trainer, run_one_by_one

from eggroll.torch import UnsupportedOperationError

MEMBERS = 6


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass(frozen=True)
class Inner:
    logits: Tensor
    note: str


@dataclass
class Result:
    inner: Inner
    steps: int
    states: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    value: Tensor


class Cache:
    """An ordinary object that holds tensors, and itself."""

    def __init__(self, tensor: Tensor):
        self.layers = [tensor]
        self.myself = self

    def total(self) -> Tensor:
        return sum(self.layers)


class Model(nn.Module):
    """Takes and returns one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.embedding = nn.Embedding(5, 4)

    def forward(self, batch: dict[str, Any], scale: float, *, pair: Any, cache: Any, flag: bool = False) -> Any:
        x = batch["x"] + self.embedding(batch["nested"][1]["index"]) * scale + pair.second + cache.total()
        y = self.linear(x) if flag else torch.zeros(2, 3)
        return {
            "tensor": y,
            "tuple": (y.sum(), None, "text", 3, [y[0]]),
            "named": Pair(y * 2, {"deep": y.argmax(-1)}),
            "ordered": collections.OrderedDict(a=x, b=scale),
            "result": Result(Inner(y, batch["name"]), 2, [x, y]),
            "slotted": Slotted(x),
            "cache": Cache(y),
            "passed": batch["x"],
        }

    def encode(self, index: Tensor, power: int = 1) -> tuple[Tensor, int]:
        return self.embedding(index) ** power, power


def inputs(members: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lead = () if members is None else (members,)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator)

    index = torch.randint(0, 5, (*lead, 2), generator=generator)
    batch = {"x": draw(2, 4), "nested": ("skip", {"index": index}), "name": "batch"}
    return (batch, 0.5), {"pair": Pair(draw(1), draw(2, 1)), "cache": Cache(draw(4)), "flag": True}


def of_member(tree: Any, index: int) -> Any:
    """The inputs of one member, with a cache, which is not a container, taken by hand."""

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, Cache):
            return Cache(leaf.layers[0][index])
        return leaf[index] if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(taken, tree)


def tensors(outputs: Any) -> list[Tensor]:
    result, cache = outputs["result"], outputs["cache"]
    inside = [result.inner.logits, *result.states, outputs["slotted"].value, *cache.layers]
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)] + inside


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["vectorised", "one by one"])
def test_structures_go_through(chunk_size: int | None, per_member: bool, one_by_one: bool) -> None:
    trainer = make_trainer(Model(), population_size=MEMBERS, noise_reuse=2, chunk_size=chunk_size, sigma=0.3)
    if one_by_one:
        run_one_by_one(trainer)
    population = trainer.ask()
    args, kwargs = inputs(MEMBERS if per_member else None)
    outputs = population(*args, per_member=per_member, **kwargs)
    assert outputs["tuple"][1:4] == (None, "text", 3)
    assert type(outputs["named"]) is Pair
    assert type(outputs["ordered"]) is collections.OrderedDict
    assert outputs["ordered"]["b"] == 0.5
    assert (type(outputs["result"]), type(outputs["result"].inner)) == (Result, Inner)
    assert (outputs["result"].steps, outputs["result"].inner.note) == (2, "batch")
    assert type(outputs["cache"]) is Cache
    assert outputs["named"].second["deep"].dtype == torch.int64
    assert isinstance(kwargs["cache"].layers[0], Tensor)
    for i in range(MEMBERS):
        mine, named = of_member((args, kwargs), i) if per_member else (args, kwargs)
        with population.member(i) as model, torch.no_grad():
            expected = model(*mine, **named)
        for got, wanted in zip(tensors(outputs), tensors(expected), strict=True):
            assert_close(got[i], wanted, 1e-5, of=got)


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
def test_other_methods(per_member: bool) -> None:
    population = make_trainer(Model(), population_size=MEMBERS, chunk_size=4).ask()
    index = torch.randint(0, 5, (*((MEMBERS,) if per_member else ()), 3))
    encoded, power = population.call("encode", index, power=2, per_member=per_member)
    assert power == 2
    for i in range(MEMBERS):
        with population.member(i) as model, torch.no_grad():
            assert_close(encoded[i], model.encode(index[i] if per_member else index, 2)[0], 1e-5)


@pytest.mark.parametrize("method", ["decode", "linear_", "training"])
def test_a_method_that_is_not_there(method: str) -> None:
    with pytest.raises(AttributeError, match=f"`method` must be a method of Model, got '{method}'"):
        make_trainer(Model()).ask().call(method)


WRONG: list[tuple[Any, str]] = [
    (torch.zeros(MEMBERS - 1, 2, 4), r"\(5, 2, 4\)"),
    (torch.zeros(2, MEMBERS, 4), r"\(2, 6, 4\)"),
    (torch.tensor(1.0), r"\(\)"),
    ({"x": torch.zeros(MEMBERS, 4), "y": [torch.zeros(3)]}, r"\(3,\)"),
    (Slotted(torch.zeros(1, MEMBERS)), r"\(1, 6\)"),
]


@pytest.mark.parametrize(("given", "shape"), WRONG)
def test_an_axis_that_is_not_over_the_members_is_refused(given: Any, shape: str) -> None:
    population = make_trainer(nn.Linear(4, 3), population_size=MEMBERS).ask()
    with pytest.raises(
        ValueError, match=f"axis 0 of every input must be over the {MEMBERS} members, got the shape {shape}"
    ):
        population(given, per_member=True)


EMPTY: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (0, 4)),
    "linear, 3-d": (nn.Linear(4, 3), (2, 0, 4)),
    "mlp": (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), (0, 4)),
    "convolution": (nn.Conv2d(2, 4, 3, groups=2), (0, 2, 5, 5)),
    "transposed convolution": (nn.ConvTranspose1d(2, 4, 3), (0, 2, 5)),
    "lstm": (nn.LSTM(4, 3), (2, 0, 4)),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8).eval(), (2, 0, 4)),
}


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_without_rows(name: str, per_member: bool) -> None:
    model, shape = EMPTY[name]
    population = make_trainer(model, population_size=MEMBERS, strict=True).ask()
    outputs = population(torch.zeros(*((MEMBERS,) if per_member else ()), *shape), per_member=per_member)
    with torch.no_grad():
        expected = model(torch.zeros(shape))
    for got, wanted in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
        assert got.shape == (MEMBERS, *wanted.shape)


def test_inputs_that_are_none_or_missing() -> None:
    model = nn.Linear(4, 3)
    model.forward = lambda x=None: model.weight @ torch.ones(4) + model.bias  # type: ignore[method-assign]
    population = make_trainer(model, population_size=MEMBERS).ask()
    for outputs in (population(), population(None), population(x=None, per_member=True)):
        for i in range(MEMBERS):
            state = population.state_dict(i)
            assert_close(outputs[i], state["weight"].sum(1) + state["bias"], 1e-5)


NOT_OF_MEMBERS = {
    "generator": lambda y: (row for row in y),
    "map": lambda y: {"rows": map(torch.sin, y)},
    "Normal": lambda y: torch.distributions.Normal(y, 1.0),
    "Independent": lambda y: [torch.distributions.Independent(torch.distributions.Normal(y, 1.0), 1)],
}


@pytest.mark.parametrize("name", NOT_OF_MEMBERS)
def test_an_output_that_cannot_hold_all_members_is_refused(name: str) -> None:
    """It would be computed from the model's own weights, or have shapes that leave the members out."""
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda module, args, output: NOT_OF_MEMBERS[name](output))
    population = make_trainer(model, population_size=MEMBERS).ask()
    with pytest.raises(UnsupportedOperationError, match=f"the model returns a {name}, .*: return "):
        population(torch.ones(2, 4))
