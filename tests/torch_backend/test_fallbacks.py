"""What has no rule works and says so, once; what cannot work is an error that names it, and changes nothing."""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch_backend.support import assert_close, assert_identical, make_trainer, run_state

from eggroll.torch import (
    EGGROLLTrainer,
    MaterialisedWarning,
    Population,
    UnsupportedOperationError,
    VanillaESTrainer,
)

MEMBERS = 8
X = torch.linspace(-1, 1, 30).view(5, 6)


class Model(nn.Module):
    def __init__(self, forward: Callable[["Model", Tensor], Any]):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.bias = nn.Parameter(torch.randn(4))
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def caught_in(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result, and what `MaterialisedWarning`s said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if issubclass(w.category, MaterialisedWarning)]


def alone(population: Population, index: int, x: Tensor) -> Any:
    with population.member(index) as model, torch.no_grad():
        return model(x)


NO_RULE: dict[str, tuple[Callable[[Model, Tensor], Tensor], str]] = {
    "sum": (lambda m, x: F.linear(x, m.weight, m.bias) + m.weight.sum(), "sum"),
    "exp": (lambda m, x: F.linear(x, torch.exp(m.weight), m.bias), "exp"),
    "cat": (lambda m, x: F.linear(x, torch.cat([m.weight, x]), m.bias.sum()), "cat"),
    "product of weights": (lambda m, x: x @ (m.weight.T @ m.weight) + m.bias.sum(), "matmul"),
    "times a tensor": (lambda m, x: F.linear(x, m.weight * m.weight, m.bias), "mul"),
    "scaled": (lambda m, x: F.linear(x, (-m.weight * m.bias[:, None] / x[0]).exp()), "exp"),
    "another norm": (lambda m, x: F.linear(x, F.normalize(m.weight, p=1), m.bias), "normalize"),
    "column": (lambda m, x: x[:, :4] + m.weight[:, 1] + m.bias, "__getitem__"),
    "mask": (lambda m, x: F.linear(x, m.weight[torch.tensor([True, False, True, True])]) + m.bias[0], "__getitem__"),
    "real part": (lambda m, x: x @ m.weight.real.T + m.bias, "the attribute 'real'"),
    "vmap": (lambda m, x: x[:, :4] + torch.vmap(lambda row, b: row.sum() * b)(m.weight, m.bias), "torch.vmap"),
    "output": (lambda m, x: (m.weight, m.bias), "the model's output"),
}


@pytest.mark.parametrize("name", NO_RULE)
def test_an_operation_without_a_rule_is_said_once_and_right(name: str) -> None:
    forward, operation = NO_RULE[name]
    trainer = make_trainer(Model(forward), population_size=MEMBERS, chunk_size=4, sigma=0.3)
    for generation in range(2):
        population = trainer.ask()
        outputs, said = caught_in(lambda population=population: population(X))
        for i in range(MEMBERS):
            expected = alone(population, i, X)
            if name == "output":
                state = population.state_dict(i)
                expected = (state["weight"], state["bias"])
            for got, wanted in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
                assert type(got) is Tensor
                assert_close(got[i], wanted.detach(), 1e-5)
        wanted_warnings = [
            f"no low-rank rule for {operation} on parameter 'weight': "
            "the weight is materialised for every member of a chunk (said once for this operation)"
        ]
        assert said == (wanted_warnings if generation == 0 else [])
        trainer.tell(torch.randn(MEMBERS))


def test_an_operation_is_said_once_for_all_parameters() -> None:
    model = nn.Sequential(*(Model(lambda m, x: F.linear(x, m.weight.exp(), m.bias) @ m.weight.sin()) for _ in "abc"))
    population = make_trainer(model, population_size=MEMBERS).ask()
    _, said = caught_in(lambda: population(X))
    assert len(said) == 2
    assert all(
        f"{operation} on parameter '0.weight'" in text for operation, text in zip(("exp", "sin"), said, strict=True)
    )


def test_the_shape_of_a_weight_is_no_use_of_it() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        return F.linear(x, m.weight.reshape_as(m.weight), m.bias) + x.flatten()[:24].view_as(m.weight).sum()

    population = make_trainer(Model(forward), population_size=MEMBERS, strict=True).ask()
    outputs = population(X)
    for i in range(MEMBERS):
        assert_close(outputs[i], alone(population, i, X), 1e-5)


