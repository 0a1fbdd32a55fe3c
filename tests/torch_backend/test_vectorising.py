"""Rules that are called directly give what `torch.library` gives with them, wherever an operation is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from eggroll_torch import ops, vectorising
from eggroll_torch.vectorising import Info, batching_rule, called, vectorised


@torch.library.custom_op("eggroll_tests::scaled", mutates_args=())
def scaled(x: Tensor, factor: float, others: list[Tensor], y: Tensor | None) -> Tensor:
    total = x * factor + others[0]
    return total if y is None else total + y


@scaled.register_fake
def _(x, factor, others, y):
    return torch.empty_like(x)


seen: list[tuple[int, tuple[int | None, ...]]] = []


@batching_rule(scaled)
def _(info, in_dims, x, factor, others, y):
    seen.append((info.batch_size, tuple(dim for place, dim in enumerate(in_dims) if place != 2)))
    x_dim, _, _, y_dim = in_dims
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if y is not None:
        y = y.expand(info.batch_size, *y.shape) if y_dim is None else y.movedim(y_dim, 0)
    return scaled(x, factor, others, y), 0


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


X, Y, ONE = torch.randn(3, 4), torch.randn(4, 3), torch.ones(())

CALLS: dict[str, Callable[[Any], Tensor]] = {
    "alone": lambda call: call(scaled, X, 2.0, [ONE], None),
    "over the first": lambda call: torch.vmap(lambda x: call(scaled, x, 2.0, [ONE], None))(X),
    "over both": lambda call: torch.vmap(lambda x, y: call(scaled, x, 2.0, [ONE], y), (0, 1))(X, Y),
    "over the second": lambda call: torch.vmap(lambda y: call(scaled, X, 2.0, [ONE], y), 1)(Y),
    "over neither": lambda call: torch.vmap(lambda z: call(scaled, X, 2.0, [ONE], None) + z)(torch.arange(2.0)),
    "inside another": lambda call: torch.vmap(
        lambda x: torch.vmap(lambda y: call(scaled, x, 2.0, [ONE], y))(Y.mT),
    )(X),
    "over the outer one": lambda call: torch.vmap(
        lambda x: torch.vmap(lambda z: call(scaled, x, 2.0, [ONE], None) + z)(torch.arange(2.0)),
    )(X),
}


@pytest.mark.parametrize("what", CALLS)
def test_as_torch_library_calls_it(what: str):
    expected, of_library = CALLS[what](lambda operation, *args: operation(*args)), list(seen)
    seen.clear()
    actual = CALLS[what](called)
    assert torch.equal(actual, expected)
    assert seen == of_library


def test_a_rule_is_told_the_size():
    CALLS["over the first"](called)
    assert seen == [(3, (0, None, None))]
    assert Info(3).batch_size == 3


def test_it_is_not_called_through_torch_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(scaled), "__call__", refuse)
    x = torch.randn(3, 2, 4)
    member, scales = torch.arange(3), torch.ones(3)
    A, B = torch.randn(3, 5, 1), torch.randn(3, 4, 1)
    weight = torch.randn(5, 4)
    run = torch.vmap(
        lambda x, member: called(
            ops.perturbed_linear, x, weight, None, [A, B], [], 1, "float32", "threefry", member, scales
        )
    )
    expected = x @ (weight + A @ B.mT).mT
    torch.testing.assert_close(run(x, member), expected)


def test_outside_of_torch_vmap_it_is_its_function_unless_something_watches(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode() as fakes:
        watched = called(scaled, *map(fakes.from_tensor, (X,)), 2.0, [fakes.from_tensor(ONE)], None)
    assert isinstance(watched, FakeTensor)
    monkeypatch.setattr(type(scaled), "__call__", refuse)
    assert torch.equal(called(scaled, X, 2.0, [ONE], None), 2 * X + 1)
    with FakeTensorMode(), pytest.raises(AssertionError, match="called through"):
        called(scaled, X, 2.0, [ONE], None)


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_as_torch_vmap(randomness: str, here: bool, monkeypatch: pytest.MonkeyPatch):
    def function(x: Tensor, row: Tensor) -> list[Tensor]:
        return [x @ row, X, torch.rand(2)]

    torch.manual_seed(0)
    expected = torch.vmap(function, randomness=randomness)(X, X)
    if not here:
        monkeypatch.setattr(vectorising, "maybe_current_level", None)
    torch.manual_seed(0)
    actual = vectorised(function, [X, X], randomness)  # type: ignore[arg-type]
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(ZeroDivisionError):
        vectorised(lambda x: [x / 0, 1 / 0], [X], randomness)  # type: ignore[arg-type]
    assert vectorising.maybe_current_level is None or vectorising.maybe_current_level() is None


def refuse(*args: Any) -> None:
    raise AssertionError("called through torch.library")


def test_under_another_transformation_it_is_the_operation():
    calls = []
    grad = torch.func.grad(lambda x: (calls.append(called(scaled, X, 2.0, [ONE], None)), x.sum())[1])
    grad(torch.ones(2))
    assert torch.equal(calls[0], 2 * X + 1)


def test_without_what_torch_vmap_is_made_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vectorising, "maybe_current_level", None)
    for what, call in CALLS.items():
        assert torch.equal(call(called), call(lambda operation, *args: operation(*args))), what
