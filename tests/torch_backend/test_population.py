"""A population against the model run with each member's weights, and members swapped into the model and out again."""

import copy
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch_backend.support import assert_close, assert_identical, make_trainer, mlp, quadratic, run_state, scores

from eggroll.torch import MaterialisedWarning
from eggroll_torch.member_mode import MemberMode, is_active

MEMBERS = 8


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


class Scaled(nn.Module):
    """Bare parameters of odd shapes, some frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 2))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.gain = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.register_buffer("offset", torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix * self.gain + self.offset) @ self.frozen / self.temperature


class Nested(nn.Module):
    """Nested inputs and outputs, keyword arguments, outputs that are not tensors, and a second method."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)

    def forward(self, inputs: dict[str, Any], scale: float, *, shift: Tensor | None = None) -> dict[str, Any]:
        a = self.left(inputs["pair"][0])
        b = self.right(inputs["pair"][1])
        total = (a + b) * scale
        if shift is not None:
            total = total + shift
        return {"sum": total, "parts": (a, [b]), "name": "nested", "nothing": None, "width": total.shape[-1]}

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x))


Inputs = Callable[[tuple[int, ...]], Tensor]


def numbers(*shape: int) -> Inputs:
    return lambda lead: torch.randn(*lead, *shape)


def tokens(*shape: int) -> Inputs:
    return lambda lead: torch.randint(0, 7, (*lead, *shape))


# Only what the trainer promises first; other layers have tests of their own.
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "linear": (lambda: nn.Linear(3, 5), numbers(4, 3)),
    "linear without bias": (lambda: nn.Linear(3, 5, bias=False), numbers(4, 3)),
    "linear of one row": (lambda: nn.Linear(3, 1), numbers(3)),
    "linear on three axes": (lambda: nn.Linear(3, 2), numbers(2, 5, 3)),
    "linear, empty batch": (lambda: nn.Linear(3, 2), numbers(0, 3)),
    "layer norm": (lambda: nn.LayerNorm(3), numbers(4, 3)),
    "rms norm": (lambda: nn.RMSNorm(3), numbers(4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), numbers(3, 4, 5)),
    "prelu": (lambda: nn.PReLU(), numbers(4, 3)),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=0), tokens(4, 2)),
    "mlp": (lambda: mlp(3, 7, 129, 2), numbers(4, 3)),
    "activations": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 2), nn.Softmax(-1)
        ),
        numbers(4, 3),
    ),
    "tied weights": (Tied, tokens(4)),
    "bare parameters": (Scaled, numbers(4, 3)),
}


def outputs_one_by_one(population: Any, model: nn.Module, args: Any, kwargs: Any, per_member: bool) -> list[Any]:
    def mine(value: Any, i: int) -> Any:
        return value[i] if per_member and isinstance(value, Tensor) else value

    results = []
    for i in range(len(population)):
        own_args, own_kwargs = pytree.tree_map(lambda value, i=i: mine(value, i), (args, kwargs))
        with torch.no_grad():
            results.append(functional_call(model, population.state_dict(i), own_args, own_kwargs))
    return results


def assert_members_equal(actual: Any, expected: list[Any], tolerance: float = 1e-5) -> None:
    """Every tensor of `actual` has the members' tensors along axis 0; what is no tensor is equal."""
    leaves, structure = pytree.tree_flatten(actual)
    rows = [pytree.tree_flatten(member) for member in expected]
    assert all(row[1] == structure for row in rows)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            assert type(leaf) is Tensor
            assert_close(leaf, torch.stack([row[0][place] for row in rows]), tolerance)
        else:
            assert all(leaf == row[0][place] for row in rows)


