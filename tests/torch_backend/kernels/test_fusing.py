"""Records whose linear layers do what follows them: which do, and that nothing else changes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch_backend.kernels.test_engine import close, on_the_fly, without_kernels

from eggroll.torch import EGGROLLTrainer
from eggroll_torch import compiling

MEMBERS, IN, OUT = 4, 5, 6


def as_recorded(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler that does nothing, whose name is not "eager": that stands for a record to the bit."""
    return graph.forward


RECORD = {"backend": as_recorded}
VIEWS = {"view", "permute", "transpose", "unsqueeze", "squeeze", "slice", "select", "alias"}


class Layer(nn.Module):
    """A linear layer without a bias, and what a model does with it and an input."""

    def __init__(self, does: Callable[[Any, Tensor], Any], features: int = OUT, train_bias: bool = False):
        super().__init__()
        self.linear = nn.Linear(IN, features, bias=False)
        self.bias = nn.Parameter(torch.randn(features), requires_grad=train_bias)
        self.square = nn.Parameter(torch.randn(features, features), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(features, dtype=torch.float64), requires_grad=False)
        self.does = does

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


class Records(list[GraphModule]):
    """The records that were made."""

    def layers(self) -> list[tuple[bool, str | None]]:
        """Of each linear layer whether it has a bias, and its activation."""
        found = []
        for node in self._operations():
            names = [argument.name for argument in node.target._schema.arguments]
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            if "signs" in given:
                found.append((given["bias"] is not None, given.get("activation")))
        return found

    def others(self) -> set[str]:
        """The operations that are read and are neither linear layers nor views."""
        names = {node.target._schema.name for node in self._operations() if node.users}
        return {name.partition("::")[2] for name in names} - VIEWS - {"linear_of_members", "linear_of_members_drawn"}

    def _operations(self) -> Iterator[Node]:
        return (node for record in self for node in record.graph.nodes if hasattr(node.target, "_schema"))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    made, with_epilogues = Records(), compiling.with_epilogues

    def kept(record: GraphModule) -> GraphModule:
        made.append(with_epilogues(record))
        return made[-1]

    monkeypatch.setattr(compiling, "with_epilogues", kept)
    return made


