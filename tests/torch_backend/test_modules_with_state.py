"""Normalisation and buffers: members see their own batch's statistics, and nothing they write reaches the model."""

import collections
import copy
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_backend.support import assert_close, assert_identical, make_trainer

from eggroll.torch import MaterialisedWarning

MEMBERS = 8


class Counting(nn.Module):
    """Counts its calls in a buffer and uses the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class Remembering(nn.Module):
    """Writes what differs between members to a buffer, in place or by assignment."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("last", torch.zeros(4))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.last
        if self.in_place:
            self.last.copy_(y.mean(0))
        else:
            self.last = y.mean(0)
        return y + self.last


class Cached(nn.Module):
    """Attends to what it has put into a static cache, one token after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("keys", torch.zeros(10, 4))
        self.register_buffer("positions", torch.arange(10))  # not written to: it is not made anew for every member

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for place in range(len(x)):
            self.keys[place : place + 1] = self.linear(x[place : place + 1])
            seen = (self.positions <= place)[:, None]
            rows.append((self.keys * seen).sum(0))
        return torch.stack(rows)


class Spiking(nn.Module):
    """Neurons whose potential is a buffer that decays, is added to and is reset in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("potential", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        spikes = 0
        for row in x:
            self.potential.mul_(0.9).add_(self.linear(row))
            fires = self.potential > 0.3
            self.potential.masked_fill_(fires, 0.0)
            spikes = spikes + fires
        return spikes + self.potential


def with_norm(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 4), norm(), nn.Linear(4, 3))


def over_channels(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), norm(), nn.Flatten(), nn.Linear(8, 3))


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": with_norm(lambda: nn.BatchNorm1d(4)),
    "batch norm without weights": with_norm(lambda: nn.BatchNorm1d(4, affine=False)),
    "batch norm, cumulative": with_norm(lambda: nn.BatchNorm1d(4, momentum=None)),
    "batch norm without running statistics": with_norm(lambda: nn.BatchNorm1d(4, track_running_stats=False)),
    "batch norm of channels": over_channels(lambda: nn.BatchNorm1d(4)),
    "instance norm": over_channels(lambda: nn.InstanceNorm1d(4)),
    "instance norm, running": over_channels(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "group norm": over_channels(lambda: nn.GroupNorm(2, 4)),
    "counting": Counting,
    "remembering by assignment": lambda: Remembering(False),
    "remembering": lambda: Remembering(True),
    "cache": Cached,
    "spikes": Spiking,
}


def model_of(make: Callable[[], nn.Module], train: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)
        return model.train(train)


def members_alone(model: nn.Module, population: Any, x: Tensor, per_member: bool) -> list[Tensor]:
    """The output of a copy of the model for each member, all starting from the model's buffers."""
    outputs = []
    for i in range(MEMBERS):
        alone = copy.deepcopy(model)
        alone.load_state_dict(population.state_dict(i))
        with torch.no_grad():
            outputs.append(alone(x[i] if per_member else x))
    return outputs


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STATEFUL)
def test_members_have_statistics_of_their_own_and_buffers_stay(
    name: str, train: bool, chunk_size: int | None, per_member: bool
) -> None:
    model = model_of(STATEFUL[name], train)
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    x = torch.randn(*((MEMBERS,) if per_member else ()), 10, 6, generator=torch.Generator().manual_seed(1))
    population = make_trainer(model, population_size=MEMBERS, sigma=0.3, chunk_size=chunk_size).ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaterialisedWarning)
        outputs = population(x, per_member=per_member)
    for output, expected in zip(outputs, members_alone(model, population, x, per_member), strict=True):
        assert_close(output, expected, 1e-5)
    assert_identical(dict(model.state_dict()), dict(before))
    for buffer_name, buffer in model.named_buffers():
        assert buffer is buffers[buffer_name]


@pytest.mark.parametrize("options", [{"strict": True}, {"strict": True, "compile": {"backend": "eager"}}])
@pytest.mark.parametrize("name", ["remembering", "cache", "spikes"])
def test_members_write_to_buffers_of_their_own_all_at_once(name: str, options: dict[str, Any]) -> None:
    model = model_of(STATEFUL[name], True)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, population_size=MEMBERS, chunk_size=4, **options)
    x = torch.randn(10, 6)
    for _ in range(3):
        population = trainer.ask()
        for output, expected in zip(population(x), members_alone(model, population, x, False), strict=True):
            assert_close(output, expected, 1e-6)
    assert_identical(dict(model.state_dict()), dict(before))
    assert next(iter(trainer._policy.ways.values())).own_buffers == WRITTEN[name]


