"""Models that take derivatives of their own with respect to inputs: all members at once, and never silently 0."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_backend.support import assert_close, assert_identical, make_trainer

from eggroll.torch import MaterialisedWarning

MEMBERS = 6
X = torch.linspace(-1, 1, 40).view(5, 8)
ENDS = torch.tensor([2, 5], dtype=torch.int32)


class Model(nn.Module):
    def __init__(self, compute: Callable[[Any, Tensor], Tensor], derive: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.convolution = nn.Conv1d(5, 5, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cell = nn.GRUCell(8, 8)
        self.embedding = nn.Embedding(4, 8)
        self.frozen = nn.Parameter(torch.randn(2, 8, 8), requires_grad=False)
        self.compute, self.derive = compute, derive

    def forward(self, x: Tensor) -> Tensor:
        return self.derive(lambda z: self.compute(self, z), x)


COMPUTATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda model, x: torch.tanh(model.first(x)),
    "matmul": lambda model, x: torch.sin(x @ model.first.weight),
    "stack": lambda model, x: torch.bmm(torch.stack([x, x * x]), model.experts),
    "einsum": lambda model, x: torch.einsum("bi,eio->beo", x**2, model.experts),
    "convolution": lambda model, x: model.convolution(x).square(),
    "embedding": lambda model, x: x * model.embedding(torch.arange(5) % 4) ** 2,
    "attention": lambda model, x: model.attention(x, x, x, need_weights=False)[0],
    "scaled_dot_product_attention": lambda model, x: F.scaled_dot_product_attention(
        model.first(x)[None, None], x[None, None], x[None, None], is_causal=True
    ),
    "cell": lambda model, x: model.cell(x, torch.cos(x)),
}


def along(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.cos(3 * x),))[1]


DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "jvp": along,
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "twice": lambda f, x: along(lambda z: along(f, z), x),
    "hessian": lambda f, x: torch.func.hessian(lambda z: f(z).square().sum())(x),
}


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    options = {"population_size": MEMBERS, "sigma": 0.3, "rank": 2, "unused": "ignore"} | options
    population = make_trainer(model, **options).ask()
    outputs = population(*inputs)
    if "compile" in options:
        outputs = population(*inputs)  # the record
    for member, output in enumerate(outputs):
        # The math kernel: PyTorch's others have no forward derivatives.
        with population.member(member) as formed, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            assert_close(output, formed(*inputs), 1e-4)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_all_members_at_once(computation: str, derivative: str) -> None:
    model = Model(COMPUTATIONS[computation], DERIVATIVES[derivative])
    check(model, X, strict=True)
    check(model, X, strict=True, noise={"*": "dense"})


@pytest.mark.parametrize("derivative", ["jvp", "grad"])
@pytest.mark.parametrize("computation", ["linear", "stack", "attention", "convolution"])
def test_recorded(computation: str, derivative: str) -> None:
    check(Model(COMPUTATIONS[computation], DERIVATIVES[derivative]), X, compile={"backend": "eager"})


class OwnWeights(nn.Module):
    """Takes derivatives with respect to its own parameters."""

    def __init__(self, derive: Callable[[Callable[..., Tensor], dict[str, Tensor]], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        self.derive = derive

    def forward(self, x: Tensor) -> Any:
        return self.derive(
            lambda parameters: torch.func.functional_call(self.net, parameters, (x,)).squeeze(1),
            dict(self.net.named_parameters()),
        )


def adapted(f: Callable[..., Tensor], parameters: dict[str, Tensor]) -> Tensor:
    """Two inner steps, as of MAML."""
    for _ in range(2):
        slopes = torch.func.grad(lambda p: (f(p) - 1).square().mean())(parameters)
        parameters = {name: parameter - 0.5 * slopes[name] for name, parameter in parameters.items()}
    return f(parameters)


def kernel(f: Callable[..., Tensor], parameters: dict[str, Tensor]) -> Tensor:
    rows = torch.cat([slope.flatten(1) for slope in torch.func.jacrev(f)(parameters).values()], dim=1)
    return rows @ rows.mT


OF_WEIGHTS: dict[str, Callable[[Callable[..., Tensor], dict[str, Tensor]], Any]] = {
    "inner steps": adapted,
    "tangent kernel": kernel,
    "vjp": lambda f, p: torch.func.vjp(f, p)[1](torch.ones(5))[0]["0.weight"],
    "jvp": lambda f, p: torch.func.jvp(f, (p,), ({name: torch.cos(w) for name, w in p.items()},))[1],
    "second derivatives": lambda f, p: torch.func.hessian(lambda w: f({**p, "0.weight": w}).sum())(p["0.weight"]),
}


@pytest.mark.parametrize("options", [{}, {"noise": {"*": "dense"}}])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_with_respect_to_weights_of_the_model(name: str, options: dict[str, Any]) -> None:
    """Weights are formed, and members run at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the model cannot be vectorised")
        warnings.filterwarnings("ignore", "no low-rank rule")
        check(OwnWeights(OF_WEIGHTS[name]), X, **options)


