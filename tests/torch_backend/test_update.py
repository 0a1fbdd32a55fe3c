"""The direction of the PyTorch backend against `eggroll.update` and against the sum written out."""

import math
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import pytest
import torch
from torch import Tensor, nn
from torch_backend.support import assert_close, make_trainer, scores

from eggroll import EggrollConfig, perturbation, prng
from eggroll.fitness import shape_fitness
from eggroll.update import direction

MEMBERS = 12


class Zoo(nn.Module):
    """A parameter of every kind."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.kernel = nn.Conv2d(2, 3, (2, 1))
        self.embedding = nn.Embedding(7, 4)
        self.experts = nn.Parameter(torch.randn(2, 4, 3))
        self.norm = nn.LayerNorm(5)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.column = nn.Parameter(torch.randn(3, 1, 1))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.to(dtype)


# shape of the noise, stacked axes, low rank; what is not named is dense in the parameter's own shape.
LOW_RANK: dict[str, tuple[tuple[int, ...], int]] = {
    "linear.weight": ((5, 3), 0),
    "kernel.weight": ((3, 4), 0),
    "embedding.weight": ((7, 4), 0),
    "experts": ((2, 4, 3), 1),
}


def square(fitness: Tensor) -> Tensor:
    return fitness * fitness.abs()


SHAPINGS: dict[str, str | Callable[[Tensor], Tensor]] = {
    name: name for name in ("zscore", "group_zscore", "centered_rank", "sign", "baseline", "raw")
} | {"a callable": square}


def expected_directions(
    model: nn.Module, config: EggrollConfig, fitness: Tensor, generation: int
) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    keys = perturbation.parameter_keys(prng.key(0, xp=xp), names)
    weights = shape_fitness(fitness, config)
    expected = {}
    for name, parameter in model.named_parameters():
        shape, stack = LOW_RANK.get(name, (tuple(parameter.shape), 0))
        found = direction(
            keys[name],
            shape,
            generation,
            weights,
            config,
            low_rank=name in LOW_RANK,
            stack_axes=stack,
            dtype=str(parameter.dtype).removeprefix("torch."),
        )
        expected[name] = found.view(parameter.shape).to(parameter.dtype)
    return expected


def config_of(options: dict[str, Any]) -> EggrollConfig:
    options = {name: value for name, value in options.items() if name not in {"chunk_size"}}
    return EggrollConfig(population_size=MEMBERS, antithetic=options.pop("noise_reuse", 0) == 2, **options)


OPTIONS: list[dict[str, Any]] = [
    *(
        {"fitness_shaping": shaping, "gradient_scale": scale, "noise_reuse": 2, "group_size": 6, "rank": 2}
        for shaping in SHAPINGS.values()
        for scale in ("reference", "unbiased")
    ),
    *({"rank": rank, "noise_reuse": reuse} for rank in (1, 2, 3, 4) for reuse in (0, 2)),
    {"fitness_shaping": "baseline", "group_size": 4},
    {"noise_reuse": 2, "noise_lifetime": 2, "sigma": 0.7},
    {"noise_lifetime": None},
    *({"rng": "philox", "rank": rank, "noise_reuse": reuse} for rank in (1, 3) for reuse in (0, 2)),
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(str(getattr(v, "__name__", v)) for v in o.values())
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_direction_is_that_of_the_core(options: dict[str, Any], dtype: torch.dtype):
    model = Zoo(dtype)
    trainer = make_trainer(model, population_size=MEMBERS, learning_rate=1e-3, **options)
    config = config_of(options)
    for generation in range(2):
        trainer.ask()
        trainer.tell(scores(MEMBERS, generation))
        expected = expected_directions(model, config, scores(MEMBERS, generation), generation)
        assert model.frozen.grad is None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A narrow direction may round the other way: half a unit in its last place.
                tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
                assert_close(parameter.grad, expected[name], tolerance)
                assert float(expected[name].abs().max()) > 0


@pytest.mark.parametrize("rng", ["threefry", "philox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_noise_in_the_dtype_of_the_parameter(dtype: torch.dtype, rng: Any):
    model = Zoo(dtype)
    trainer = make_trainer(model, population_size=MEMBERS, noise_dtype="param", noise_reuse=2, rng=rng)
    trainer.ask()
    trainer.tell(scores(MEMBERS))
    config = EggrollConfig(population_size=MEMBERS, noise_dtype="param", rng=rng)
    drawn_wide = EggrollConfig(population_size=MEMBERS, rng=rng)
    expected = expected_directions(model, config, scores(MEMBERS), 0)
    other = expected_directions(model, drawn_wide, scores(MEMBERS), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name], 4e-3)
            assert not torch.equal(expected[name], other[name])


@pytest.mark.parametrize("scale", ["reference", "unbiased"])
@pytest.mark.parametrize("noise_reuse", [0, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_direction_is_the_sum_over_materialised_members(scale: str, noise_reuse: int, rank: int):
    """``-sqrt(N) * mean(w * E)`` and ``-sum(w * E / sigma) / (N * sigma)``, with ``E = W_i - W`` in float64."""
    sigma = 0.3
    model = Zoo(torch.float64)
    options = {"rank": rank, "noise_reuse": noise_reuse, "sigma": sigma, "gradient_scale": scale}
    trainer = make_trainer(model, population_size=MEMBERS, fitness_shaping="raw", **options)
    population = trainer.ask()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    members = [population.state_dict(i) for i in range(MEMBERS)]
    w = scores(MEMBERS)
    trainer.tell(w)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        total = sum(w[i] * (members[i][name] - before[name]) for i in range(MEMBERS))
        if scale == "reference":
            expected = -math.sqrt(MEMBERS) * total / MEMBERS
        else:
            expected = -total / sigma / (MEMBERS * sigma)
        # The weights are handed to the sum in float32.
        assert_close(parameter.grad, expected, 1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8, MEMBERS - 1, MEMBERS, 10 * MEMBERS])
@pytest.mark.parametrize(
    "options", [{"noise_reuse": 2}, {}, {"fitness_shaping": "baseline", "group_size": 4}], ids=str
)
def test_chunks_of_any_size_give_the_same_direction(chunk_size: int, options: dict[str, Any]):
    directions = []
    for size in (None, chunk_size):
        torch.manual_seed(0)
        model = Zoo()
        trainer = make_trainer(model, population_size=MEMBERS, chunk_size=size, rank=2, **options)
        trainer.ask()
        trainer.tell(scores(MEMBERS))
        directions.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for whole, chunked in zip(*directions, strict=True):
        assert_close(chunked, whole, 1e-6)


def test_a_constant_fitness_moves_nothing():
    for shaping in ("zscore", "group_zscore", "centered_rank", "sign", "baseline"):
        model = Zoo()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer = make_trainer(
            model, population_size=MEMBERS, fitness_shaping=shaping, noise_reuse=2, learning_rate=1.0
        )
        trainer.ask()
        trainer.tell([0.1] * MEMBERS)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), shaping


def test_the_rms_step_of_sgd_is_learning_rate_times_sigma():
    """The documented rule for choosing a learning rate, whatever population and rank."""
    for members, rank in ((64, 1), (64, 4), (512, 2)):
        model = nn.Linear(48, 40)
        before = model.weight.detach().clone()
        trainer = make_trainer(model, population_size=members, rank=rank, sigma=0.2, learning_rate=0.05)
        trainer.ask()
        trainer.tell(scores(members))
        rms = float((model.weight.detach() - before).square().mean().sqrt())
        assert rms == pytest.approx(0.05 * 0.2, rel=0.25)
