"""Records without views that view nothing new: the numbers to the bit, the memory that is written to, fewer steps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eggroll_torch.simplifying import simplify


def recorded(function: Callable[..., list[Tensor]], *inputs: Tensor) -> GraphModule:
    fakes = FakeTensorMode()
    with fakes:
        return make_fx(function)(*map(fakes.from_tensor, inputs))


def steps(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def whole_slices(x, y):
    return [x[0:100].view(-1, 6).view(4, 6)[0:] * y.permute(0, 1)]


def views_of_views(x, y):
    return [x.view(2, 12).unsqueeze(0).view(3, 8).expand(1, 3, 8) + y.view(3, 8)]


def axes_of_length_one(x, y):
    return [x.view(4, 1, 6).transpose(0, 1).unsqueeze(-1).squeeze(0).view(24).tanh(), y.detach()]


def parts(x, y):
    return [x[1:3].reshape(-1)[2:].view(2, 5) @ y.view(-1)[3:8].view(5, 1), x[1:].view(18)]


def transposed(x, y):
    return [x.mT.mT @ y.mT, x.view(6, 4).mT.contiguous().view(24), y.view(6, 4).transpose(0, 1)]


def repeated(x, y):
    return [x.view(4, 1, 6).expand(4, 3, 6).sum(1), y.unsqueeze(0).expand(2, 4, 6).reshape(8, 6)]


def written_through(x, y):
    out = x.new_zeros(24)
    out.view(4, 6).view(24).view(2, 12).add_(x.view(2, 12))
    out[0:24].view(4, 6)[1:2].mul_(3)
    y.view(24).view(4, 6).add_(1)
    return [out.view(3, 8), y * 2]


FUNCTIONS = (whole_slices, views_of_views, axes_of_length_one, parts, transposed, repeated, written_through)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_results_and_written_inputs_are_the_same_to_the_bit(function):
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    graph = recorded(function, x, y)
    before = len(steps(graph))
    simplify(graph)
    assert len(steps(graph)) <= before
    of_function, of_graph = [x.clone(), y.clone()], [x.clone(), y.clone()]
    expected, actual = function(*of_function), graph(*of_graph)
    for result, wanted in zip([*actual, *of_graph], [*expected, *of_function], strict=True):
        assert result.shape == wanted.shape
        assert torch.equal(result, wanted)


def test_what_does_nothing_is_gone():
    graph = recorded(whole_slices, torch.randn(4, 6), torch.randn(4, 6))
    simplify(graph)
    assert steps(graph) == ["aten.mul.Tensor"]
    graph = recorded(views_of_views, torch.randn(4, 6), torch.randn(4, 6))
    simplify(graph)
    assert steps(graph) == ["aten.view.default", "aten.view.default", "aten.add.Tensor"]


def test_transposed_twice():
    graph = recorded(transposed, torch.randn(4, 6), torch.randn(4, 6))
    simplify(graph)
    assert steps(graph)[:2] == ["aten.transpose.int", "aten.mm.default"]


def test_what_selects_stays():
    graph = recorded(parts, torch.randn(4, 6), torch.randn(4, 6))
    simplify(graph)
    assert sum("slice" in step for step in steps(graph)) == 4


@pytest.mark.parametrize("sizes", [(0, 6), (1, 1), (1, 6)])
def test_empty_and_single_axes(sizes):
    def function(x):
        return [x.mT.view(sizes[1], -1).unsqueeze(0).squeeze(0) * 2, x.view(-1).view(x.shape).permute(0, 1)]

    x = torch.randn(sizes)
    graph = recorded(function, x)
    simplify(graph)
    for result, wanted in zip(graph(x), function(x), strict=True):
        assert torch.equal(result, wanted)
