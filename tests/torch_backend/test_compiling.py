"""Compiled forward passes: what is recorded, when it is recorded anew, and what is not recorded at all.

That every kind of layer gives the same compiled is in `test_layers`.
"""

import copy
import functools
import pickle
import random
import types
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch_backend.support import assert_close, assert_identical, assert_same_run, make_trainer, mlp, run_state

from eggroll.torch import EGGROLLTrainer, MaterialisedWarning, Population, UnsupportedOperationError, VanillaESTrainer
from eggroll_torch import compiling

MEMBERS = 8
RECORD = {"backend": "eager"}


class Model(nn.Module):
    """What a record must not hold on to: buffers, frozen parameters, attributes, what is random."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(4, 2)
        self.factor = 1.0
        self.activation: Callable[[Tensor], Tensor] = torch.tanh
        self.table = torch.ones(2)
        self.register_buffer("shift", torch.zeros(2))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.frozen(self.activation(self.first(x)))))
        return self.last(hidden) * self.factor * self.table + self.shift


def model_of() -> Model:
    torch.manual_seed(1)
    return Model()


def trainer_of(model: nn.Module | None = None, **options: Any) -> EGGROLLTrainer:
    model = model_of() if model is None else model
    options = {"population_size": MEMBERS, "antithetic": True, "strict": True, "compile": RECORD} | options
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make_trainer(model, **{"params": params, **options})


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 3)), generator=torch.Generator().manual_seed(3))


def run(trainer: Any, generations: int = 3, x: Tensor | None = None, **call: Any) -> list[Tensor]:
    """The outputs of some generations that are scored by what the model returns.

    The first runs as it is, the second is recorded, the third runs from the record.
    """
    outputs = []
    for _ in range(generations):
        outputs.append(trainer.ask()(inputs() if x is None else x, **call))
        trainer.tell(outputs[-1].flatten(1).mean(1).float())
    return outputs


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each record."""
    made: list[int] = []
    make_fx = proxy_tensor.make_fx

    def counted(*args: Any, **options: Any) -> Any:
        made.append(len(made))
        return make_fx(*args, **options)

    monkeypatch.setattr(compiling, "make_fx", counted)
    return made


def test_a_run_is_the_same_to_the_bit(records: list[int]):
    plain, compiled = trainer_of(compile=False), trainer_of()
    for trainer in (plain, compiled):
        trainer.model.train()
    assert_identical(run(compiled), run(plain))
    assert_identical(run_state(compiled), run_state(plain))
    assert len(records) == 1


def test_a_schedule_needs_no_new_record(records: list[int]):
    trainers = [trainer_of(compile=False), trainer_of()]
    outputs = []
    for trainer in trainers:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer, 0.9)
        outputs.append([])
        for _ in range(3):
            trainer.sigma *= 0.7
            outputs[-1] += run(trainer, 1)
            scheduler.step()
    assert_identical(*outputs)
    assert len(records) == 1


@pytest.mark.parametrize("per_member", [False, True])
def test_chunks(records: list[int], per_member: bool):
    x = inputs(MEMBERS, 5, 3) if per_member else inputs()
    plain = run(trainer_of(compile=False), x=x, per_member=per_member)
    compiled = run(trainer_of(chunk_size=3), x=x, per_member=per_member)  # rounded up to pairs: 4 and 4
    assert len(records) == 1
    for mine, theirs in zip(compiled, plain, strict=True):
        assert_close(mine, theirs, 1e-5)
    run(trainer_of(chunk_size=6), x=x, per_member=per_member)  # 6 and 2
    assert len(records) == 3


def test_parts_of_a_population(records: list[int]):
    trainer = trainer_of()
    population = trainer.ask()
    for _ in range(2):
        parts = torch.cat([part(inputs()) for part in population.chunks(4)])
        assert_close(parts, trainer_of(compile=False).ask()(inputs()), 1e-6)
    assert len(records) == 1


class Mode(Enum):
    PLUS = 1
    MINUS = -1