def lead_of(per_member: bool) -> tuple[int, ...]:
    return (MEMBERS,) if per_member else ()


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # PyTorch's rule for PReLU
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("options", [{}, {"noise_reuse": 2, "rank": 3}, {"freeze_nonlora": True, "rank": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_each_member_is_the_model_with_its_weights(name: str, options: dict[str, Any], per_member: bool):
    make_model, make_input = MODELS[name]
    torch.manual_seed(0)
    model, x = make_model(), make_input(lead_of(per_member))
    if options.get("freeze_nonlora") and not any(p.ndim == 2 and p.requires_grad for p in model.parameters()):
        pytest.skip("no matrix to train")
    population = make_trainer(model, **options).ask()
    outputs = population(x, per_member=per_member)
    expected = outputs_one_by_one(population, model, (x,), {}, per_member)
    assert_members_equal(outputs, expected)
    if outputs.numel() and not per_member:
        assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3, "members differ"


@pytest.mark.parametrize("chunk_size", [1, 3, 5, MEMBERS - 1, MEMBERS, 100])
@pytest.mark.parametrize("noise_reuse", [0, 2])
@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
def test_chunks_of_any_size_give_the_same_outputs(chunk_size: int, noise_reuse: int, per_member: bool):
    model = Scaled()
    x = torch.randn(*lead_of(per_member), 4, 3)
    whole = make_trainer(model, noise_reuse=noise_reuse).ask()(x, per_member=per_member)
    chunked = make_trainer(model, noise_reuse=noise_reuse, chunk_size=chunk_size).ask()(x, per_member=per_member)
    assert_close(chunked, whole, 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
def test_nested_inputs_and_outputs(chunk_size: int | None, per_member: bool):
    model = Nested()
    lead = lead_of(per_member)
    args = ({"pair": (torch.randn(*lead, 4, 3), torch.randn(*lead, 4, 2)), "unused": "text"}, 0.5)
    kwargs = {"shift": torch.randn(*lead, 4)}
    population = make_trainer(model, chunk_size=chunk_size).ask()
    outputs = population(*args, per_member=per_member, **kwargs)
    assert outputs["name"] == "nested"
    assert outputs["nothing"] is None
    assert outputs["width"] == 4
    assert isinstance(outputs["parts"], tuple)
    assert_members_equal(outputs, outputs_one_by_one(population, model, args, kwargs, per_member))


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
def test_another_method_of_the_model(per_member: bool):
    model = Nested()
    x = torch.randn(*lead_of(per_member), 4, 3)
    population = make_trainer(model).ask()
    outputs = population.call("encode", x, per_member=per_member)
    for i in range(MEMBERS):
        with population.member(i) as member, torch.no_grad():
            assert_close(outputs[i], member.encode(x[i] if per_member else x), 1e-5)


def test_a_method_that_is_not_there():
    population = make_trainer(Nested()).ask()
    with pytest.raises(AttributeError, match="`method` must be a method of Nested, got 'decode'"):
        population.call("decode", torch.ones(3))


def test_a_parameter_that_the_model_returns_is_the_members():
    class Returns(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.weight

    population = make_trainer(Returns(3, 2)).ask()
    with pytest.warns(MaterialisedWarning, match="no low-rank rule for the model's output on parameter 'weight'"):
        _, weights = population(torch.ones(3))
    assert_close(weights, torch.stack([population.state_dict(i)["weight"] for i in range(MEMBERS)]), 1e-6)


@pytest.mark.parametrize("shape", [(MEMBERS - 1, 3), (3,), ()], ids=str)
def test_per_member_inputs_need_an_axis_over_members(shape: tuple[int, ...]):
    population = make_trainer(mlp(3, 2)).ask()
    with pytest.raises(ValueError, match=r"axis 0 of every input must be over the 8 members, got the shape"):
        population(torch.ones(shape), per_member=True)


@pytest.mark.parametrize("noise_reuse", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 20])
def test_parts_of_a_population(noise_reuse: int, size: int):
    x = torch.randn(4, 3)
    inputs = torch.randn(MEMBERS, 4, 3)
    population = make_trainer(noise_reuse=noise_reuse).ask()
    parts = list(population.chunks(size))
    assert [member for part in parts for member in part.members] == list(range(MEMBERS))
    assert all(len(part) <= size + size % 2 * (noise_reuse == 2) for part in parts)
    assert_close(torch.cat([part(x) for part in parts]), population(x), 1e-6)
    own = [part(inputs[part.members.start : part.members.stop], per_member=True) for part in parts]
    assert_close(torch.cat(own), population(inputs, per_member=True), 1e-6)
    for part in parts:
        for i, member in enumerate(part.members):
            assert_identical(part.state_dict(i), population.state_dict(member))


@pytest.mark.parametrize("size", [-1, 0, 1.5])
def test_parts_of_no_size(size: Any):
    population = make_trainer().ask()
    with pytest.raises((TypeError, ValueError), match="`size` must be a positive int"):
        list(population.chunks(size))


def test_length_and_indices():
    population = make_trainer().ask()
    assert len(population) == MEMBERS
    assert_identical(population.state_dict(-1), population.state_dict(MEMBERS - 1))
    for index in (MEMBERS, -MEMBERS - 1):
        with pytest.raises(IndexError, match=rf"`index` must be in \[-8, 8\), got {index}"):
            population.state_dict(index)


def test_the_state_dict_of_a_member_is_its_own():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    population = make_trainer(model).ask()
    state = population.state_dict(2)
    assert state.keys() == before.keys()
    assert torch.equal(state["head.weight"], state["embedding.weight"]), "tied weights stay tied"
    assert not torch.equal(state["head.weight"], before["head.weight"])
    for tensor in state.values():
        tensor.zero_()
    assert_identical(dict(model.state_dict()), dict(before))
    assert float(population.state_dict(2)["head.weight"].abs().max()) > 0


def test_a_population_is_over_when_its_generation_is():
    trainer = make_trainer()
    population = trainer.ask()
    inside = population.member(0)
    trainer.tell(scores())
    for use in (
        lambda: population(torch.ones(3)),
        lambda: population.call("forward", torch.ones(3)),
        lambda: population.state_dict(0),
        lambda: list(population.chunks(2)),
        inside.__enter__,
    ):
        with pytest.raises(RuntimeError, match=r"generation is finished: ask\(\) for the next one"):
            use()


def test_a_part_of_a_population_is_over_with_it():
    trainer = make_trainer()
    parts = list(trainer.ask().chunks(4))
    trainer.tell(scores())
    for use in (lambda: parts[0](torch.ones(3)), lambda: parts[1].state_dict(0), lambda: list(parts[0].chunks(2))):
        with pytest.raises(RuntimeError, match=r"generation is finished: ask\(\) for the next one"):
            use()


# Members in the model, and the way back.


class Stateful(nn.Module):
    """Trained, frozen and buffered tensors, which `forward` changes in place and by putting others in their place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.hidden = self.hidden + 1
        return self.norm(self.linear(x)) + self.frozen(x)


def use(model: nn.Module) -> None:
    model(torch.randn(4, 3))


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)


def write_through_data(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)


def quantise(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.round()


def change_dtype(model: nn.Module) -> None:
    model.double()


def replace_parameters(model: nn.Module) -> None:
    model.linear.weight = nn.Parameter(torch.zeros(2, 3))
    model.linear.bias = None
    model.extra = nn.Parameter(torch.zeros(2))
    model.register_buffer("extra_buffer", torch.zeros(2))


def load(model: nn.Module) -> None:
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})


def backward(model: nn.Module) -> None:
    with torch.enable_grad():
        model(torch.randn(4, 3)).sum().backward()


BODIES = [use, write_in_place, write_through_data, quantise, change_dtype, replace_parameters, load, backward]


class Interruption(BaseException):
    """What is not an `Exception`: a time-out, an exit."""


def everything_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "places": {name: (id(t), t.data_ptr()) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit, Interruption])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("options", [{}, {"freeze_nonlora": True}], ids=["all", "matrices"])
def test_the_model_is_itself_again_after_a_member(
    body: Any, error: type[BaseException] | None, options: dict[str, Any]
):
    model = Stateful()
    trainer = make_trainer(model, **options)
    trainer.ask()
    trainer.tell(scores())  # so that there are gradients
    before = everything_of(model)
    population = trainer.ask()
    first = population.state_dict(1)

    def enter() -> None:
        with population.member(1) as member:
            assert member is model
            assert_identical(dict(member.state_dict()), dict(first))
            body(member)
            if error is not None:
                raise error

    if error is None:
        enter()
    else:
        with pytest.raises(error):
            enter()
    assert_identical(everything_of(model), before)
    # The next member sees nothing of this one, nor does the same one when it comes again.
    enter_again = population.state_dict(1)
    assert_identical(enter_again, first)


@pytest.mark.parametrize("body", BODIES)
def test_members_do_not_leak_into_one_another(body: Any):
    seen = []

    def fitness_fn(model: nn.Module) -> float:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        body(model)
        return float(len(seen))

    model = Stateful()
    before = everything_of(model)["values"]
    trainer = make_trainer(model, fitness_fn=fitness_fn, unused="ignore", learning_rate=1e-6)
    population = trainer.ask()
    expected = [dict(population.state_dict(i)) for i in range(MEMBERS)]
    trainer.step()
    for actual, member in zip(seen, expected, strict=True):
        assert_identical(actual, member)
    after = dict(model.state_dict())
    for name in before:
        if not (name.startswith(("linear", "norm.weight", "norm.bias"))):
            assert torch.equal(before[name], after[name]), name


def test_forward_leaves_the_buffers_of_the_model_alone():
    model = Stateful()
    before = everything_of(model)
    make_trainer(model).ask()(torch.randn(4, 3))
    assert_identical(everything_of(model), before)


def test_a_forward_that_raises_leaves_the_model_as_it_was():
    class Raises(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise OSError("no")

    model = Raises()
    before = everything_of(model)
    with pytest.raises(OSError, match="no"):
        make_trainer(model).ask()(torch.randn(4, 3))
    assert_identical(everything_of(model), before)


def test_a_generation_that_is_interrupted_starts_again():
    calls = [0]

    def fitness_fn(model: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return quadratic(model)

    trainer = make_trainer(fitness_fn=fitness_fn, optimizer=torch.optim.Adam)
    before = run_state(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(3, verbose=False)
    assert_identical(run_state(trainer), before)
    trainer.train(3, verbose=False)
    other = make_trainer(fitness_fn=quadratic, optimizer=torch.optim.Adam)
    other.train(3, verbose=False)
    assert_identical(run_state(trainer), run_state(other))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is delivered otherwise")
def test_ctrl_c_during_a_fitness_fn():
    """A real SIGINT in a process of its own."""
    program = """
        import os, signal, sys, torch
        from eggroll.torch import EGGROLLTrainer

        model = torch.nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calls = 0

        def fitness_fn(model):
            global calls
            calls += 1
            if calls == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return float(model.weight.sum() + model.bias.sum())

        trainer = EGGROLLTrainer(model.parameters(), model=model, fitness_fn=fitness_fn, population_size=8, seed=0)
        try:
            trainer.train(3, verbose=False)
        except KeyboardInterrupt:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
            assert trainer.generation == 0 and calls == 5
            trainer.train(3, verbose=False)
            assert trainer.generation == 3
            print("as it was")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as it was"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is delivered otherwise")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see `is_interrupted`
@pytest.mark.parametrize("how", ["member by member", "all at once"])
def test_interrupts_at_any_time_leave_the_model_as_a_whole_number_of_generations(how: str):
    """Ctrl-C wherever it comes: the parameters are those after a finished generation, and the run goes on."""
    model = mlp(3, 4, 2)
    x = torch.ones(2, 3)
    functions: dict[str, Any] = (
        {"fitness_fn": quadratic}
        if how == "member by member"
        else {"population_fitness_fn": lambda population: population(x).sum((1, 2))}
    )
    trainer = make_trainer(model, **functions, optimizer=torch.optim.Adam)
    finished = [copy.deepcopy(dict(model.state_dict()))]
    undisturbed = make_trainer(**functions, optimizer=torch.optim.Adam)
    delay, lost = 0.0, 0
    for _ in range(100):
        delay = (delay + 0.00037) % 0.01
        lost += not is_interrupted(trainer.step, delay)
        while len(finished) <= trainer.generation:
            undisturbed.step()
            finished.append(copy.deepcopy(dict(undisturbed.model.state_dict())))
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        assert_identical(dict(model.state_dict()), finished[trainer.generation])
    assert lost < 20


def is_interrupted(function: Callable[[], Any], delay: float) -> bool:
    """Whether Ctrl-C after so many seconds ends calls of the function that follow each other.

    Python drops an exception that is raised in a finalizer, so one that comes while garbage is collected may be lost.
    """
    came = threading.Event()

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)
        came.set()

    timer = threading.Timer(delay, interrupt)
    calls_since = 0
    try:
        timer.start()
        while calls_since < 20:
            function()
            calls_since += came.is_set()
    except KeyboardInterrupt:
        return True
    finally:
        timer.join()
    return False


class Struck(list[Any]):
    """Ctrl-C comes while it changes."""

    def clear(self) -> None:
        super().clear()
        signal.raise_signal(signal.SIGINT)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(3, 2), Struck([1])

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(self.linear(x))
        return self.kept[-1]


X = torch.ones(2, 3)
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"population_fitness_fn": lambda population: population(X).sum((1, 2))},
    "alone": {"fitness_fn": lambda model: float(model(X).sum())},
}


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_while_the_model_is_put_back(way: str):
    trainer = make_trainer(Keeping(), **WAYS[way])
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    assert trainer.model.kept == [1]
    assert trainer.generation == 0


