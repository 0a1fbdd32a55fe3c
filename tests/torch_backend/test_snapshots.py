"""Without snapshots a trainer keeps no copy of the parameters, says so where one is asked for, and runs the same."""

import copy
from typing import Any

import pytest
import torch
from torch_backend.support import assert_identical, make_trainer, mlp, run_state, scores

from eggroll.torch import VanillaESTrainer

KINDS = [make_trainer, lambda model, **options: VanillaESTrainer(model.parameters(), model, seed=0, **options)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["EGGROLL", "vanilla"])


def run(kind: Any, generations: int = 3, **options: Any) -> Any:
    trainer = kind(mlp(3, 4, 2), population_size=8, **options)
    for generation in range(generations):
        trainer.ask()
        trainer.tell(scores(seed=generation))
    return trainer


@kinds
def test_the_run_is_the_same(kind: Any):
    assert_identical(run_state(run(kind, snapshots=False)), run_state(run(kind)))


@kinds
def test_what_needs_a_snapshot_says_so(kind: Any):
    trainer = run(kind, snapshots=False)
    before = run_state(trainer)
    with pytest.raises(RuntimeError, match=r"get_best_model\(\) needs a trainer with `snapshots` True"):
        trainer.get_best_model()
    with pytest.raises(RuntimeError, match=r"reset\(\) needs a trainer with `snapshots` True"):
        trainer.reset()
    assert_identical(run_state(trainer), before)


@kinds
def test_snapshots_is_a_bool(kind: Any):
    with pytest.raises(TypeError, match="`snapshots` must be a bool, got 'no'"):
        kind(mlp(3, 2), snapshots="no")


def test_no_copy_is_kept():
    trainer = run(make_trainer, snapshots=False)
    assert trainer._best_state is None
    assert trainer._initial_parameters == {}
    assert trainer.state_dict()["best_state"] is None


def test_a_state_with_a_best_member_goes_on_without():
    saved = run(make_trainer)
    other = make_trainer(mlp(3, 4, 2), snapshots=False)
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert other._best_state is None
    assert other.best_fitness == saved.best_fitness


def test_a_state_without_a_best_member_is_refused_where_one_is_kept():
    saved = run(make_trainer, snapshots=False).state_dict()
    trainer = run(make_trainer, generations=1)
    before = run_state(trainer)
    with pytest.raises(ValueError, match="`state_dict` holds no best member"):
        trainer.load_state_dict(saved)
    assert_identical(run_state(trainer), before)
    trainer.load_state_dict(make_trainer(mlp(3, 4, 2), snapshots=False).state_dict())
    assert trainer.generation == 0


def test_parameters_that_are_added_are_not_copied_either():
    model = mlp(3, 4, 2)
    trainer = make_trainer(model, params=model[0].parameters(), snapshots=False)
    trainer.add_param_group({"params": model[2].parameters()})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.ask()
    trainer.tell(scores())
    assert trainer._initial_parameters == {}
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