def taken_for_a_parameter(m: Model, x: Tensor) -> Tensor:
    parameters = [p for p in m.parameters() if isinstance(p, nn.Parameter) and p.requires_grad]
    return F.linear(x, m.get_parameter("weight"), m.bias) * len(parameters)


LIKE_A_PARAMETER: dict[str, Callable[[Model, Tensor], Any]] = {
    "its type": taken_for_a_parameter,
    "made into another": lambda m, x: F.linear(x, nn.Parameter(m.weight * 2), nn.Parameter(m.bias * 2)),
    "its data": lambda m, x: F.linear(x, m.weight.data, m.bias.data),
    "the data of an activation": lambda m, x: (lambda y: y + (y.round() - y).data)(F.linear(x, m.weight, m.bias)),
}


@pytest.mark.parametrize("trainer", [EGGROLLTrainer, VanillaESTrainer])
@pytest.mark.parametrize("name", LIKE_A_PARAMETER)
def test_a_member_has_parameters(name: str, trainer: type) -> None:
    """Also for code that asks: for all members at once as for one alone."""
    model = Model(LIKE_A_PARAMETER[name])
    options = {"strict": True} if trainer is EGGROLLTrainer else {}
    population = trainer(model.parameters(), model=model, population_size=MEMBERS, seed=0, **options).ask()
    outputs, said = caught_in(lambda: population(X))
    assert not said
    for i in range(MEMBERS):
        assert_close(outputs[i], alone(population, i, X), 1e-5)


@pytest.mark.parametrize("name", NO_RULE)
def test_strict_refuses_an_operation_without_a_rule(name: str) -> None:
    forward, operation = NO_RULE[name]
    trainer = make_trainer(
        Model(forward), population_size=MEMBERS, strict=True, population_fitness_fn=lambda p: p(X).sum((1, 2))
    )
    before = run_state(trainer)
    with pytest.raises(UnsupportedOperationError, match=re.escape(f"{operation} on parameter 'weight'")):
        trainer.step()
    assert_identical(run_state(trainer), before)


def branching(m: Model, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight, m.bias)
    return y if y.sum() > 0 else -3 * y


def scaled_by_item(m: Model, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight, m.bias)
    return y * y.abs().max().item()


def looping(m: Model, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight, m.bias)
    for _ in range(int(y.argmax()) % 4):
        y = torch.sin(y)
    return y


DATA_DEPENDENT: dict[str, Callable[[Model, Tensor], Any]] = {
    "branch": branching,
    "item": scaled_by_item,
    "loop": looping,
    "numpy": lambda m, x: torch.from_numpy(F.linear(x, m.weight, m.bias).detach().numpy() * 2),
    "tolist": lambda m, x: torch.tensor(F.linear(x, m.weight, m.bias).tolist()),
    "boolean index, same count": lambda m, x: (lambda y: y[y == y.max()])(F.linear(x, m.weight, m.bias)),
    "in place": lambda m, x: F.linear(x, m.weight.data.mul_(2), m.bias),
    "captured as a whole": lambda m, x: torch.cond(
        x.sum() > 0, lambda x: F.linear(x, -m.weight), lambda x: x[:, :4] + m.bias, (x,)
    ),
}


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_data_dependent_models_run_one_by_one(name: str, chunk_size: int | None) -> None:
    trainer = make_trainer(Model(DATA_DEPENDENT[name]), population_size=MEMBERS, chunk_size=chunk_size, sigma=0.3)
    for generation in range(2):
        population = trainer.ask()
        outputs, said = caught_in(lambda population=population: population(X))
        assert len(said) == (generation == 0)
        assert all("the model cannot be vectorised over members" in message for message in said)
        assert all("members run one by one" in message for message in said)
        for i in range(MEMBERS):
            assert_close(outputs[i], alone(population, i, X), 1e-6)
        trainer.tell(torch.randn(MEMBERS))


def test_a_method_that_runs_one_by_one_leaves_the_others_alone() -> None:
    model = Model(lambda m, x: F.linear(x, m.weight, m.bias))
    model.branch = functools.partial(branching, model)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    population = make_trainer(model, population_size=MEMBERS).ask()
    caught_in(lambda: population.call("branch", X))
    population(X)
    assert len(runs) == 1


