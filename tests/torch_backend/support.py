"""What the tests of the PyTorch backend share: small models, trainers, and the state that a run consists of."""

import copy
import functools
import itertools
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from core.support import recorded
from torch import Tensor, nn

from eggroll.torch import EGGROLLTrainer, Population
from eggroll_torch.policy import Way


def mlp(*sizes: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    """Linear layers of these sizes with tanh between them, the same for the same `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def quadratic(model: nn.Module) -> float:
    """Minus the squared distance of all parameters to 1."""
    return -sum(float((parameter.detach() - 1).square().sum()) for parameter in model.parameters())


def quadratic_of_population(population: Population) -> Tensor:
    """`quadratic` of all members, from their weights."""
    return torch.stack(
        [
            -torch.stack([(tensor - 1).square().sum() for tensor in population.state_dict(i).values()]).sum()
            for i in range(len(population))
        ]
    )


def make_trainer(model: nn.Module | None = None, **options: Any) -> EGGROLLTrainer:
    """A small trainer; `options` are the constructor's."""
    model = mlp(3, 4, 2) if model is None else model
    if "params" not in options:
        options["params"] = model.parameters()
    return EGGROLLTrainer(**{"model": model, "population_size": 8, "seed": 0, **options})


def run_one_by_one(trainer: EGGROLLTrainer) -> None:
    """Has the members of a trainer's populations run one by one, as if the model could not be vectorised."""
    trainer._policy.ways.default_factory = lambda: Way(one_by_one=True)


def scores(members: int = 8, seed: int = 0) -> Tensor:
    """Some fitness for each member."""
    return torch.randn(members, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_state(trainer: Any) -> dict[str, Any]:
    """A copy of all that a generation may change."""
    return copy.deepcopy(
        {
            "parameters": dict(trainer.model.state_dict()),
            "gradients": [parameter.grad for parameter in trainer.model.parameters()],
            "optimizer": trainer.optimizer.state_dict(),
            "generation": trainer.generation,
            "best_fitness": trainer.best_fitness,
            "fitness_history": trainer.fitness_history,
            "sigma": trainer.sigma,
        }
    )


def assert_identical(actual: Any, expected: Any, where: str = "it") -> None:
    """Equal to the bit, at any depth of dictionaries, lists and tuples."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for place, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(mine, theirs, f"{where}[{place}]")
    else:
        assert actual == expected, where


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, of: Tensor | None = None) -> None:
    """`actual` equals `expected` to `tolerance`, relative to the largest magnitude in `expected`.

    A member's share of an output may be one number that happens to be close to zero: `of` is then the whole output,
    whose scale counts.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    whole = expected if of is None else of
    scale = float(whole.abs().max()) if whole.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_same_run(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """The parameters and the history of two trainers are equal to `tolerance`."""
    for mine, theirs in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(mine.detach(), theirs.detach(), tolerance)
    np.testing.assert_allclose(actual.fitness_history, expected.fitness_history, rtol=tolerance)


class RecordedMLP(nn.Module):
    """The network of ``tests/reference/trajectory_<k>.npz``."""

    def __init__(self, config: dict[str, Any], initial: dict[str, np.ndarray]):
        super().__init__()
        sizes = [config["in_dim"], *config["hidden"], config["out_dim"]]
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, bias=config["bias"]) for inputs, outputs in itertools.pairwise(sizes)
        )
        self.activation = {
            "relu": F.relu,
            "silu": F.silu,
            "pqn": lambda x: F.relu(F.layer_norm(x, x.shape[-1:])),
        }[config["act"]]
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(initial[recorded_name(name)]))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


def recorded_name(name: str) -> str:
    """The record's name of a parameter: ``layers.0.weight`` is ``0/weight``."""
    return name.removeprefix("layers.").replace(".", "/")


class ClippedSGD(torch.optim.SGD):
    """SGD that clips the global norm of the direction to 1."""

    def step(self, closure: None = None) -> None:
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step(closure)


def recorded_run(k: int, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], EGGROLLTrainer]:
    """The record of trajectory `k`, its configuration, and a trainer at its start."""
    record = recorded(f"trajectory_{k}")
    config = json.loads(str(record["config"]))
    initial = {name.removeprefix("init/"): record[name] for name in record if name.startswith("init/")}
    model = RecordedMLP(config, initial)
    optimizer: Any = {
        "sgd": torch.optim.SGD,
        # optax.adamw decays by 1e-4 unless told otherwise.
        "adamw": functools.partial(torch.optim.AdamW, weight_decay=1e-4),
    }[config["solver"]]
    if momentum := config["skw"].get("momentum"):
        optimizer = functools.partial(optimizer, momentum=momentum)
    trainer = EGGROLLTrainer(
        **{
            "params": model.parameters(),
            "model": model,
            "population_size": config["N"],
            "sigma": config["sigma"],
            "learning_rate": config["lr"],
            "rank": config["rank"],
            "noise_reuse": 2,
            "noise_lifetime": config["reuse"] or None,
            "group_size": config["group"],
            "freeze_nonlora": config["freeze"],
            "seed": record["es_key"],
            "optimizer": optimizer,
            **options,
        }
    )
    return record, config, trainer
