"""A run on several processes is the run on one: shares of the members, equal fitness, the same step everywhere.

Every test begins processes that talk over gloo on this machine; what they are to do is one of the functions below.
"""

import contextlib
import copy
import datetime
import functools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch_backend.support import assert_close, assert_identical, make_trainer, mlp, quadratic, run_state

from eggroll.torch import EGGROLLTrainer, Population, VanillaESTrainer

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="PyTorch was built without gloo"
)

# One process imports PyTorch, and the others begin as its copies.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
multiprocessing.set_forkserver_preload(["eggroll_torch", "pytest"])

MEMBERS = 10
X = torch.linspace(-1, 1, 12).view(4, 3)


def in_processes(tmp_path: Path, count: int, body: Callable[[int], Any]) -> list[Any]:
    """What `body`, given its rank, returns in each of `count` processes."""
    torch.multiprocessing.start_processes(_process, (count, str(tmp_path), body), count, start_method=START)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, folder: str, body: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    # What waits for another process for ever fails in the end.
    how: dict[str, Any] = {"init_method": f"file://{folder}/meeting", "timeout": datetime.timedelta(minutes=3)}
    distributed.init_process_group("gloo", rank=rank, world_size=count, **how)
    try:
        torch.save(body(rank), f"{folder}/{rank}.pt")
        if distributed.is_initialized():
            distributed.barrier()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def fitness_of(population: Population) -> Tensor:
    return -(population(X) - 1).square().mean((1, 2))


KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"noise_reuse": 2, "population_fitness_fn": fitness_of},
    "independent": {"population_fitness_fn": fitness_of, "fitness_shaping": "centered_rank", "chunk_size": 2},
    "one by one": {"fitness_fn": quadratic, "noise_reuse": 2, "optimizer": torch.optim.AdamW},
    "auto": {"population_fitness_fn": fitness_of, "chunk_size": "auto", "group_size": 5},
    "fused": {"population_fitness_fn": fitness_of, "fused": True, "noise_reuse": 2},
    "dropout": {"population_fitness_fn": fitness_of, "noise_reuse": 2},
    "draws": {"fitness_fn": lambda model: quadratic(model) + float(torch.rand(())), "noise_reuse": 2},
    "full rank": {"population_fitness_fn": fitness_of},
}


def trainer_of(kind: str, **options: Any) -> Any:
    model = mlp(3, 4, 2)
    model[2].weight = nn.Parameter(model[2].weight.detach().mT.contiguous().mT)
    if kind == "dropout":
        model.insert(1, nn.Dropout(0.5))
    how: dict[str, Any] = {"population_size": MEMBERS, "learning_rate": 0.1, "seed": 3} | KINDS[kind] | options
    if kind == "full rank":
        return VanillaESTrainer(model.parameters(), model, **how)
    return make_trainer(model, **how)