def step_by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    slopes = torch.autograd.grad((net(x) - 1).square().mean(), list(net.parameters()))
    moved = {name: p - 0.5 * slope for (name, p), slope in zip(net.named_parameters(), slopes, strict=True)}
    return torch.func.functional_call(net, moved, (x,))


def steps_by_an_optimizer(net: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
    return net(x)


INNER_STEPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "autograd.grad": step_by_autograd,
    "an optimizer": steps_by_an_optimizer,
    "an optimizer of a copy": lambda net, x: steps_by_an_optimizer(copy.deepcopy(net), x),
}


@pytest.mark.parametrize("name", INNER_STEPS)
def test_inner_steps_by_autograd(name: str) -> None:
    """Members run one by one, with parameters of their own to take derivatives of and to change."""

    class Adapting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = OwnWeights(adapted).net

        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return INNER_STEPS[name](self.net, x)

    model = Adapting()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(MaterialisedWarning, match="members run one by one"):
        check(model, X)
    assert_identical(dict(model.state_dict()), dict(before))


def test_one_by_one() -> None:
    class OneByOne(nn.Module):
        def __init__(self, part: nn.Module):
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * (1 if float(x.sum()) < 1e9 else 2)  # a number that `vmap` does not give

    model = OneByOne(Model(lambda model, x: COMPUTATIONS["cell"](model, model.first(x)), along))
    population = make_trainer(model, population_size=MEMBERS, unused="ignore").ask()
    inputs = torch.stack([X * (member + 1) for member in range(MEMBERS)])
    with pytest.warns(MaterialisedWarning, match="members run one by one"):
        outputs = population(inputs, per_member=True)
    for member, output in enumerate(outputs):
        with population.member(member) as formed, torch.no_grad():
            assert_close(output, formed(inputs[member]), 1e-5)


@pytest.mark.parametrize("weight", ["experts", "frozen"])
@pytest.mark.parametrize("derivative", ["func", "autograd"])
def test_grouped_products(weight: str, derivative: str) -> None:
    def compute(model: Any, x: Tensor) -> Tensor:
        return torch._grouped_mm(model.first(x), getattr(model, weight), offs=ENDS).square().sum()

    def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x), x)[0]

    derive: Callable[..., Tensor] = by_autograd if derivative == "autograd" else lambda f, x: torch.func.grad(f)(x)
    model = Model(compute, derive)
    if weight == "experts" or derivative == "autograd":
        with pytest.warns(MaterialisedWarning):
            check(model, X)
    else:
        check(model, X)


class Slope(Function):
    """A step whose derivative is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * tangent

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 5 * gradient


class SlopeWithoutRule(Slope):
    generate_vmap_rule = False


@pytest.mark.parametrize("derivative", ["jvp", "grad"])
def test_functions_with_derivatives_of_their_own(derivative: str) -> None:
    derive = DERIVATIVES[derivative]
    check(Model(lambda model, x: Slope.apply(model.first(x)), derive), X, strict=True)
    with pytest.warns(MaterialisedWarning, match="cannot be vectorised"):
        check(Model(lambda model, x: SlopeWithoutRule.apply(model.first(x)), derive), X)