def filled(m: Model, x: Tensor) -> Tensor:
    out = torch.empty(5, 4)
    for row in range(5):
        out[row] = F.linear(x[row], m.weight, m.bias)
    return out


def doubled(m: Model, x: Tensor) -> Tensor:
    x.mul_(2)  # once, however often it is tried
    return torch.zeros(5, 4).add_(F.linear(x, m.weight, m.bias))


FILLED: dict[str, Callable[[Model, Tensor], Any]] = {
    "rows": filled,
    "sums": lambda m, x: torch.zeros(2, 4).index_add_(0, torch.arange(5) % 2, F.linear(x, m.weight, m.bias)),
    "like the input": lambda m, x: x.new_full((5, 4), 1.0).mul_(F.linear(x, m.weight, m.bias)),
    "flags": lambda m, x: torch.zeros(5, 4, dtype=torch.bool).logical_or_(F.linear(x, m.weight, m.bias) > 0),
    "after the input": doubled,
    "a copy of the input": lambda m, x: x.clone()[:, :4].mul_(F.linear(x, m.weight, m.bias)),
    "made of the input": lambda m, x: (x[:, :4] * 2).add_(F.linear(x, m.weight, m.bias)),
    "the input": lambda m, x: x[:, :4].add_(F.linear(x, m.weight, m.bias)) + x.sum(),
}


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 4}, {"randomness": "same"}, {"compile": {"backend": "eager"}}]
)
@pytest.mark.parametrize("name", FILLED)
def test_members_fill_tensors_that_the_model_makes(name: str, options: dict[str, Any]) -> None:
    """All at once, which strict asks for, although `torch.vmap` allows no such writes."""
    trainer = make_trainer(Model(FILLED[name]), population_size=MEMBERS, sigma=0.3, strict=True, **options)
    x = X.clone()
    for _ in range(3):
        population = trainer.ask()
        outputs = population(x)
        assert torch.equal(x, X)
        for i in range(MEMBERS):
            expected = alone(population, i, X.clone())
            assert outputs[i].dtype == expected.dtype
            assert_close(outputs[i].float(), expected.float(), 1e-5)
        trainer.tell(torch.randn(MEMBERS))


def test_that_members_run_one_by_one_is_said_once_in_a_run_of_full_rank() -> None:
    model = Model(looping)
    trainer = VanillaESTrainer(
        model.parameters(), model, population_size=MEMBERS, population_fitness_fn=lambda p: p(X).sum((1, 2))
    )
    _, said = caught_in(lambda: trainer.train(2, verbose=False))
    assert len(said) == 1


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_strict_refuses_what_cannot_be_vectorised(name: str) -> None:
    trainer = make_trainer(
        Model(DATA_DEPENDENT[name]),
        population_size=MEMBERS,
        strict=True,
        population_fitness_fn=lambda p: p(X).flatten(1).sum(1),
    )
    before = run_state(trainer)
    with pytest.raises(UnsupportedOperationError, match="strict=True forbids the way around: members run one by one"):
        trainer.step()
    assert_identical(run_state(trainer), before)


def raising(m: Model, x: Tensor) -> Tensor:
    raise KeyError("no such thing")