def run(kind: str, generations: int = 3, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    trainer = trainer_of(kind, **options)
    return trainer, [trainer.step() for _ in range(generations)]


def all_kinds(rank: int) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        trainer, metrics = run(kind, distributed=True)
        found[kind] = {
            "members": trainer.ask().members,
            "metrics": metrics,
            "state": run_state(trainer),
            "best": dict(trainer.get_best_model().state_dict()),
            "saved": trainer.state_dict(),
            "estimate": (len(trainer.ask()), getattr(trainer, "memory_estimate", lambda: None)()),
        }
        copied = copy.deepcopy(trainer) if kind in {"draws", "dropout"} else pickle.loads(pickle.dumps(trainer))
        found[kind]["copy"] = (copied.step(), trainer.step())
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_on_several_processes_is_the_run_on_one(count: int, tmp_path: Path):
    everyone = in_processes(tmp_path, count, all_kinds)
    for kind in KINDS:
        found = [theirs[kind] for theirs in everyone]
        members = [member for theirs in found for member in theirs["members"]]
        assert members == list(range(MEMBERS))
        if KINDS[kind].get("noise_reuse") == 2:
            assert all(len(theirs["members"]) % 2 == 0 for theirs in found)
        for theirs in found[1:]:
            for what in ("metrics", "state", "best", "saved"):
                assert_identical(theirs[what], found[0][what], f"{kind}: {what}")
        assert found[0]["copy"][0] == found[0]["copy"][1]
        assert all(estimate is None or estimate.chunk_size <= own for own, estimate in (f["estimate"] for f in found))
        alone, metrics = run(kind)
        assert_close(torch.tensor(found[0]["state"]["fitness_history"]), torch.tensor(alone.fitness_history), 1e-6)
        assert [set(row) for row in found[0]["metrics"]] == [set(row) for row in metrics]
        for name, parameter in alone.model.state_dict().items():
            assert_close(found[0]["state"]["parameters"][name], parameter, 1e-6)
        for name, tensor in alone.get_best_model().state_dict().items():
            assert_close(found[0]["best"][name], tensor, 1e-6)


def unlike_the_first(rank: int) -> dict[str, Any]:
    model = nn.Sequential(mlp(3, 4, seed=rank), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.constant_(model[1].running_mean, rank)
    nn.init.constant_(model[2].weight, rank)
    torch.manual_seed(rank)
    parameters = [parameter for name, parameter in model.named_parameters() if name != "2.bias"]
    trainer = EGGROLLTrainer(parameters, model, population_size=8, distributed=True)
    metrics = []
    for _ in range(2):
        population = trainer.ask()
        metrics.append(trainer.tell(fitness_of(population)))
    return {"parameters": dict(model.state_dict()), "metrics": metrics, "seed": trainer.seed}


def test_all_start_as_the_first_and_a_seed_is_drawn_for_all(tmp_path: Path):
    first, second = in_processes(tmp_path, 2, unlike_the_first)
    assert_identical(second, first)
    assert float(first["parameters"]["1.running_mean"].abs().max()) == 0


def half_of_them(rank: int) -> Any:
    group = distributed.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match="a process group that this process belongs to"):
            trainer_of("pairs", distributed=group)
        return None
    trainer, _ = run("pairs", distributed=group)
    return run_state(trainer)


def test_a_group_of_some_processes(tmp_path: Path):
    _, one, two = in_processes(tmp_path, 3, half_of_them)
    assert_identical(one, two)
    alone, _ = run("pairs")
    for name, parameter in alone.model.state_dict().items():
        assert_close(one["parameters"][name], parameter, 1e-6)


def chunks_of_their_own(rank: int) -> Any:
    """As GPUs of different memory would have them."""
    torch.manual_seed(0)
    found = []
    for chunk_size in ("auto", (4, 64)[rank]):
        model = mlp(16, 32, 8)
        trainer = make_trainer(model, population_size=512, chunk_size=chunk_size, learning_rate=1.0, distributed=True)
        trainer._chunking._measured = (4, 64)[rank]
        x = torch.randn(5, 16)
        for _ in range(2):
            trainer.tell(-trainer.ask()(x).square().mean((1, 2)))
        found.append(run_state(trainer))
    return found


def test_chunks_may_differ(tmp_path: Path):
    first, second = in_processes(tmp_path, 2, chunks_of_their_own)
    assert_identical(second, first)


def raised(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class WordlessError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def other_model(rank: int, what: str) -> nn.Module:
    model = nn.Sequential(mlp(3, 4), nn.Linear(4, 2))
    if rank and what == "dtype":
        model.double()
    if rank and what == "frozen":
        model.append(nn.Linear(2, 2).requires_grad_(False))
    if rank and what == "buffer":
        model.register_buffer("more", torch.zeros(1))
    return model


def failing(rank: int) -> dict[str, Any]:
    """Each attempt fails in one process or in all; none may wait for ever, and all can go on afterwards."""
    found: dict[str, Any] = {}
    trainer = trainer_of("pairs", distributed=True)
    before = run_state(trainer)

    def bad(population: Population) -> Tensor:
        if rank == 1:
            raise LookupError("no such level")
        return fitness_of(population)

    trainer.population_fitness_fn = bad
    found["a score"] = raised(trainer.step)
    trainer.population_fitness_fn = lambda population: fitness_of(population)[rank:]
    found["the shape"] = raised(trainer.step)
    trainer.population_fitness_fn = lambda population: (
        fitness_of(population).log() if rank else fitness_of(population)
    )
    found["nan"] = raised(trainer.step)
    if rank == 0:
        trainer.ask()
    found["no ask"] = raised(
        lambda: trainer.tell([0.0] * len(trainer.ask().members)) if rank == 0 else trainer.tell([])
    )
    trainer._abandon()
    assert_identical(run_state(trainer), before)
    trainer.population_fitness_fn = fitness_of
    trainer.step()
    found["afterwards"] = run_state(trainer)

    def fails(error: BaseException) -> Callable[[Population], Tensor]:
        def score(population: Population) -> Tensor:
            if rank == 1:
                raise error
            return fitness_of(population)

        return score

    for name, error in {"Ctrl-C": KeyboardInterrupt(), "exit": SystemExit(3)}.items():
        trainer.population_fitness_fn = fails(error)
        found[name] = raised(trainer.step)
    trainer.population_fitness_fn = fails(WordlessError())
    try:
        trainer.step()
    except Exception as problem:
        found["no words"] = type(problem).__name__ if rank else str(problem)
    trainer.population_fitness_fn = fitness_of

    def shaping(fitness: Tensor) -> Tensor:
        if rank == 1:
            raise MemoryError("no room")
        return fitness

    with_shaping = trainer_of("pairs", distributed=True, fitness_shaping=shaping)
    found["shaping"] = raised(with_shaping.step)
    found["generation after"] = with_shaping.generation

    def differing(change: Callable[[Any], None]) -> str:
        changed = trainer_of("pairs", distributed=True)
        if rank == 1:
            change(changed)
        return raised(changed.step)

    found["generation"] = differing(lambda changed: setattr(changed, "generation", 1))
    found["sigma"] = differing(lambda changed: setattr(changed, "sigma", 0.5))
    found["lr"] = differing(lambda changed: setattr(changed, "learning_rate", 0.5))
    found["bad lr"] = differing(lambda changed: changed.param_groups[0].update(lr=-1.0))
    found["frozen"] = differing(lambda changed: changed.model[0].weight.requires_grad_(False))
    found["nonfinite"] = differing(lambda changed: setattr(changed, "nonfinite", "worst"))
    found["unused"] = differing(lambda changed: setattr(changed, "unused", "ignore"))
    found["fused"] = differing(lambda changed: setattr(changed, "fused", True))
    changed = trainer_of("pairs", distributed=True)
    scores = [0.0] * len(changed.ask())
    found["calls"] = raised(lambda: changed.step() if rank == 0 else changed.tell(scores))
    found["seed"] = raised(lambda: trainer_of("pairs", distributed=True, seed=rank))
    found["some seed"] = raised(lambda: trainer_of("pairs", distributed=True, seed=3 if rank else None))
    found["device"] = raised(lambda: trainer_of("pairs", distributed=True, device="cuda:77" if rank else None))
    found["bad sigma"] = raised(lambda: trainer_of("pairs", distributed=True, sigma=-1.0 if rank else 0.1))
    for what in ("dtype", "frozen", "buffer"):
        found[f"model: {what}"] = raised(lambda what=what: make_trainer(other_model(rank, what), distributed=True))
    found["rank"] = raised(lambda: trainer_of("pairs", distributed=True, rank=1 + rank))
    found["too few"] = raised(lambda: trainer_of("pairs", distributed=True, population_size=2))
    found["kind"] = raised(lambda: trainer_of("pairs", distributed="yes"))
    return found


def test_what_fails_in_one_process_fails_in_all(tmp_path: Path):
    first, second = in_processes(tmp_path, 2, failing)
    assert second["a score"] == "LookupError: no such level"
    assert first["a score"] == "RuntimeError: process 1 of 2 failed with LookupError: no such level"
    assert second["the shape"] == "ValueError: `fitness` has 5 values but the population has 6 members"
    assert first["the shape"] == f"RuntimeError: process 1 of 2 failed with {second['the shape']}"
    assert first["nan"] == second["nan"]
    assert "it is not for members 4, 5, 6, 7, 8, 9" in first["nan"]
    assert "none is open" in second["no ask"]
    assert first["no ask"] == f"RuntimeError: process 1 of 2 failed with {second['no ask']}"
    assert_identical(second["afterwards"], first["afterwards"])
    alone, _ = run("pairs", generations=1)
    assert_close(first["afterwards"]["parameters"]["0.weight"], alone.model.state_dict()["0.weight"], 1e-6)
    for found in (first, second):
        assert found["generation"] == "ValueError: `generation` must be the same in every process, got 0, 1"
        assert found["seed"] == "ValueError: `seed` must be the same in every process, got [0, 0], [0, 1]"
        assert found["some seed"] == "ValueError: `seed` must be the same in every process, got None, [0, 3]"
        assert found["sigma"] == "ValueError: `sigma` must be the same in every process, got 0.1, 0.5"
        assert found["lr"].startswith("ValueError: `param_groups` must be the same in every process")
        assert found["frozen"].startswith("ValueError: `trained parameters` must be the same in every process")
        assert found["nonfinite"] == "ValueError: `nonfinite` must be the same in every process, got 'raise', 'worst'"
        assert found["unused"] == "ValueError: `unused` must be the same in every process, got 'raise', 'ignore'"
        assert found["fused"] == "ValueError: `fused` must be the same in every process, got False, True"
        assert found["calls"] == "RuntimeError: the processes must make the same calls, they make step(), tell()"
        for what in ("dtype", "frozen", "buffer"):
            assert found[f"model: {what}"].startswith("ValueError: `model` must be the same in every process"), what
        assert found["generation after"] == 0
        assert found["rank"] == "ValueError: `rank` must be the same in every process, got 1, 2"
        assert found["too few"] == "ValueError: `population_size` must be at least 4 for 2 processes, got 2"
        assert found["kind"].startswith("TypeError: `distributed` must be a bool or a torch.distributed.ProcessGroup")
    for what in ("Ctrl-C", "exit", "shaping", "bad lr", "device", "bad sigma"):
        assert second[what] != "nothing"
        assert first[what] == f"RuntimeError: process 1 of 2 failed with {second[what].removesuffix(': ')}", what
    assert (first["no words"], second["no words"]) == ("process 1 of 2 failed with WordlessError", "WordlessError")


def interrupted(rank: int, folder: Path) -> Any:
    """Ctrl-C in a terminal reaches all processes, one of them while it waits for the other."""
    trainer = trainer_of("pairs", distributed=True)
    before = run_state(trainer)

    def score(population: Population) -> Tensor:
        if rank == 1:
            time.sleep(3)
            os.kill(int((folder / "0.pid").read_text()), signal.SIGINT)
            time.sleep(1)
            raise KeyboardInterrupt
        return fitness_of(population)

    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    distributed.barrier()
    trainer.population_fitness_fn = score
    found = raised(trainer.step)
    assert_identical(run_state(trainer), before)
    distributed.barrier()  # as to save what there is
    trainer.population_fitness_fn = fitness_of
    trainer.step()
    return found, run_state(trainer)


def test_ctrl_c_in_all_of_them(tmp_path: Path):
    (first, state), (second, same) = in_processes(tmp_path, 2, functools.partial(interrupted, folder=tmp_path))
    assert first == second == "KeyboardInterrupt: "
    assert_identical(state, same)


def pickled_on_a_group(rank: int) -> str:
    trainer = trainer_of("pairs", distributed=distributed.new_group([0, 1]))
    return raised(lambda: pickle.dumps(trainer))


def test_a_group_of_its_own_cannot_be_pickled(tmp_path: Path):
    for found in in_processes(tmp_path, 2, pickled_on_a_group):
        assert "process group other than the default one cannot be pickled" in found


class Either(nn.Module):
    """Uses one layer or the other, as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        return self.left(x) if left else self.right(x)


def one_layer_each(rank: int) -> Any:
    torch.manual_seed(0)
    model = Either()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = make_trainer(model, distributed=True)
    trainer.tell(-trainer.ask()(X, left=rank == 0).square().mean((1, 2)))
    assert not any(torch.equal(*pair) for pair in zip(start, model.parameters(), strict=True))
    trainer = make_trainer(Either(), distributed=True)
    population = trainer.ask()
    scores = torch.linspace(-1, 1, len(population))
    if rank == 0:  # the other one has seen no forward pass at all
        population(X, left=True)
    return dict(model.state_dict()), raised(lambda: trainer.tell(scores))


def test_a_parameter_that_another_process_used_was_used(tmp_path: Path):
    (first, unused), (second, same) = in_processes(tmp_path, 2, one_layer_each)
    assert_identical(second, first)
    assert unused == same
    assert "'right.bias', 'right.weight' did not" in unused


def resumed(rank: int, saved: Any) -> Any:
    state, model = copy.deepcopy(saved)  # what is handed to processes is in memory that they share
    trainer = trainer_of("one by one", distributed=True)
    trainer.model.load_state_dict(model)
    trainer.load_state_dict(state)
    trainer.step()
    return run_state(trainer)


def test_a_run_goes_on_on_other_processes(tmp_path: Path):
    """A run of one process, resumed on two."""
    trainer, _ = run("one by one")
    saved = trainer.state_dict(), trainer.model.state_dict()
    first, second = in_processes(tmp_path, 2, functools.partial(resumed, saved=saved))
    assert_identical(second, first)
    trainer.step()
    for name, parameter in trainer.model.state_dict().items():
        assert_close(first["parameters"][name], parameter, 1e-6)


def outlives_its_group(rank: int) -> Any:
    own = distributed.new_group([0, 1])
    trainers = [run("pairs", distributed=group)[0] for group in (True, own)]
    groups = [weakref.ref(group) for group in (distributed.group.WORLD, own)]
    del own
    distributed.destroy_process_group()
    return {
        "alive": [group() is not None for group in groups],
        "raised": [raised(trainer.step) for trainer in trainers],
        "generations": [trainer.state_dict()["generation"] for trainer in trainers],
        "pickled": raised(lambda: pickle.dumps(trainers[0])),
    }


def test_a_trainer_does_not_keep_the_group_alive(tmp_path: Path):
    """A process that ends while gloo's threads run aborts now and then."""
    for found in in_processes(tmp_path, 2, outlives_its_group):
        assert found["alive"] == [False, False]
        for error in found["raised"]:
            assert "RuntimeError: the process group of this trainer has been destroyed" in error
        assert found["generations"] == [3, 3]
        assert found["pickled"] == "nothing"


def progress(rank: int) -> str:
    import io

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of("pairs", distributed=True).train(2)
    return shown.getvalue()


def test_the_first_process_shows_progress(tmp_path: Path):
    first, second = in_processes(tmp_path, 2, progress)
    assert "2/2" in first
    assert second == ""


def test_without_a_process_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"`distributed` needs torch\.distributed\.init_process_group"):
        make_trainer(distributed=True)


DOCUMENTATION = Path(__file__).parents[2] / "docs" / "torch.md"


@pytest.mark.skipif(not DOCUMENTATION.exists(), reason="the documentation is not part of the wheel")
def test_the_script_of_the_documentation(tmp_path: Path):
    (script,) = re.findall(r"^```python\n(# torchrun .*?)^```", DOCUMENTATION.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "20/20" in done.stderr