def inputs(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def run(model: nn.Module, x: Tensor, calls: int, compile: Any = False, **how: Any) -> list[list[Tensor]]:
    """The tensors that the model returns, for each call."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"population_size": MEMBERS, "sigma": 0.2, "seed": 1, "strict": True, "compile": compile}
    population = EGGROLLTrainer(params, model=model, device=x.device, **options).ask()
    results = [population(x, **how) for _ in range(calls)]
    return [[result] if isinstance(result, Tensor) else list(result) for result in results]


def compare(model: nn.Module, x: Tensor, tolerance: float = 1e-5, compile: Any = RECORD, **how: Any) -> None:
    """A record gives what the kernels give without it, and what PyTorch gives without kernels."""
    plain, found = run(model, x, 2, compile, **how)  # as it is, from the record
    with without_kernels():
        (reference,) = run(model, x, 1, **how)
    for expected in (plain, reference):
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
            scale = float(theirs.abs().max())
            assert float((mine.double() - theirs.double()).abs().max()) <= tolerance * scale


FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "ReLU": ("relu", nn.ReLU()),
    "relu": ("relu", torch.relu),
    "ReLU in place": ("relu", nn.ReLU(inplace=True)),
    "relu_": ("relu", lambda x: x.relu_()),
    "GELU": ("gelu", nn.GELU()),
    "gelu": ("gelu", lambda x: F.gelu(x, approximate="none")),
    "GELU by tanh": ("gelu_tanh", nn.GELU(approximate="tanh")),
    "gelu by tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "SiLU": ("silu", nn.SiLU()),
    "silu": ("silu", F.silu),
    "SiLU in place": ("silu", nn.SiLU(inplace=True)),
    "Tanh": ("tanh", nn.Tanh()),
    "tanh": ("tanh", torch.tanh),
    "tanh_": ("tanh", torch.tanh_),
    "along other axes": ("relu", lambda x: x.mT.unsqueeze(0).relu().squeeze(0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_activation(form: str, records: Records, device: torch.device):
    name, function = FORMS[form]
    compare(Layer(lambda model, x: function(model.linear(x))).to(device), inputs(device, 3, IN))
    assert records.layers() == [(False, name)]
    assert records.others() == set()


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["1 axis", "2 axes", "3 axes"])
def test_every_input(lead: tuple[int, ...], per_member: bool, records: Records, device: torch.device):
    x = inputs(device, *((MEMBERS,) if per_member else ()), *lead, IN)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, 2), nn.Tanh()).to(device)
    compare(model, x, per_member=per_member)
    assert records.layers() == [(True, "gelu"), (True, "tanh")]
    assert records.others() == set()


@pytest.mark.parametrize("way", [on_the_fly, contextlib.nullcontext], ids=["on the fly", "stored"])
def test_every_dtype(way: Any, dtype: torch.dtype, records: Records, device: torch.device):
    model = Layer(lambda model, x: F.silu(model.linear(x) + model.bias), train_bias=True).to(device, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    with way():
        compare(model, inputs(device, 3, IN, dtype=dtype), tolerance)
    assert records.layers() == [(True, "silu")]
    assert records.others() == set()


def test_a_run(records: Records, device: torch.device):
    runs = []
    for compile in (False, RECORD):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 1)).to(device)
        trainer = EGGROLLTrainer(
            model.parameters(),
            model=model,
            population_fitness_fn=lambda population: -population(inputs(device, 3, IN)).square().flatten(1).mean(1),
            population_size=MEMBERS,
            seed=1,
            device=device,
            compile=compile,
        )
        trainer.train(4, verbose=False)
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
    assert records.layers() == [(True, "tanh"), (True, None)]
    for mine, theirs in zip(*runs, strict=True):
        close(mine, theirs, torch.float32)


def test_compiled_by_inductor(records: Records, device: torch.device):
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace=True)).to(device)
    compare(model, inputs(device, 3, IN), compile=True)
    assert records.layers() == [(True, "relu")]


def returned_too(model: Any, x: Tensor) -> Any:
    y = model.linear(x)
    return y, torch.relu(y)


def in_place_of_a_part(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    y[..., 0].relu_()
    return y


def in_place_after_it_was_read(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    before = y * 2
    return y.relu_() + before


def in_place_through_a_view(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    y.view(-1).tanh_()
    return y * 2


def written_before(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    y.mul_(3)
    return torch.tanh(y)


APART: dict[str, Callable[[Any, Tensor], Any]] = {
    "used twice": lambda model, x: torch.relu(y := model.linear(x)) + y,
    "returned too": returned_too,
    "a residual connection": lambda model, x: F.gelu(model.linear(x) + x[:, :1]),
    "a cast in between": lambda model, x: torch.tanh(model.linear(x).double()),
    "a cast there and back": lambda model, x: torch.relu(model.linear(x).double().float()),
    "something in between": lambda model, x: F.silu(model.linear(x) * 2),
    "of something else": lambda model, x: model.linear(torch.tanh(x)),
    "of a part": lambda model, x: torch.relu(model.linear(x)[..., :2]),
    "gated": lambda model, x: F.silu((y := model.linear(x))[..., :3]) * y[..., 3:],
    "LeakyReLU": lambda model, x: F.leaky_relu(model.linear(x)),
    "in place of a part": in_place_of_a_part,
    "in place after it was read": in_place_after_it_was_read,
    "in place through a view": in_place_through_a_view,
    "written before": written_before,
}


@pytest.mark.parametrize("what", APART)
def test_what_is_left_apart(what: str, records: Records, device: torch.device):
    compare(Layer(APART[what]).to(device), inputs(device, 3, IN))
    assert records.layers() == [(False, None)]


def test_the_second_of_two_activations_is_left_apart(records: Records, device: torch.device):
    compare(Layer(lambda model, x: torch.tanh(torch.relu(model.linear(x)))).to(device), inputs(device, 3, IN))
    assert records.layers() == [(False, "relu")]
    assert records.others() == {"tanh"}


def in_place_sum(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    y += model.bias
    return F.silu(y)


BIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product and bias": lambda model, x: F.gelu(x @ model.linear.weight.T + model.bias),
    "bias and product": lambda model, x: torch.tanh(model.bias + model.linear(x)),
    "addmm": lambda model, x: torch.relu(torch.addmm(model.bias, x.view(-1, IN), model.linear.weight.mT)),
    "in place": in_place_sum,
    "alone": lambda model, x: model.linear(x) + model.bias,
}


@pytest.mark.parametrize("lead", [(), (3,)], ids=["1 axis", "2 axes"])
@pytest.mark.parametrize("what", BIASES)
def test_a_bias(what: str, lead: tuple[int, ...], records: Records, device: torch.device):
    compare(Layer(BIASES[what], train_bias=True).to(device), inputs(device, *lead, IN))
    ((bias, activation),) = records.layers()
    assert bias
    assert (activation is None) == (what == "alone")
    assert records.others() == set()


def test_a_bias_that_is_frozen(records: Records, device: torch.device):
    compare(Layer(BIASES["product and bias"]).to(device), inputs(device, 3, IN))
    assert records.layers() == [(True, "gelu")]


def written_in_between(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    model.bias[0].mul_(2)
    total = y + model.bias
    model.bias[0].div_(2)
    return total


NO_BIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one for each row": lambda model, x: model.linear(x) + model.square,
    "a column": lambda model, x: model.linear(x) + model.bias[:1],
    "multiplied": lambda model, x: torch.add(model.linear(x), model.bias, alpha=2),
    "computed": lambda model, x: model.linear(x) + model.bias.exp(),
    "wider": lambda model, x: model.linear(x) + model.wide,
    "a number": lambda model, x: model.linear(x) + 1,
    "itself": lambda model, x: (y := model.linear(x)) + y,
    "along other axes": lambda model, x: model.linear(x).mT + model.bias,
    "written in between": written_in_between,
}


@pytest.mark.parametrize("what", NO_BIASES)
def test_what_is_no_bias(what: str, records: Records, device: torch.device):
    """As many members as rows and features: what is added looks like a bias."""
    compare(Layer(NO_BIASES[what], features=MEMBERS).to(device), inputs(device, MEMBERS, IN))
    assert records.layers() == [(False, None)]


def test_a_sum_into_the_bias_itself(records: Records, device: torch.device):
    does = lambda model, x: model.bias.add_(model.linear(x)) * 2  # noqa: E731
    compare(Layer(does, train_bias=True).to(device), inputs(device, IN))
    assert records.layers() == [(False, None)]


def test_a_bias_that_was_written_to(records: Records, device: torch.device):
    """What is added is not what the kernel would draw."""
    does = lambda model, x: (model.bias[0].mul_(2), model.linear(x) + model.bias)[1]  # noqa: E731
    compare(Layer(does, train_bias=True).to(device), inputs(device, IN))
    assert records.layers() == [(False, None)]


def test_a_second_bias_is_left_apart(records: Records, device: torch.device):
    does = lambda model, x: torch.relu(model.linear(x) + model.bias + model.bias)  # noqa: E731
    compare(Layer(does).to(device), inputs(device, 3, IN))
    assert records.layers() == [(True, None)]


def test_a_record_that_is_run_as_it_is(records: Records, device: torch.device):
    """Which is to give the numbers of a pass without a record, to the bit."""
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh()).to(device)
    (plain,), (recorded,) = run(model, inputs(device, 3, IN), 2, {"backend": "eager"})
    assert torch.equal(plain, recorded)
    assert records == []


def test_nothing_changes_without_kernels(records: Records, device: torch.device):
    model = Layer(BIASES["in place"], train_bias=True).to(device)
    with without_kernels():
        (plain,), (recorded,) = run(model, inputs(device, 3, IN), 2, RECORD)
    assert torch.equal(plain, recorded)
    assert "silu" in records.others()
