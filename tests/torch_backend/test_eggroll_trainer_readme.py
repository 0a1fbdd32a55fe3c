"""The code blocks of the README of eggroll-trainer (kept in ``tests/reference``) run with the import name changed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "reference" / "eggroll_trainer_readme.md"


def blocks(module: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return [block.replace("eggroll_trainer", module) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.fixture(scope="module", params=["eggroll", "eggroll.torch"])
def readme(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the blocks defined, run in order."""
    names: dict[str, Any] = {"__name__": "readme"}
    found = blocks(request.param)
    assert len(found) == 2
    for block in found:
        assert f"from {request.param} import" in block
        exec(block, names)
    return names


def test_the_first_block_trains(readme: dict[str, Any]):
    trainer = readme["trainer"]
    assert trainer.generation == 100
    assert len(trainer.fitness_history) == 100
    assert trainer.best_fitness > max(trainer.fitness_history)
    fresh = readme["SimpleModel"]()
    assert {name: p.shape for name, p in trainer.model.named_parameters()} == {
        name: p.shape for name, p in fresh.named_parameters()
    }
    assert isinstance(trainer.get_best_model(), readme["SimpleModel"])


def test_the_class_of_the_second_block_trains(readme: dict[str, Any]):
    model = nn.Linear(3, 1)

    def fitness_fn(model: nn.Module) -> float:
        return -sum(float((parameter.detach() - 1).square().sum()) for parameter in model.parameters())

    trainer = readme["MyESTrainer"](
        model.parameters(), model=model, fitness_fn=fitness_fn, population_size=32, learning_rate=0.1, seed=0
    )
    assert trainer.current_params.shape == (4,)
    before = fitness_fn(model)
    with torch.random.fork_rng(devices=[]):
        result = trainer.train(num_generations=30, verbose=False)
    assert result["generation"] == 30
    assert fitness_fn(model) > before / 4
    assert fitness_fn(trainer.get_best_model()) == trainer.best_fitness