WRITTEN = {
    "remembering": frozenset({"last"}),
    "cache": frozenset({"keys"}),
    "spikes": frozenset({"potential"}),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_fitness_fn_leaves_the_buffers_alone_too(name: str) -> None:
    model = model_of(STATEFUL[name], True)
    before = copy.deepcopy(dict(model.named_buffers()))
    x = torch.randn(10, 6)
    trainer = make_trainer(model, population_size=MEMBERS, fitness_fn=lambda member: float(member(x).sum()))
    trainer.step()
    assert_identical(dict(model.named_buffers()), before)


class InPlace(nn.Module):
    """Changes its input, its weights or a part of them in place."""

    def __init__(self, change: Callable[["InPlace", Tensor], None]):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(self, x)
        return self.linear(x) * self.scale


def assign_data(model: InPlace, x: Tensor) -> None:
    model.linear.weight.data = model.linear.weight.data * 0.5


CHANGES: dict[str, tuple[Callable[[InPlace, Tensor], Any], bool]] = {
    # the change, and whether members can do it at once
    "input": (lambda m, x: x.mul_(2), True),
    "input by weights": (lambda m, x: x.add_(m.scale.sum()), True),
    "matrix": (lambda m, x: m.linear.weight.mul_(0.5), False),
    "rows": (lambda m, x: m.linear.weight.__setitem__(0, 0.0), False),
    "clamped data": (lambda m, x: m.linear.weight.data.clamp_(-0.1, 0.1), False),
    "assigned data": (assign_data, False),
    "vector": (lambda m, x: m.scale.mul_(3), True),
    "renormalised": (lambda m, x: m.linear.weight.div_(m.linear.weight.norm()), False),
}


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", CHANGES)
def test_what_members_change_in_place_is_their_own(name: str, chunk_size: int | None) -> None:
    change, at_once = CHANGES[name]
    model = model_of(lambda: InPlace(change), True)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    given = x.clone()
    population = make_trainer(model, population_size=MEMBERS, chunk_size=chunk_size).ask()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = population(given)
    assert any("one by one" in str(w.message) for w in caught) == (not at_once)
    assert torch.equal(given, x)
    assert_identical(dict(model.state_dict()), dict(before))
    for i, output in enumerate(outputs):
        alone = copy.deepcopy(model)
        alone.load_state_dict(population.state_dict(i))
        with torch.no_grad():
            assert_close(output, alone(x.clone()), 1e-5)


class TwoNames(nn.Module):
    """Modules under two names: a trained one, a frozen one, and one with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(6, 6)
        self.frozen = self.frozen_again = nn.Linear(6, 6).requires_grad_(False)
        self.norm = self.norm_again = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_again(self.norm(self.again(torch.tanh(self.first(x)))))
        return self.frozen_again(self.frozen(x))


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_a_module_under_two_names_is_left_as_it_was(compile: Any) -> None:
    model = TwoNames()
    trainer = make_trainer(
        model, params=[p for p in model.parameters() if p.requires_grad], population_size=MEMBERS, compile=compile
    )
    held = [*model.parameters(), *model.buffers()]
    for _ in range(4):
        outputs = trainer.ask()(torch.ones(5, 6).cumsum(0))
        with trainer.ask().member(3) as member, torch.no_grad():
            assert_close(outputs[3], member(torch.ones(5, 6).cumsum(0)), 1e-4, of=outputs)
        trainer.tell(torch.randn(MEMBERS))
    for now, before in zip([*model.parameters(), *model.buffers()], held, strict=True):
        assert now is before


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_hold_no_weights_of_members(kind: type[nn.RNNBase]) -> None:
    model = kind(6, 4)
    model(torch.ones(5, 6))
    trainer = make_trainer(model, population_size=MEMBERS)
    trainer.ask()(torch.ones(5, 6))
    for held, parameter in zip(model._flat_weights, model.parameters(), strict=True):
        assert held is parameter
    trainer.tell(torch.randn(MEMBERS))
    with torch.no_grad():
        assert_identical(model(torch.ones(5, 6)), copy.deepcopy(model)(torch.ones(5, 6)))


class Noting(nn.Module):
    """Keeps what it computes in attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.state = torch.zeros(6)
        self.log: list[Any] = ["start"]
        self.found: dict[str, Any] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.state = torch.tanh(self.linear(x).mean(0) + self.state)
        self.log.append(self.state)
        self.found["weight"] = self.linear.weight
        self.pair = (self.calls, self.state * 2)
        self.constant = torch.ones(3)
        return x + self.state


@pytest.mark.parametrize("chunk_size", [None, 2, 4])
def test_what_members_leave_in_attributes_is_of_no_use_and_gone(chunk_size: int | None) -> None:
    model, x = Noting(), torch.randn(5, 6)
    population = make_trainer(model, population_size=MEMBERS, chunk_size=chunk_size, sigma=0.3).ask()
    outputs = population(x)
    assert torch.equal(model.state, torch.zeros(6))
    assert model.log == ["start"]
    assert model.found == {}
    assert not hasattr(model, "pair")
    # What is no member's stays, as it would without a population.
    assert torch.equal(model.constant, torch.ones(3))
    assert model.calls == MEMBERS // (chunk_size or MEMBERS)
    copy.deepcopy(model)
    for i in range(MEMBERS):
        with population.member(i) as member, torch.no_grad():
            model.state = torch.zeros(6)
            assert_close(outputs[i], member(x), 1e-6)


class Elsewhere(nn.Module):
    """Uses a parameter that it holds in a list, and in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))
        self.gain = nn.Parameter(torch.ones(6))
        self.held = [self.table, self.gain]
        self.project = functools.partial(torch.nn.functional.linear, weight=self.table)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.project(x * self.held[1]), self.held[0] @ x.mT.mean(1, keepdim=True).expand(6, 4)])


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["as it is", "compiled"])
def test_parameters_that_no_module_holds_by_name_where_they_are_used(compile: Any) -> None:
    population = make_trainer(Elsewhere(), population_size=MEMBERS, sigma=0.3, compile=compile, strict=True).ask()
    x = torch.randn(5, 6)
    for _ in range(3):
        outputs = population(x)
    for i in range(MEMBERS):
        with population.member(i) as member, torch.no_grad():
            assert_close(outputs[i], member(x), 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_modules(whole: bool) -> None:
    def score(model: nn.Module) -> float:
        return -float(model(torch.ones(2, 6)).square().mean())

    def trained(scripted: bool) -> Any:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        if scripted and whole:
            model = torch.jit.script(model)
        elif scripted:
            model[1], model[2] = torch.jit.script(model[1]), torch.jit.script(model[2])
        trainer = make_trainer(model, fitness_fn=score, population_size=MEMBERS)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with trainer.ask().member(0):
            assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
        assert_identical(dict(model.state_dict()), before)
        trainer.train(2, verbose=False)
        return dict(model.state_dict())

    assert_identical(trained(True), trained(False))


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.lstm = nn.Embedding(5, 6), nn.Linear(6, 4), nn.LSTM(4, 4, batch_first=True)
        self.norm, self.weight = nn.BatchNorm1d(4), nn.Parameter(torch.randn(4, 2))

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.linear(self.embedding(index)).mT).mT
        x = self.lstm(x + F.scaled_dot_product_attention(x, x, x))[0]
        return F.dropout(x, 0.5) @ self.weight


@pytest.mark.parametrize("training", [True, False])
def test_exported_programs(training: bool) -> None:
    """They call the operations of ATen, which have the same rules and answers; dropout is the member's own."""
    index = torch.arange(12).view(2, 6) % 5
    model = Exported().train(training)
    exported = torch.export.export(model, (index,)).module()
    outputs = [
        make_trainer(of, population_size=MEMBERS, chunk_size=chunk_size, strict=True).ask()(index)
        for of, chunk_size in ((model, None), (exported, None), (exported, 2))
    ]
    for of_exported in outputs[1:]:
        assert_close(of_exported, outputs[0], 1e-5)


class Memory(nn.Module):
    """Keeps what it computes, in `kept` or as it is told."""

    def __init__(self, keep: Callable[[Any, Tensor], Tensor], alone: bool):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.GRUCell(4, 4)
        self.state: Any = None
        self.scaled: Any = None
        self.register_buffer("nothing_yet", None)
        self.kept: dict[str, Any] = {"state": None, "all": []}
        self.in_order: collections.OrderedDict[str, Tensor] = collections.OrderedDict()
        self.queue: collections.deque[Tensor] = collections.deque(maxlen=2)
        self.object = types.SimpleNamespace(state=None)
        self.plain = torch.ones(3, 4)
        self.keep, self.alone = keep, alone

    def forward(self, x: Tensor) -> Tensor:
        result = self.keep(self, x)
        return result if not self.alone or float(result.sum()) < 1e9 else x


def in_an_attribute(m: Any, x: Tensor) -> Tensor:
    m.state = m.cell(x, m.state)
    return m.state


def as_a_weight(m: Any, x: Tensor) -> Tensor:
    m.scaled = m.cell.weight_hh[:4] * 2
    return m.cell(x @ m.scaled)


def in_a_buffer(m: Any, x: Tensor) -> Tensor:
    m.nothing_yet = m.cell(x, m.nothing_yet)
    return m.nothing_yet


def in_a_new_buffer(m: Any, x: Tensor) -> Tensor:
    state = m.cell(x, getattr(m, "new", None))
    m.register_buffer("new", state)
    return state


def in_a_dictionary(m: Any, x: Tensor) -> Tensor:
    m.kept["state"] = m.cell(x, m.kept["state"])
    m.kept["all"].append(m.kept["state"])
    return sum(m.kept["all"])


def in_an_ordered_dictionary(m: Any, x: Tensor) -> Tensor:
    m.in_order["state"] = m.cell(x, m.in_order.get("state"))
    return m.in_order["state"]


def in_a_deque(m: Any, x: Tensor) -> Tensor:
    m.queue.append(m.cell(x))
    return sum(m.queue)


def in_an_object(m: Any, x: Tensor) -> Tensor:
    m.object.state = m.cell(x, m.object.state)
    return m.object.state


def in_place_in_an_attribute(m: Any, x: Tensor) -> Tensor:
    m.plain.add_(m.cell(x, m.plain))
    return m.plain * 1


def in_a_new_object(m: Any, x: Tensor) -> Tensor:
    m.state = types.SimpleNamespace(state=m.cell(x, m.state and m.state.state))
    return m.state.state


@pytest.mark.filterwarnings("ignore:the model cannot be vectorised", "ignore:the model's forward pass cannot be")
@pytest.mark.parametrize(
    ("alone", "options"),
    [(False, {}), (True, {}), (False, {"compile": {"backend": "eager"}})],
    ids=["at once", "one by one", "compiled"],
)
@pytest.mark.parametrize(
    "keep",
    [
        *(in_an_attribute, in_place_in_an_attribute, as_a_weight, in_a_buffer, in_a_new_buffer),
        *(in_a_dictionary, in_an_ordered_dictionary, in_a_deque, in_an_object, in_a_new_object),
    ],
)
def test_no_member_finds_what_another_has_left(
    keep: Callable[[Any, Tensor], Tensor], alone: bool, options: dict[str, Any]
) -> None:
    model, x = Memory(keep, alone), torch.ones(3, 4)
    population = make_trainer(model, population_size=MEMBERS, chunk_size=2, **options).ask()
    first, second = population(x), population(x)
    assert torch.equal(first, second)
    assert model.scaled is None
    for member, output in enumerate(first):
        fresh = copy.deepcopy(model)  # which tensors of a `torch.vmap` would not let happen
        fresh.load_state_dict(population.state_dict(member))
        with torch.no_grad(), population.member(member) as itself:
            expected = fresh(x)
            assert torch.equal(itself(x), expected)
        assert_close(output, expected, 1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.start = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.linear(x) * state + self.start


@pytest.mark.parametrize("name", ["start", "shift"])
def test_a_tensor_of_the_model_as_an_input_has_its_values(name: str) -> None:
    model, x = Recurrent(), torch.ones(3, 4)
    population = make_trainer(model, population_size=MEMBERS).ask()
    expected = population(x, getattr(model, name).detach().clone())
    for _ in range(3):
        assert_identical(population(x, getattr(model, name)), expected)


class WithNotes(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"notes": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_a_state_that_is_no_tensor() -> None:
    population = make_trainer(WithNotes(6, 4), population_size=MEMBERS).ask()
    assert population.state_dict(1)["_extra_state"] == {"notes": 3}


def test_power_iterations_are_the_models_own() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)))
    before = copy.deepcopy(model.state_dict())
    make_trainer(model, population_size=MEMBERS).ask()
    assert_identical(dict(model.state_dict()), dict(before))
