"""A `torch.autograd.Function` in a model: members run its forward pass together, whether or not it has rules."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch_backend.support import assert_close, make_trainer

from eggroll.torch import MaterialisedWarning, UnsupportedOperationError

MEMBERS = 8
APPLY = vars(Function)["apply"]
X = torch.linspace(-1, 1, 30).view(5, 6)


class Sign(Function):
    """With a context, which it uses in every way that a forward pass may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float = 2.0) -> Tensor:
        ctx.slope = slope
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        positive = x > 0
        ctx.mark_non_differentiable(positive)
        return torch.where(positive, slope, -slope)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.slope, None


class Curious(Function):
    """Looks at its context."""

    scale = 2.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert isinstance(ctx, torch.autograd.function.BackwardCFunction)
        assert ctx.saved_tensors == ()
        ctx.save_for_backward(x)
        return x * ctx._forward_cls.scale  # type: ignore[attr-defined]


class SignInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.sign_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


class Parts(Function):
    """Without a context, and more than one result."""

    @staticmethod
    def forward(x: Tensor, by: float = 0.5) -> tuple[Tensor, Tensor]:
        return x.clamp(min=by), x.clamp(max=by)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] + gradients[1], None


class Ruled(Function):
    """Has a rule of its own, which counts."""

    calls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        Ruled.calls += 1
        return Ruled.apply(x), in_dims[0]


class Model(nn.Module):
    def __init__(self, apply: Any):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.apply_function = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.apply_function(self.first(x)))


APPLIED = {
    "with a context": lambda x: Sign.apply(x),
    "with an argument": lambda x: Sign.apply(x, 0.5),
    "that it looks at": lambda x: Curious.apply(x),
    "in place": lambda x: SignInPlace.apply(x.clone()),
    "without a context": lambda x: sum(Parts.apply(x)),
    "with a rule": lambda x: Ruled.apply(x),
}


def assert_members_equal(population: Any, x: Tensor) -> None:
    outputs = population(x)
    for i in range(MEMBERS):
        with population.member(i) as model, torch.no_grad():
            assert_close(outputs[i], model(x), 1e-6)


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["as it is", "compiled"])
@pytest.mark.parametrize("name", APPLIED)
def test_members_run_together(name: str, compile: Any) -> None:
    torch.manual_seed(0)
    options = {"population_size": MEMBERS, "sigma": 0.3, "strict": True, "compile": compile}
    trainer = make_trainer(Model(APPLIED[name]), **options)
    for _ in range(3):
        assert_members_equal(trainer.ask(), X)
        trainer.tell(torch.arange(float(MEMBERS)))
    assert vars(Function)["apply"] is APPLY


def test_a_rule_of_its_own_is_followed() -> None:
    before = Ruled.calls
    make_trainer(Model(APPLIED["with a rule"]), population_size=MEMBERS).ask()(X)
    assert Ruled.calls == before + 1


def test_weights_go_through() -> None:
    class Binary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Sign.apply(self.weight), self.bias)

    population = make_trainer(Binary(6, 3), population_size=MEMBERS, sigma=0.3).ask()
    with pytest.warns(MaterialisedWarning, match="no low-rank rule for gt on parameter 'weight'"):
        assert_members_equal(population, X)


def test_an_error_in_it_is_the_models_and_leaves_nothing_behind() -> None:
    class Broken(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        make_trainer(Model(lambda x: Broken.apply(x)), population_size=MEMBERS).ask()(X)
    assert vars(Function)["apply"] is APPLY


def test_what_another_library_puts_in_its_place_is_called_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(cls: Any, *args: Any) -> Any:
        seen.append(cls)
        return APPLY.__get__(None, cls)(*args)

    theirs = classmethod(counted)
    monkeypatch.setattr(Function, "apply", theirs)
    make_trainer(Model(APPLIED["with a rule"]), population_size=MEMBERS).ask()(X)
    assert seen == [Ruled] * 2  # of which one is by its own rule
    assert vars(Function)["apply"] is theirs


def test_gradients_inside_the_model_are_not_lost() -> None:
    """With gradients on, what its backward pass says counts: PyTorch refuses, and members run one by one."""

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(Sign.apply(x).sum(), x)[0] * x

    model = Model(slope)
    with pytest.raises(UnsupportedOperationError, match="cannot be vectorised"):
        make_trainer(model, population_size=MEMBERS, strict=True).ask()(X)


def test_other_threads_have_their_gradients() -> None:
    found: list[Tensor] = []

    def elsewhere() -> None:
        x = torch.ones(3, requires_grad=True)
        Sign.apply(x, 3.0).sum().backward()
        assert x.grad is not None
        found.append(x.grad)

    def apply(x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return Sign.apply(x)

    make_trainer(Model(apply), population_size=MEMBERS, strict=True).ask()(X)
    assert torch.equal(found[0], torch.full((3,), 3.0))