def test_ctrl_c_leaves_nothing_of_members_in_pytorch(monkeypatch: pytest.MonkeyPatch):
    """PyTorch's modes and transformations are left in the middle of a forward pass."""
    leave = MemberMode.__exit__

    def interrupted(mode: MemberMode, *error: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        leave(mode, *error)

    trainer = make_trainer(mlp(3, 4, 2), **WAYS["all at once"])
    with monkeypatch.context() as patch:
        patch.setattr(MemberMode, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not is_active()
    assert trainer.step() == make_trainer(mlp(3, 4, 2), **WAYS["all at once"]).step()


def test_a_second_ctrl_c_does_not_wait_for_the_forward_pass():
    seen = []

    def forward(x: Tensor) -> Tensor:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            seen.append(x)
        return model.linear(x)

    model = Keeping()
    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, **WAYS["all at once"]).step()
    assert len(seen) == 1


def test_ctrl_c_within_a_function_of_pytorch_that_is_watched():
    def fitness_fn(model: nn.Module) -> float:
        torch.overrides._pop_mode()  # as PyTorch does for as long as it answers
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(fitness_fn=fitness_fn).step()


class Switching(nn.Module):
    """Writes to its input when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            x.mul_(2)
        return self.linear(x)

    def doubled(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2))

    def clamped(self, x: Tensor) -> Tensor:
        x.data.clamp_(max=0.5)
        return self.linear(x)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", ["doubled", "clamped"])
def test_another_method_writes_to_its_inputs(method: str, chunk_size: int | None):
    model, x = Switching(), torch.ones(4, 3)
    population = make_trainer(model, population_size=MEMBERS, chunk_size=chunk_size).ask()
    population(x)
    for _ in range(3):
        outputs = population.call(method, x)
        assert torch.equal(x, torch.ones(4, 3))
    for i in range(MEMBERS):
        with population.member(i) as member, torch.no_grad():
            assert_close(outputs[i], getattr(member, method)(x.clone()), 1e-6)


def test_writing_to_inputs_from_some_call_on_is_said():
    model, x = Switching(), torch.ones(4, 3)
    population = make_trainer(model, population_size=MEMBERS).ask()
    population(x)
    model.writes = True
    with pytest.raises(RuntimeError, match="wrote to its inputs, which it did not in calls before"):
        population(x)
    x = torch.ones(4, 3)
    outputs = population(x)
    assert torch.equal(x, torch.ones(4, 3))
    with population.member(0) as member, torch.no_grad():
        assert_close(outputs[0], member(x), 1e-6)


def test_a_model_that_is_a_member_is_not_taken_for_itself():
    trainer = make_trainer(mlp(3, 2), population_size=MEMBERS)
    population, x = trainer.ask(), torch.ones(3)
    before = run_state(trainer)
    attempts: dict[str, Callable[[], Any]] = {
        "a population": lambda: population(x),
        "population.member()": lambda: population.member(1).__enter__(),
        "population.state_dict()": lambda: population.state_dict(1),
        "tell()": lambda: trainer.tell(scores(MEMBERS)),
        "reset()": trainer.reset,
        "get_best_model() before any generation": trainer.get_best_model,
        "a copy of the trainer": lambda: copy.deepcopy(trainer),
    }
    with population.member(0):
        for what, attempt in attempts.items():
            with pytest.raises(RuntimeError, match=re.escape(f"{what} needs the model's own weights")):
                attempt()
    assert_identical(run_state(trainer), before)
    population(x)
    trainer.tell(scores(MEMBERS))


class Slow(nn.Module):
    """A layer within which a second thread may begin, if it can."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.inside, self.another = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if self.inside.is_set():
            self.another.set()
        self.inside.set()
        self.another.wait(0.2)
        return self.layer(x)


def called_alone(part: Any) -> Tensor:
    with part.member(1) as model, torch.no_grad():
        return model(torch.ones(2, 3))


@pytest.mark.parametrize("first", [lambda part: part(torch.ones(2, 3)), called_alone], ids=["call", "member"])
@pytest.mark.parametrize(
    "second",
    [
        lambda part: part(torch.ones(2, 3)),
        called_alone,
        lambda part: part.state_dict(0),
        lambda part: part.lora(0),
        lambda part: part.evaluate(lambda model: float(model.layer(torch.ones(3)).sum())),
    ],
    ids=["call", "member", "state_dict", "lora", "evaluate"],
)
def test_threads_have_members_one_after_another(first: Callable[[Any], Any], second: Callable[[Any], Any]):
    trainer = make_trainer(Slow(), population_size=8)
    parts = list(trainer.ask().chunks(4))
    trainer.model.another.set()
    expected = first(parts[0]), second(parts[1])
    trainer.model.another.clear()
    trainer.model.inside.clear()
    parameters = list(trainer.model.parameters())
    found = []
    thread = threading.Thread(target=lambda: found.append(first(parts[0])))
    thread.start()
    assert trainer.model.inside.wait(60)
    of_second = second(parts[1])
    thread.join()
    assert_identical((*found, of_second), expected)
    assert all(mine is theirs for mine, theirs in zip(trainer.model.parameters(), parameters, strict=True))
