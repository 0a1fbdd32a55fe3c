"""What happens on a device that is not the CPU, on the meta device, which computes shapes and has no values.

It stands for a GPU where there is none: a tensor on the wrong device is an error, and so is everything that reads a
value back, for which a GPU would have to finish all that it was handed before.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eggroll import prng
from eggroll.torch import EGGROLLTrainer, VanillaESTrainer
from eggroll_torch import kernels, member_ops, noise

MEMBERS = 8
META = torch.device("meta")


class Zoo(nn.Module):
    """Layers of every kind, and what is random."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.1)
        self.experts = nn.Parameter(torch.empty(3, 4, 4))

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x = self.block(self.conv(x.mT).mT)
        x = self.batch_norm(self.gru(x)[0])
        x = self.dropout(self.out(x)).flatten(0, 1)
        return torch.bmm(x.expand(3, *x.shape), self.experts.mT).sum(0)


class Waits(TorchDispatchMode):
    """Notes copies to the device for which PyTorch would wait, or all of them."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every = every
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        crosses = any(tensor.device.type == "cpu" for tensor in tensors) and getattr(result, "device", None) == META
        waits = not (kwargs.get("non_blocking") or any(given is True for given in args))
        if "copy" in name and crosses and (waits or self.every):
            self.found.append(name)
        return result


@pytest.fixture(params=[True, False], ids=["kernels", "without kernels"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has the kernels, or one that has not. Their operations know the shapes of what they return."""
    answer = kernels.Status(request.param, "for a test", None, None)
    monkeypatch.setattr(kernels, "status", lambda device=None, rng="threefry": answer)


def trainer_of(**options: Any) -> EGGROLLTrainer:
    with META:
        model = Zoo().to(torch.bfloat16)
    options = {"population_size": MEMBERS, "antithetic": True, "seed": 0, "strict": True} | options
    return EGGROLLTrainer(model.parameters(), model=model, **options)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("per_member", [False, True])
def test_a_forward_pass_does_not_wait(per_member: bool, chunk_size: int | None):
    trainer = trainer_of(chunk_size=chunk_size)
    index = torch.empty(2, 5, dtype=torch.long, device=META)
    with Waits() as waits:
        population = trainer.ask()
        out = population(index.expand(MEMBERS, 2, 5) if per_member else index, per_member=per_member)
    assert out.shape == (MEMBERS, 10, 4)
    assert out.device == META
    assert waits.found == []


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("rng", ["threefry", "philox"])
def test_an_update_does_not_wait(better: bool, rng: str):
    trainer = trainer_of(rng=rng)
    for _ in range(2):
        population = trainer.ask()
        population(torch.empty(2, 5, dtype=torch.long, device=META))
        trainer.best_fitness = -10.0 if better else 10.0
        with Waits() as waits:
            trainer.tell(torch.linspace(-1, 1, MEMBERS))
        assert waits.found == []
        assert all(parameter.grad.device == META for parameter in trainer.model.parameters())
    assert trainer.generation == 2


@pytest.mark.usefixtures("_kernels")
def test_one_member_after_another():
    trainer = trainer_of()
    with Waits() as waits:
        index = torch.empty(2, 5, dtype=torch.long, device=META)
        scores = trainer.ask().evaluate(lambda model: float(model(index).ndim))
        trainer.ask().state_dict(3)
        trainer.ask().weights.member_factors(3)  # type: ignore[attr-defined]
    assert scores == [2.0] * MEMBERS
    assert waits.found == []


@pytest.mark.usefixtures("_kernels")
def test_as_the_default_device():
    """Keys are made on the host all the same."""
    with META:
        trainer = trainer_of(chunk_size=4)
        index = torch.empty(2, 5, dtype=torch.long)
        trainer.ask()(index)
        trainer.tell([float(member) for member in range(MEMBERS)])
        assert trainer.ask().evaluate(lambda model: float(model(index).ndim)) == [2.0] * MEMBERS
        perturbations = VanillaESTrainer(trainer.model.parameters(), model=trainer.model).sample_perturbations(3)
    assert perturbations.device == META


@pytest.mark.usefixtures("_kernels")
def test_what_a_layer_draws_is_not_copied_from_the_host():
    """A CUDA graph would copy from memory of the host that is long something else's; PyTorch 2.11 refuses to."""
    key, members = torch.empty(2, dtype=torch.int32, device=META), torch.empty(8, dtype=torch.int64, device=META)
    with Waits(every=True) as waits:
        drawn = member_ops.uniforms_of_members._init_fn(key, 1, members, (3, 5))
    assert drawn.shape == (8, 3, 5)
    assert waits.found == []


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("rng", ["threefry", "philox"])
def test_factors_of_one_matrix_are_drawn_without_the_host(rng: prng.Rng, monkeypatch: pytest.MonkeyPatch):
    """As an embedding draws its rows within a pass that is recorded."""
    monkeypatch.setattr(noise, "KEPT", 0)
    source = trainer_of(rng=rng).ask().weights.source  # type: ignore[attr-defined]
    (embedding,) = (parameter for parameter in source.parameters if parameter.name == "embed.weight")
    keys = source.keys(embedding, source.chunk(range(MEMBERS)))
    with Waits(every=True) as waits:
        factors = noise.DrawnFactors(keys, embedding)
        assert factors.A.shape == (MEMBERS // 2, 11, 1)
    assert waits.found == []


def test_waiting_is_noticed():
    """The tests above could fail."""
    with Waits() as waits:
        torch.ones(2).to(META, non_blocking=True)
        torch.zeros(2, device=META)
        assert waits.found == []
        torch.ones(2).to(META)
        torch.ones(2, device=META).copy_(torch.ones(2))
    assert waits.found == ["aten._to_copy.default", "aten.copy_.default"]
    with pytest.raises(NotImplementedError, match="meta"):
        torch.ones(2, device=META).cpu()