ERRORS: dict[str, tuple[Callable[[Model, Tensor], Any], type[Exception], str]] = {
    "shapes": (lambda m, x: F.linear(x[:, :5], m.weight), RuntimeError, "shape"),
    "dtypes": (lambda m, x: F.linear(x.double(), m.weight), RuntimeError, "dtype"),
    "index": (lambda m, x: F.linear(x, m.weight[9]), IndexError, "out of (range|bounds)"),
    "indices": (lambda m, x: F.linear(x, m.weight[:3, :, :2]), IndexError, "too many indices"),
    "narrow": (lambda m, x: F.linear(x, m.weight.narrow(0, 3, 4)), RuntimeError, "exceeds dimension size"),
    "split": (lambda m, x: F.linear(x, m.weight.split([1, 2])[0]), RuntimeError, "split"),
    "axis": (lambda m, x: x @ m.weight.transpose(0, 2), IndexError, "Dimension out of range|`dim`"),
    "view": (lambda m, x: F.linear(x, m.weight.view(5, 6)), RuntimeError, "invalid for input of size"),
    "argument": (lambda m, x: F.linear(x, m.weight, bias=m.bias, scale=2), TypeError, "scale"),
    "own": (raising, KeyError, "no such thing"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_a_genuine_error_is_raised_as_itself(name: str, strict: bool) -> None:
    forward, error, message = ERRORS[name]
    trainer = make_trainer(
        Model(forward), population_size=MEMBERS, strict=strict, population_fitness_fn=lambda p: p(X).sum((1, 2))
    )
    before = run_state(trainer)
    with warnings.catch_warnings():
        # Nothing is said of a way round that does not lead anywhere.
        warnings.simplefilter("error", MaterialisedWarning)
        with pytest.raises(error, match=message) as raised:
            trainer.step()
    assert type(raised.value) is error
    assert_identical(run_state(trainer), before)


def test_running_out_of_memory_is_not_tried_again_one_by_one() -> None:
    calls = []

    def forward(m: Model, x: Tensor) -> Tensor:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(Model(forward)).ask()(X)
    assert len(calls) == 1


def growing(m: Model, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight, m.bias)
    return y[y > 0]


REFUSED_OUTPUTS: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    "number": (lambda m, x: F.linear(x, m.weight, m.bias).sum().item(), "return a tensor instead"),
    "number in a tuple": (lambda m, x: (x, {"loss": float(F.linear(x, m.weight, m.bias).sum())}), "return a tensor"),
    "shapes": (growing, "members return tensors of different shapes"),
    "structure": (
        lambda m, x: [m.bias] * (1 + int(F.linear(x, m.weight, m.bias).argmax())),
        "tensors among .* return a tensor instead",
    ),
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", REFUSED_OUTPUTS)
def test_outputs_that_cannot_be_stacked_are_refused(name: str, chunk_size: int | None) -> None:
    forward, message = REFUSED_OUTPUTS[name]
    population = make_trainer(Model(forward), population_size=MEMBERS, chunk_size=chunk_size, sigma=0.5).ask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterialisedWarning)
        with pytest.raises(UnsupportedOperationError, match=message):
            population(X)


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.layer = kind(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]


@pytest.mark.parametrize("noise", [None, {"*": "dense"}, {"layer.weight*": "frozen"}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_refused(kind: type[nn.RNNBase], noise: Any) -> None:
    population = make_trainer(Packed(kind), noise=noise).ask()
    named = ".*'layer.weight_ih_l0'" if noise is None else ""
    with pytest.raises(UnsupportedOperationError, match=f"packed sequences have no rule{named}.*: pad them instead"):
        population(torch.randn(2, 3, 6))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused(kind: Any) -> None:
    model = nn.Sequential(kind(9, 4, max_norm=1.0))
    before = model[0].weight.detach().clone()
    with pytest.raises(UnsupportedOperationError, match=r"parameter '0.weight': an embedding with `max_norm`.*1\.0"):
        make_trainer(model).ask()(torch.randint(0, 9, (3, 2)))
    assert torch.equal(model[0].weight, before)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.spare = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        assert self.spare.weight.shape[0] == self.spare.weight.size(1)  # asks about it, does not use it
        return self.used(x)


def unused_trainer(way: str, **options: Any) -> EGGROLLTrainer:
    fitness: dict[str, Any] = {
        "population": {"population_fitness_fn": lambda population: population(X).sum((1, 2))},
        "one by one": {"fitness_fn": lambda model: float(model(X).sum())},
        "parts": {
            "population_fitness_fn": lambda population: torch.cat([p(X).sum((1, 2)) for p in population.chunks(4)])
        },
    }[way]
    optimizer = lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0.5)  # noqa: E731
    return make_trainer(Unused(), population_size=MEMBERS, optimizer=optimizer, **fitness, **options)


UNUSED = ["gain", "spare.bias", "spare.weight"]


@pytest.mark.parametrize("way", ["population", "one by one", "parts"])
def test_a_parameter_that_took_no_part_is_an_error_that_names_it(way: str) -> None:
    trainer = unused_trainer(way)
    before = run_state(trainer)
    with pytest.raises(ValueError, match=re.escape(", ".join(map(repr, UNUSED)) + " did not")):
        trainer.step()
    assert_identical(run_state(trainer), before)


@pytest.mark.parametrize("way", ["population", "one by one", "parts"])
def test_unused_ignore_leaves_exactly_those_alone(way: str) -> None:
    trainer = unused_trainer(way, unused="ignore")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train(2, verbose=False)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in UNUSED), name


def test_a_parameter_that_is_used_later_is_trained_from_then_on() -> None:
    model = Unused()
    trainer = make_trainer(model, unused="ignore", population_size=MEMBERS)
    trainer.ask()(X)
    trainer.tell(torch.randn(MEMBERS))
    before = model.spare.weight.detach().clone()
    model.forward = lambda x: model.spare(model.used(x)) * model.gain  # type: ignore[method-assign]
    trainer.ask()(X)
    trainer.tell(torch.randn(MEMBERS))
    assert not torch.equal(model.spare.weight, before)


class TwoHeads(nn.Module):
    """Uses one of its heads: that of its `choice` or, without, one that the input decides."""

    def __init__(self, choice: str | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        return self.get_submodule(self.choice or ("left" if h[0, 0] > 0 else "right"))(h)


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["as it is", "compiled"])
def test_a_parameter_that_was_used_before_stays_where_it_is_not_used(compile: Any) -> None:
    model = TwoHeads("left")
    trainer = make_trainer(
        model,
        population_size=MEMBERS,
        population_fitness_fn=lambda population: population(X).sum((1, 2)),
        unused="ignore",
        compile=compile,
    )
    for head, other in [("left", "right")] * 3 + [("right", "left")] * 3 + [("left", "right")]:
        model.choice, before = head, copy.deepcopy(model)
        trainer.step()
        for name in ("trunk", head):
            assert not torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(other).weight, before.get_submodule(other).weight)