class Options:
    """Options as libraries have them, in an object."""

    def __init__(self) -> None:
        self.shift = 0.0
        self.scaling = {"default": 1.0}


class Configured(Model):
    """Does what attributes of all kinds say."""

    def __init__(self) -> None:
        super().__init__()
        self.options = Options()
        self.mode = Mode.PLUS
        self.powers = [1]
        self.where = slice(0, 5)
        self.scalar: Any = np.float32(1)
        self.array = np.ones(2, np.float32)
        self.partial = functools.partial(torch.mul, other=1.0)
        self.hidden = [nn.Dropout(0.9).eval()]  # not registered
        self.both = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).requires_grad_(False)
        self.active = self.both[0]
        self.whole: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)[..., self.where, :] * self.mode.value + self.options.shift
        y = self.partial(y * self.options.scaling["default"]) ** self.powers[0] * float(self.scalar)
        y = self.active(self.hidden[0](y)) * torch.from_numpy(self.array)
        return y * self.whole + (torch.ones(2, dtype=torch.int64) * self.whole).dtype.is_floating_point


CHANGES: dict[str, Callable[[Configured], object]] = {
    "mode": lambda model: model.dropout.train(),
    "number": lambda model: setattr(model, "factor", 3.0),
    "type of a number": lambda model: setattr(model, "whole", 1),
    "function": lambda model: setattr(model, "activation", torch.relu),
    "partial": lambda model: setattr(model, "partial", functools.partial(torch.mul, other=2.0)),
    "method": lambda model: setattr(model.norm, "forward", types.MethodType(lambda self, x: x * 2, model.norm)),
    "module": lambda model: setattr(model, "dropout", nn.Hardtanh(-0.1, 0.1)),
    "another name of a module": lambda model: setattr(model, "active", model.both[1]),
    "module in a list": lambda model: model.hidden[0].train(),
    "hook": lambda model: model.first.register_forward_hook(lambda module, args, output: output * 2),
    "object": lambda model: setattr(model.options, "shift", 2.0),
    "dictionary in an object": lambda model: model.options.scaling.update(default=2.0),
    "enumeration": lambda model: setattr(model, "mode", Mode.MINUS),
    "list": lambda model: model.powers.__setitem__(0, 2),
    "slice": lambda model: setattr(model, "where", slice(1, 5)),
    "number of NumPy": lambda model: setattr(model, "scalar", np.float32(3)),
    "array": lambda model: setattr(model, "array", np.full(2, 3, np.float32)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_modules_are_is_recorded_anew(records: list[int], what: str):
    outputs = []
    for compile in (RECORD, False):
        torch.manual_seed(1)
        trainer = trainer_of(Configured(), compile=compile, unused="ignore")
        before = run(trainer)
        CHANGES[what](trainer.model)
        outputs.append(run(trainer))
        assert not torch.equal(outputs[-1][0], before[0])
    assert_identical(*outputs)
    assert len(records) == 2


VALUES: dict[str, Callable[[Model], object]] = {
    "buffer": lambda model: model.shift.add_(1),
    "another buffer": lambda model: setattr(model, "shift", torch.ones(2)),
    "frozen parameter": lambda model: model.frozen.weight.data.mul_(3),
    "another frozen parameter": lambda model: setattr(model.frozen, "bias", nn.Parameter(torch.ones(4), False)),
    "trained parameter": lambda model: model.first.weight.data.mul_(-1),
    "storage of a trained parameter": lambda model: setattr(model.last.bias, "data", torch.ones(2)),
    "plain tensor": lambda model: setattr(model, "table", torch.full((2,), 5.0)),
    "plain tensor, in place": lambda model: model.table.mul_(2),
    "running statistics": lambda model: model.norm.running_mean.add_(1),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_of_tensors_are_not_recorded(records: list[int], what: str):
    outputs = []
    for compile in (RECORD, False):
        trainer = trainer_of(compile=compile)
        before = run(trainer)
        with torch.no_grad():
            VALUES[what](trainer.model)
        outputs.append(run(trainer, 2))
        assert not torch.equal(outputs[-1][0], before[0])
    assert_identical(*outputs)
    assert len(records) == 1


def test_options_of_a_group(records: list[int]):
    outputs = []
    for compile in (RECORD, False):
        model = mlp(3, 4, 2)
        trainer = trainer_of(model, compile=compile, params=[{"params": list(model.parameters()), "rank": 1}])
        run(trainer)
        trainer.param_groups[0]["rank"] = 2
        outputs.append(run(trainer))
        trainer.param_groups[0]["noise"] = "dense"
        outputs[-1] += run(trainer)
    assert_identical(*outputs)
    assert len(records) == 3


class ByArgument(nn.Module):
    """Does what its arguments say, and returns more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, power: int = 1, mask: dict[str, Tensor] | None = None) -> dict[str, Any]:
        out = self.layer(x) ** power
        if mask is not None:
            out = out * mask["keep"]
        return {"out": out, "power": power, "nothing": None}

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def test_arguments_and_methods(records: list[int]):
    trainer, plain = trainer_of(ByArgument()), trainer_of(ByArgument(), compile=False)
    plain.model.load_state_dict(trainer.model.state_dict())
    population, expected = trainer.ask(), plain.ask()
    x, keep = inputs(), {"keep": torch.tensor([1.0, 0.0])}
    for _ in range(3):
        assert_identical(population(x), expected(x))
        assert_identical(population(x, power=2), expected(x, power=2))
        assert_identical(population(x, 2), expected(x, 2))
        assert_identical(population(x, mask=keep), expected(x, mask=keep))
        assert_identical(population.call("twice", x), expected.call("twice", x))
        assert_identical(population(x[:2]), expected(x[:2]))
        assert_identical(population(x.double().float().t().t()), expected(x))
    assert len(records) == 6  # by keyword and by place are two calls
    assert population(x, power=3)["power"] == 3


def test_arguments_without_a_value_to_compare(records: list[int]):
    class Config:
        power = 2

    class Configured(ByArgument):
        def forward(self, x: Tensor, config: Config) -> Tensor:  # type: ignore[override]
            return self.layer(x) ** config.power

    trainer = trainer_of(Configured())
    population, config, other = trainer.ask(), Config(), Config()
    other.power = 3
    first = population(inputs(), config)
    second = population(inputs(), other)
    assert not torch.equal(first, second)
    for _ in range(2):
        assert_identical(population(inputs(), config), first)
        assert_identical(population(inputs(), other), second)
    assert len(records) == 2
    config.power = 3
    assert_identical(population(inputs(), config), second)


def test_what_writes_to_its_inputs(records: list[int]):
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.layer(x) + x

    given = inputs()
    torch.manual_seed(0)
    compiled = run(trainer_of(Writes()), x=given)
    torch.manual_seed(0)
    assert_identical(compiled, run(trainer_of(Writes(), compile=False), x=given))
    assert torch.equal(given, inputs())
    assert len(records) == 1


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_what_is_random_is_that_of_the_generation(randomness: str):
    """Dropout and `torch.randn` from the members' keys, and `torch.poisson` from the seeded generator."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(self.layer(x), 0.5) + torch.randn(5, 3) + torch.randint(0, 5, (3,))
            return y + torch.poisson(torch.full((3,), 4.0)) if randomness == "different" else y

    torch.manual_seed(0)
    compiled = run(trainer_of(Noisy(), randomness=randomness))
    torch.manual_seed(0)
    assert_identical(compiled, run(trainer_of(Noisy(), randomness=randomness, compile=False)))
    assert not torch.equal(compiled[0], compiled[1])


def test_autocast(records: list[int]):
    outputs = []
    for compile in (RECORD, False):
        trainer = trainer_of(compile=compile)
        outputs.append(run(trainer))
        with torch.autocast("cpu", torch.bfloat16):
            outputs[-1] += run(trainer)
        outputs[-1] += run(trainer)
    assert_identical(*outputs)
    assert len(records) == 2


def test_default_dtype(records: list[int]):
    class Fills(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.ones(2)

    population = trainer_of(Fills()).ask()
    before = [population(inputs()) for _ in range(3)]
    torch.set_default_dtype(torch.float64)
    try:
        wide = [population(inputs().float()) for _ in range(3)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {out.dtype for out in wide} == {torch.float64}
    assert_identical(population(inputs()), before[0])
    assert len(records) == 2


def test_inference_mode():
    population = trainer_of().ask()
    expected = trainer_of(compile=False).ask()(inputs())
    with torch.inference_mode():
        outputs = [population(inputs()) for _ in range(3)]
    outputs += [population(inputs()) for _ in range(3)]
    for out in outputs:
        assert_identical(out.clone(), expected)


def test_a_model_that_counts_its_calls_runs_as_it_is(records: list[int]):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    trainer, plain = trainer_of(Counts(), strict=False), trainer_of(Counts(), compile=False)
    plain.model.load_state_dict(trainer.model.state_dict())
    with pytest.warns(MaterialisedWarning, match="64 calls in a row were each of another kind") as caught:
        compiled = run(trainer, 70)
    assert_identical(compiled, run(plain, 70))
    assert len(caught) == 1
    assert not records
    with pytest.raises(UnsupportedOperationError, match=r"cannot be compiled.*strict=True"):
        run(trainer_of(Counts(), strict=True), 70)


def test_calls_of_many_kinds(records: list[int]):
    trainer = trainer_of(ByArgument())
    population = trainer.ask()
    for _ in range(3):
        for power in range(60):
            population(inputs(), power)
    assert len(records) == 60


def test_a_model_that_fills_a_cache_once_is_compiled(records: list[int]):
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.mask: Tensor | None = None
            self.register_buffer("late", None)
            self.by_length: dict[int, Tensor] = {}

        @staticmethod
        @functools.cache
        def ones(length: int) -> Tensor:
            return torch.ones(length, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.tril(torch.ones(len(x), len(x)))
            if self.late is None:
                self.late = torch.ones(2)
            if len(x) not in self.by_length:
                self.by_length[len(x)] = torch.full((len(x), 1), 2.0)
            return self.mask @ self.layer(x) * self.by_length[len(x)] * self.ones(len(x)) + self.late

    trainers = []
    for compile in (RECORD, False):
        torch.manual_seed(0)
        trainers.append(trainer_of(Caches(), compile=compile))
    assert_identical(*(run(trainer, 5) for trainer in trainers))
    model: Any = trainers[0].model
    for tensor in (model.mask, model.late, *model.by_length.values(), Caches.ones(5), model(inputs())):
        assert isinstance(tensor, Tensor)
        assert not isinstance(tensor, FakeTensor)
    assert len(records) == 1


class ReadsValues(nn.Module):
    """Reads what all members share, which is allowed."""

    def __init__(self, read: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.read = read

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(x) * self.read(lengths)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda lengths: lengths.max().item(),
    "tolist": lambda lengths: lengths.tolist()[0],
    "numpy": lambda lengths: lengths.numpy()[0],
    "if": lambda lengths: 2 if lengths.sum() > 3 else 3,
    "equal": lambda lengths: 2 if torch.equal(lengths, torch.tensor([1, 1])) else 3,
    "nonzero": lambda lengths: len(lengths.nonzero()),
    "mask": lambda lengths: lengths[lengths > 1].sum(),
    "type": lambda lengths: 2 if isinstance(lengths.max().item(), int) else 3,
    "string": lambda lengths: {"2": 5}.get(str(lengths[0].item()), 7),
}


@pytest.mark.parametrize("how", READS)
def test_a_value_that_is_read_is_not_taken_for_a_constant(how: str):
    compiled = trainer_of(ReadsValues(READS[how]), strict=False)
    plain = trainer_of(ReadsValues(READS[how]), compile=False, strict=False)
    plain.model.load_state_dict(compiled.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterialisedWarning)
        for _ in range(3):
            for lengths in ([1, 1], [2, 1], [0, 5]):
                given = torch.tensor(lengths)
                assert_identical(compiled.ask()(inputs(), given), plain.ask()(inputs(), given))


@pytest.mark.parametrize("how", READS)
def test_nor_is_one_that_a_module_holds(how: str):
    class Holds(ReadsValues):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return {"out": super().forward(x, self.lengths), "read": self.read(self.lengths)}

    outputs = []
    for compile in (RECORD, False):
        torch.manual_seed(0)
        trainer = trainer_of(Holds(READS[how]), compile=compile, strict=False)
        trainer.model.lengths = torch.tensor([1, 1])
        outputs.append([])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterialisedWarning)
            for _ in range(3):
                outputs[-1].append(trainer.ask()(inputs()))
            trainer.model.lengths[0] = 2
            for _ in range(3):
                outputs[-1].append(trainer.ask()(inputs()))
    assert_identical(*outputs)


DRAWS: dict[str, Callable[[nn.Module], Tensor]] = {
    "generator made on the spot": lambda model: torch.rand(2, generator=torch.Generator().manual_seed(3)),
    "generator of the module": lambda model: torch.randn(2, generator=model.generator.manual_seed(3)),
    "global generator": lambda model: torch.manual_seed(0) and torch.poisson(torch.full((2,), 4.0)),
}


@pytest.mark.parametrize("how", DRAWS)
def test_a_model_that_seeds_is_not_recorded(how: str):
    class Seeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.generator = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + DRAWS[how](self)

    outputs = []
    for compile in (RECORD, False):
        torch.manual_seed(0)
        trainer = trainer_of(Seeds(), compile=compile, strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterialisedWarning)
            outputs.append(run(trainer, 4))
    assert_identical(*outputs)


def test_another_method_is_recorded_all_the_same(records: list[int]):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def read(self, x: Tensor) -> Tensor:
            return self.layer(x) * x.sum().item()

    population = trainer_of(Both(), strict=False).ask()
    with pytest.warns(MaterialisedWarning, match="cannot be compiled"):
        read = [population.call("read", inputs()) for _ in range(4)]
    plain = [population(inputs()) for _ in range(4)]
    assert_identical(read[1:], read[:-1])
    assert_identical(plain[1:], plain[:-1])
    assert len(records) == 2  # one of them in vain


def test_reading_says_so():
    population, lengths = trainer_of(ReadsValues(READS["item"]), strict=False).ask(), torch.tensor([1, 2])
    population(inputs(), lengths)
    with pytest.warns(MaterialisedWarning, match="forward pass cannot be compiled"):
        population(inputs(), lengths)


def test_a_model_that_cannot_be_vectorised_says_that_alone():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out if out.sum() > 0 else -out

    with pytest.warns(MaterialisedWarning) as caught:
        out = trainer_of(Branches(), strict=False).ask()(inputs())
    assert len(caught) == 1
    assert "cannot be vectorised" in str(caught[0].message)
    assert bool((out.sum((1, 2)) >= 0).all())


def test_an_error_of_the_model_is_the_models():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        trainer_of(Fails(), strict=False).ask()(inputs())


def test_a_graph_does_not_copy_the_model():
    """A CUDA graph copies what it is not told to find where it was: weights, in every call, which it holds twice."""
    stay: list[list[tuple[int, ...]]] = []

    def compiler(graph: torch.fx.GraphModule, arguments: list[Tensor]) -> Callable[..., object]:
        metadata = torch._guards.TracingContext.get().fw_metadata  # type: ignore[union-attr]
        assert metadata is not None
        stay.append([tuple(arguments[place].shape) for place in metadata.static_input_indices])
        return make_boxed_func(graph.forward)

    model = model_of()
    plain, compiled = (
        trainer_of(copy.deepcopy(model), compile=compile)
        for compile in (RECORD, {"backend": aot_autograd(fw_compiler=compiler)})
    )
    assert_identical(run(compiled, 4), run(plain, 4))
    (found,) = stay
    # A dense parameter, a vector that is trained, is another tensor for every member.
    own = [*(p for p in model.parameters() if p.ndim > 1 or not p.requires_grad), *model.buffers()]
    assert sorted(found) == sorted(tuple(tensor.shape) for tensor in own)
    assert not any(hasattr(tensor, "_dynamo_static_input_type") for tensor in compiled.model.parameters())


def test_python_does_not_run_again():
    """What `compile` promises to spare, and what a user has to know."""
    calls = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(random.random())
            return self.layer(x)

    run(trainer_of(Notes()), 5)
    assert len(calls) == 2


def test_full_rank():
    def trainer(compile: Any) -> VanillaESTrainer:
        model = model_of().train()
        return VanillaESTrainer(
            model.parameters(), model=model, population_size=MEMBERS, seed=0, chunk_size=3, compile=compile
        )

    assert_identical(run(trainer(RECORD)), run(trainer(False)))


def test_unused_parameters_are_found():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "not": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    trainer = trainer_of(model)
    with pytest.raises(
        ValueError, match=r"must take part in the forward pass, but 'not\.bias', 'not\.weight' did not"
    ):
        run(trainer)


def test_saved_copied_and_loaded():
    trainer = trainer_of()
    run(trainer, 2)
    population = trainer.ask()
    population(inputs())
    copies = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    loaded = trainer_of()
    loaded.model.load_state_dict(trainer.model.state_dict())
    loaded.load_state_dict(trainer.state_dict())
    expected = run(trainer, 2)
    for other in (*copies, loaded):
        assert_identical(run(other, 2), expected)
        assert other._compiler.enabled


def test_automatic_chunks_are_measured_without_records(records: list[int]):
    trainer = trainer_of(chunk_size="auto")
    expected = trainer_of(compile=False).ask()(inputs())
    assert_close(trainer.ask()(inputs()), expected, 1e-6)
    assert not records
    assert_close(trainer.ask()(inputs()), expected, 1e-6)
    assert len(records) == 1


@pytest.mark.parametrize("options", [True, {"backend": "aot_eager"}], ids=["inductor", "aot_eager"])
def test_compilers(options: Any):
    plain, compiled = trainer_of(compile=False), trainer_of(compile=options)
    for trainer in (plain, compiled):
        trainer.model.train()
    run(plain)
    run(compiled)
    assert_same_run(compiled, plain, 1e-5)


def test_a_compiler_that_fails():
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such machine")

    with pytest.warns(MaterialisedWarning, match="cannot be compiled .no such machine.: it runs as it is"):
        out = run(trainer_of(compile={"backend": broken}, strict=False))
    assert_identical(out, run(trainer_of(compile=False)))


@pytest.mark.parametrize("compile", [False, RECORD])
def test_a_fitness_that_is_compiled_itself(compile: Any):
    """`torch.compile` compiles what is around a population and leaves that alone."""

    def fitness(population: Population) -> Tensor:
        return -(population(inputs() * 2) + 1).square().mean((1, 2))

    trainers = [
        trainer_of(population_fitness_fn=function, compile=compile)
        for function in (fitness, torch.compile(fitness, backend="eager"))
    ]
    for trainer in trainers:
        trainer.train(2, verbose=False)
    assert_same_run(*trainers)


def test_a_compiled_model(records: list[int]):
    model = model_of()
    trainer = trainer_of(torch.compile(model, backend="eager"))
    assert_identical(run(trainer), run(trainer_of(compile=False)))
    assert len(records) == 1


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [
        ("eager", TypeError, r"`compile` must be a bool or options of torch.compile by name, got 'eager'"),
        (None, TypeError, r"`compile` must be a bool or options of torch.compile by name, got None"),
        (
            {"backend": "eager", "fast": True},
            ValueError,
            r"`compile` may have the options \[.*'mode'.*\], got \['fast'\]",
        ),
        ({"backend": "nope"}, ValueError, r"`compile` must be options that torch.compile knows, got .*'nope'"),
        ({"mode": "nope"}, ValueError, r"`compile` must be options that torch.compile knows, got .*'nope'"),
        ({"model": None}, ValueError, r"`compile` may have the options .*, got \['model'\]"),
    ],
)
def test_bad_options(compile: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        trainer_of(compile=compile)
