"""The recorded runs of the reference, replayed through `EGGROLLTrainer`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch_backend.support import ClippedSGD, assert_close, recorded_name, recorded_run

from eggroll.fitness import shape_fitness


@pytest.mark.parametrize("chunk_size", [None, 6])
@pytest.mark.parametrize(
    ("k", "options"),
    [
        *((k, {}) for k in range(4)),
        *((k, {"fused": True}) for k in (0, 2)),
        (5, {"fitness_shaping": "baseline", "optimizer": ClippedSGD}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_recorded_run_replays(k: int, options: dict[str, Any], chunk_size: int | None):
    record, config, trainer = recorded_run(k, chunk_size=chunk_size, **options)

    def assert_parameters(generation: int) -> None:
        for name, parameter in trainer.model.named_parameters():
            expected = torch.from_numpy(record[f"params{generation}/{recorded_name(name)}"])
            assert_close(parameter.detach(), expected, 1e-4)

    for generation in range(config["gens"]):
        inputs = torch.from_numpy(record["inputs"][generation])
        outputs = trainer.ask()(inputs, per_member=True)
        assert_close(outputs, torch.from_numpy(record["outputs"][generation]), 1e-4)
        target = 2.0 if config["task"] == "two" else torch.sin(inputs).sum(-1, keepdim=True)
        fitness = -((outputs - target) ** 2)[:, 0]
        assert_close(fitness, torch.from_numpy(record["raw"][generation]), 1e-4)
        shaped = shape_fitness(fitness.double(), trainer.config).numpy()
        np.testing.assert_allclose(shaped, record["shaped"][generation], atol=1e-4 * np.abs(shaped).max())
        trainer.tell(fitness)
        if generation == 0:
            assert_parameters(1)
    assert_parameters(config["gens"])


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_record_is_of_a_run_that_moves(k: int):
    """What the replay is compared with differs from the start by far more than the tolerance."""
    record, config, _ = recorded_run(k)
    moved = [
        np.abs(record[f"params{config['gens']}/{name}"] - record[f"init/{name}"]).max()
        / np.abs(record[f"init/{name}"]).max()
        for name in (name.removeprefix("init/") for name in record if name.startswith("init/"))
        if np.abs(record[f"init/{name}"]).max() > 0
    ]
    assert max(moved) > 1e-2