def test_a_parameter_that_some_members_use_is_trained() -> None:
    model = TwoHeads()
    before = copy.deepcopy(model)
    make_trainer(model, population_size=32, sigma=1.0, fitness_fn=lambda model: float(model(X).sum())).step()
    assert not torch.equal(model.left.weight, before.left.weight)
    assert not torch.equal(model.right.weight, before.right.weight)


def test_a_score_that_is_computed_elsewhere_says_nothing_about_the_parameters() -> None:
    model = Unused()
    before = model.spare.weight.detach().clone()
    make_trainer(model, population_size=MEMBERS, fitness_fn=lambda model: float(torch.rand(()))).step()
    assert not torch.equal(model.spare.weight, before)


@torch.jit.script
def scripted_gelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x * weight.sum())


UNSEEN: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "script, vector": lambda m, x: scripted_gelu(x @ m.weight.T, m.bias),
    "script, matrix": lambda m, x: scripted_gelu(x @ m.weight.T, m.weight) + m.bias,
    "torch.tensor": lambda m, x: x @ m.weight.T + torch.tensor(m.bias),
    "torch.tensor of a matrix": lambda m, x: x @ torch.tensor(m.weight).T + m.bias,
    "new_tensor": lambda m, x: x @ m.weight.T + x.new_tensor(m.bias),
    "vmap": lambda m, x: torch.vmap(lambda row: row * 2)(m.weight)[:, 0] + m.bias + x[:, :4],
    "grad": lambda m, x: torch.func.grad(lambda w: (w**2).sum())(m.weight)[:, 0] + m.bias + x[:, :4],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("noise", ["low_rank", "dense"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_does_not_ask_a_weight_gets_its_values(name: str, noise: str) -> None:
    trainer = make_trainer(Model(UNSEEN[name]), population_size=MEMBERS, noise={"weight": noise}, sigma=0.3)
    population = trainer.ask()
    outputs = population(X)
    for i in range(MEMBERS):
        assert_close(outputs[i], alone(population, i, X), 1e-6, of=outputs)
    trainer.tell(torch.randn(MEMBERS))  # both parameters count as used


def test_questions_by_keyword() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        assert torch.numel(input=m.weight) == 24
        assert torch.is_floating_point(input=m.bias)
        return F.linear(x, m.weight, m.bias)

    make_trainer(Model(forward), population_size=MEMBERS, strict=True).ask()(X)
