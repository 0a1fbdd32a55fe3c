"""What every evolution strategies trainer shares: the generation loop around a `torch.optim` optimizer."""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll.config import as_bool, as_int, as_positive_float

from . import threefry
from .chunking import Chunking, ChunkSize
from .compiling import Compile, Compiler
from .fitness import Nonfinite, as_finite, as_fitness, member_fitness
from .forward import Randomness
from .groups import (
    OptimizerFactory,
    as_group,
    as_groups,
    check_factory,
    check_lr,
    flatten_groups,
    made_by,
    options_of,
)
from .interrupts import uninterrupted
from .member_weights import MemberWeights
from .parameters import base_key_of, fresh_seed, named_trainable
from .population import Population
from .processes import Processes, check_same
from .settings import Setting, one_of
from .swap import HeldTensors, check_is_itself

__all__ = ["FitnessFn", "PopulationFitnessFn", "Trainer"]

FitnessFn = Callable[[nn.Module], float]
PopulationFitnessFn = Callable[[Population], Tensor]

# What is folded into the key of a run for the randomness that is not noise: as a word 2**32 - 1, which is the index
# of no parameter.
_RANDOMNESS = -1


class Trainer(torch.optim.Optimizer):
    """The generation loop: `ask` for a population, score it, `tell` the fitness, let the optimizer step.

    It is a `torch.optim.Optimizer`, so learning-rate schedulers take it; its `param_groups` and `state` are those of
    `optimizer`, the real one inside, which descends the direction found in `.grad`.

    Attributes:
        model: the model being trained.
        optimizer: the `torch.optim` optimizer that takes the step.
        generation: generations finished.
        best_fitness: the best fitness of any member so far, ``-inf`` before the first generation.
        fitness_history: the mean fitness of each finished generation.
    """

    # Arguments that may be others in the next generation.
    nonfinite = Setting[Nonfinite](one_of("raise", "worst"))
    randomness = Setting[Randomness](one_of("different", "same"))

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        *,
        fitness_fn: FitnessFn | None,
        population_fitness_fn: PopulationFitnessFn | None,
        population_size: int,
        learning_rate: float,
        optimizer: OptimizerFactory,
        device: torch.device | str | None,
        seed: int | Sequence[int] | Tensor | None,
        chunk_size: ChunkSize,
        compile: Compile,
        nonfinite: Nonfinite,
        randomness: Randomness,
        snapshots: bool,
        processes: Processes,
    ):
        self._processes = processes
        # In parts: what goes wrong in one process goes wrong in all of them, and none waits for another.
        with processes.together("the constructor"):
            if not isinstance(model, nn.Module):
                raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
            _check_callable("fitness_fn", fitness_fn)
            _check_callable("population_fitness_fn", population_fitness_fn)
            if fitness_fn is not None and population_fitness_fn is not None:
                raise ValueError("give `fitness_fn` or `population_fitness_fn`, not both")
            learning_rate = as_positive_float("learning_rate", learning_rate)
            self._population_size = as_int("population_size", population_size, 2)
            self._chunking = Chunking(chunk_size)
            self._compiler = Compiler(compile)
            self.nonfinite = nonfinite
            self.randomness = randomness
            self._snapshots = as_bool("snapshots", snapshots)
            check_factory(optimizer)
            processes.share(self._population_size, self._members_per_draw)
            self._seed = fresh_seed() if seed is None else seed
            self._base_key = base_key_of(self._seed)
            self.model = model
            self.fitness_fn = fitness_fn
            self.population_fitness_fn = population_fitness_fn
            self.generation = 0
            self.best_fitness = -math.inf
            self.fitness_history: list[float] = []
            self._best_state: dict[str, Tensor] | None = None
            self._population: Population | None = None
            self._ready = False
            super().__init__(as_groups(params), {"lr": learning_rate})
            self._trainable = named_trainable(model, flatten_groups(self.param_groups))
            self.optimizer = made_by(optimizer, self.param_groups, learning_rate)
            self._check_group_options(self.optimizer.param_groups)
            self._check_optimizer(self.optimizer.param_groups)
            self.param_groups = self.optimizer.param_groups
            self.state = self.optimizer.state
            self.defaults = self.optimizer.defaults
            if device is not None:
                model.to(_as_device(device))
        processes.same(seed=None if seed is None else self._base_key.tolist(), **self._hyperparameters())
        seed_of_first, *_ = processes.of_all("the constructor", lambda: self.seed)
        if seed is None:
            self._seed, self._base_key = seed_of_first, base_key_of(seed_of_first)
        processes.copy_first_(model)
        with processes.together("the constructor"):
            self._initial_options = [options_of(group) for group in self.param_groups]
            self._initial_parameters = self._copy_of_parameters() if self.snapshots else {}
            self._initial_sigma = self.sigma
            self._parameters_changed()
            self._ready = True

    # What a kind of evolution strategy defines.

    sigma: float
    """The scale of the perturbation, which may be set between generations."""

    def _parameters_changed(self) -> None:
        """Called when the trained parameters or the key are others than before."""

    @property
    def _group_options(self) -> tuple[str, ...]:
        """Options of parameter groups besides the optimizer's."""
        return ()

    def _check_optimizer(self, groups: Iterable[dict[str, Any]]) -> None:
        """Raises where the optimizer, with such groups, cannot be used."""

    def _member_weights(self) -> MemberWeights:
        """The weights of the members of the current generation."""
        raise NotImplementedError

    def _directions(self, weights: MemberWeights, fitness: Tensor) -> dict[str, Tensor]:
        """The direction to descend, by parameter name, from float64 fitness of shape ``(population_size,)``."""
        raise NotImplementedError

    def _update(self, weights: MemberWeights, fitness: Tensor) -> Callable[[], None]:
        """What takes the step. All that the caller's input can make fail has been done when it is returned."""
        return functools.partial(self._descend, self._directions(weights, fitness))

    def _hyperparameters(self) -> dict[str, Any]:
        """What has to be equal for a saved run to go on as the same run."""
        return {
            "trainer": type(self).__name__,
            "optimizer": type(self.optimizer).__name__,
            "population_size": self.population_size,
            "randomness": self.randomness,
        }

    @property
    def _members_per_draw(self) -> int:
        """A process evaluates whole multiples of this."""
        return 1

    def _settings(self) -> dict[str, Any]:
        """What has to be equal in all processes, now, for them to take the same step."""
        return {
            "generation": self.generation,
            "sigma": self.sigma,
            "nonfinite": self.nonfinite,
            "snapshots": self.snapshots,
            "trained parameters": list(self._trainable),
            "param_groups": [
                {name: repr(value) for name, value in group.items() if name not in {"params", "param_names"}}
                for group in self.param_groups
            ],
        }

    def _observed(self) -> Any:
        """What the other processes have to know of what was seen in this one's forward passes."""
        return None

    def _learn(self, observed: list[Any]) -> None:
        """Takes note of what was `_observed` in every process."""

    # The generation.

    def ask(self) -> Population:
        """The population of the current generation; the same one until `tell` has finished it.

        With `distributed` it is this process's share of it, and ``population.members`` says which members these are.
        """
        if self._population is None:
            self._check_optimizer(self.param_groups)
            self._train(named_trainable(self.model, flatten_groups(self.param_groups)))
            self._population = Population(
                self.model,
                self._member_weights(),
                self._processes.share(self.population_size, self._members_per_draw),
                self._chunking,
                self.randomness,
                self._compiler,
            )
        return self._population

    def tell(self, fitness: Any) -> dict[str, float]:
        """Finishes the generation of the last `ask`: shapes the fitness, sets `.grad`, lets the optimizer step.

        Args:
            fitness: floating point, shape ``(len(population),)`` for the population of `ask`, higher is better: a
                tensor, an array, or a list.

        Returns:
            Metrics: ``generation`` (finished so far), ``mean_fitness``, ``std_fitness`` and ``max_fitness`` of this
            generation, ``best_fitness`` of any member so far.

        Raises:
            RuntimeError: without `ask`.
            TypeError, ValueError: a fitness of another shape or dtype, or not finite. The generation stays open, and
                parameters, optimizer and generation are as before. With `distributed` a RuntimeError where another
                process raises.
        """
        check_is_itself(self.model, "tell()")
        gathered = self._fitness_of_all(fitness)
        population = self._population
        assert population is not None
        with self._processes.together("tell()"):
            scores = as_finite(gathered, self.nonfinite)
            update = self._update(population.weights, scores)
            best = int(scores.argmax())
            highest, mean = float(scores[best]), float(scores.mean())
            better = highest > self.best_fitness
            best_state = population.weights.materialise(best) if better and self.snapshots else self._best_state
        with uninterrupted():
            update()
            # Schedulers ask whether an optimizer has stepped, which tell() does without step().
            self._opt_called = self.optimizer._opt_called = True  # type: ignore[attr-defined]
            self.best_fitness = max(self.best_fitness, highest)
            self._best_state = best_state
            self.generation += 1
            self.fitness_history.append(mean)
            self._population = None
            population.close()
        return {
            "generation": self.generation,
            "mean_fitness": mean,
            "std_fitness": float(scores.std(correction=0)),
            "max_fitness": highest,
            "best_fitness": self.best_fitness,
        }

    def step(self, closure: None = None) -> dict[str, float]:  # type: ignore[override]
        """One generation, scored with `fitness_fn` or `population_fitness_fn`. Returns the metrics of `tell`.

        If scoring raises or is interrupted, nothing has changed and the next call evaluates the same generation.
        """
        if closure is not None:
            raise TypeError("`closure` must be None: members are scored by `fitness_fn` or `population_fitness_fn`")
        if self.fitness_fn is None and self.population_fitness_fn is None:
            raise RuntimeError(
                "step() needs a `fitness_fn` or a `population_fitness_fn`; without one, ask() and tell()"
            )
        already_open = self._population is not None
        try:
            with self._processes.together("step()"):
                fitness = self._score()
            return self.tell(fitness)
        except BaseException:
            if not already_open:
                self._abandon()
            raise

    def _score(self) -> Any:
        population = self.ask()
        if self.fitness_fn is not None:
            return population.evaluate(functools.partial(member_fitness, self.fitness_fn))
        assert self.population_fitness_fn is not None
        return self.population_fitness_fn(population)

    def _fitness_of_all(self, fitness: Any) -> Tensor:
        """The fitness of all members, float64 on the CPU, from that of this process's."""

        def of_this_process() -> tuple[dict[str, Any], Tensor, Any]:
            if self._population is None:
                raise RuntimeError("tell() finishes the generation of an ask(), and none is open")
            scores = as_fitness(fitness, len(self._population))
            for group in self.param_groups:
                check_lr(group["lr"])
            return self._settings() if self._processes.count > 1 else {}, scores, self._observed()

        told = self._processes.of_all("tell()", of_this_process)
        settings, scores, observed = (list(parts) for parts in zip(*told, strict=True))
        check_same(settings)
        self._learn(observed)
        return torch.cat(scores) if len(scores) > 1 else scores[0]

    def train(self, num_generations: int, verbose: bool = True) -> dict[str, Any]:
        """Runs generations.

        Args:
            num_generations: how many.
            verbose: show a progress bar with the mean and the best fitness, in the first process.

        Returns:
            ``generation`` (finished in all), ``best_fitness`` and ``fitness_history`` (means of all generations).
        """
        from tqdm.auto import tqdm

        num_generations = as_int("num_generations", num_generations, 0)
        with tqdm(
            total=num_generations,
            disable=not verbose or self._processes.rank > 0,
            unit="gen",
            desc=type(self).__name__.removesuffix("Trainer"),
        ) as bar:
            for _ in range(num_generations):
                metrics = self.step()
                bar.set_postfix(mean=f"{metrics['mean_fitness']:.4g}", best=f"{metrics['best_fitness']:.4g}")
                bar.update()
        return {
            "generation": self.generation,
            "best_fitness": self.best_fitness,
            "fitness_history": list(self.fitness_history),
        }

    def get_best_model(self) -> nn.Module:
        """A copy of the model with the weights of the best member seen; the current model before any generation.

        Raises:
            RuntimeError: the trainer keeps no `snapshots`; before any generation, the model is a member.
        """
        self._check_snapshots("get_best_model")
        if self._best_state is None:
            check_is_itself(self.model, "get_best_model() before any generation")
        # PyTorch copies no tensors with a history, such as what pruning has computed a weight to.
        computed = [tensor for tensor in HeldTensors(self.model).attributes.values() if not tensor.is_leaf]
        best = copy.deepcopy(self.model, {id(tensor): tensor.detach().clone() for tensor in computed})
        if self._best_state is not None:
            with torch.no_grad():
                for name, parameter in best.named_parameters():
                    if name in self._best_state:
                        parameter.copy_(self._best_state[name])
        return best

    def reset(self) -> None:
        """Back to the start: no optimizer state, no history, and parameters, learning rates and sigma as this trainer
        was made with them. After `load_state_dict`, too: a saved state does not hold those that it began with.

        Raises:
            RuntimeError: the trainer keeps no `snapshots`.
        """
        self._check_snapshots("reset")
        check_is_itself(self.model, "reset()")
        with uninterrupted():
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in self._initial_parameters:  # it may have been frozen since
                        parameter.copy_(self._initial_parameters[name])
                        parameter.grad = None
            self.optimizer.state.clear()
            for group, options in zip(self.param_groups, self._initial_options, strict=True):
                group.update(copy.deepcopy(options))
            self.sigma = self._initial_sigma
            self._abandon()
            self._best_state = None
            self.generation = 0
            self.best_fitness = -math.inf
            self.fitness_history = []

    @property
    def seed(self) -> int | Sequence[int] | Tensor:
        """The seed of the run, an int or a key of two words."""
        return self._seed

    @property
    def snapshots(self) -> bool:
        """Whether the initial parameters and those of the best member are kept."""
        return self._snapshots

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._trainable.values())).device

    @property
    def chunk_size(self) -> ChunkSize:
        """Members that are evaluated at a time; None for all."""
        return self._chunking.requested

    @property
    def population_size(self) -> int:
        """Members in one generation."""
        return self._population_size

    # What belongs to an optimizer.

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group; setting it sets all groups."""
        return float(self.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        value = as_positive_float("learning_rate", value)
        for group in self.param_groups:
            group["lr"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the model to those that are trained, between two generations."""
        if not self._ready:
            super().add_param_group(param_group)
            return
        if self._population is not None:
            raise RuntimeError("add_param_group() between two generations only: finish the open one with tell()")
        group = as_group(param_group)
        added = [given[1] if isinstance(given, tuple) else given for given in group["params"]]  # may come with names
        trainable = named_trainable(self.model, [*flatten_groups(self.param_groups), *added])
        self._check_group_options([{**self.optimizer.defaults, **group}])
        self._check_optimizer([{**self.optimizer.defaults, **group}])
        self.optimizer.add_param_group(group)
        try:
            self._train(trainable)
        except (TypeError, ValueError):  # its options are wrong: the group was never there
            self.param_groups.pop()
            self._train(named_trainable(self.model, flatten_groups(self.param_groups)))
            raise
        self._initial_options.append(options_of(self.param_groups[-1]))

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on to the bit, apart from the model's own `state_dict`.

        It may be taken at any time: an open generation will be evaluated again. As with any optimizer, its tensors
        are those of the run: copy what has to outlast the next step.
        """
        return {
            "hyperparameters": self._hyperparameters(),
            "parameters": _shapes(self._trainable),
            "sigma": self.sigma,
            "key": self._base_key.to(torch.int64).tolist(),
            "generation": self.generation,
            "best_fitness": self.best_fitness,
            "best_state": None if self._best_state is None else dict(self._best_state),
            "fitness_history": list(self.fitness_history),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; load the model's own `state_dict` into the model as well.

        Raises:
            TypeError, ValueError: it was saved by a run with other hyperparameters or parameters, or is no saved run.
                Nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"`state_dict` must be what state_dict() returned, got {state_dict!r:.80}")
        if set(state_dict) != (expected := set(self.state_dict())):
            got = sorted(state_dict, key=str)
            raise ValueError(f"`state_dict` must have the keys {sorted(expected)}, got {got}")
        # Some may have been frozen, or need a gradient again, since the last ask().
        trainable = named_trainable(self.model, flatten_groups(self.param_groups))
        here = {"hyperparameters": self._hyperparameters(), "parameters": _shapes(trainable)}
        for what, ours in here.items():
            saved = state_dict[what]
            for name in sorted({*saved, *ours}):
                if saved.get(name, "none") != ours.get(name, "none"):
                    raise ValueError(
                        f"`state_dict` is of a run with other {what}: {name} is {saved.get(name, 'none')!r} there "
                        f"and {ours.get(name, 'none')!r} here"
                    )
        # All that may be wrong is read before anything changes.
        seed, sigma = list(state_dict["key"]), as_positive_float("sigma", state_dict["sigma"])
        base_key, generation = base_key_of(seed), as_int("generation", state_dict["generation"], 0)
        best_state, fitness_history = state_dict["best_state"], list(state_dict["fitness_history"])
        if self.snapshots and best_state is None and generation > 0:
            raise ValueError("`state_dict` holds no best member: it was saved with `snapshots` False, got True here")
        kept = None
        if self.snapshots and best_state is not None:
            kept = {name: tensor.to(self.device) for name, tensor in best_state.items()}
        self._check_optimizer(state_dict["optimizer"]["param_groups"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self._abandon()
        self._train(trainable)
        self._base_key = base_key
        self._seed = seed
        self.sigma = sigma
        self.generation = generation
        self.best_fitness = state_dict["best_fitness"]
        self._best_state = kept
        self.fitness_history = fitness_history
        self._parameters_changed()

    def __getstate__(self) -> dict[str, Any]:
        check_is_itself(self.model, "a copy of the trainer")
        # A learning-rate scheduler wraps `step` of the object that it was given, not of its copies. A copy evaluates
        # an open generation again. PyTorch does not read back the unsigned integers that it pickles.
        state = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**state, "_population": None, "_base_key": self._base_key.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._base_key = base_key_of(state["_base_key"])
        self._parameters_changed()

    # Helpers.

    def _randomness_key(self) -> Tensor:
        """The key of what is random in this generation besides the noise, int32 on the CPU."""
        key = threefry.folded(threefry.folded(self._base_key.numpy()[None], _RANDOMNESS), self.generation)
        return torch.from_numpy(key.view(np.int32)[0])

    def _descend(self, directions: dict[str, Tensor]) -> None:
        """Sets `.grad` of what was perturbed, clears that of the rest, and steps."""
        with self._gradients_cleared():
            for name, found in directions.items():
                self._trainable[name].grad = found.to(self._trainable[name].dtype)
            self.optimizer.step()

    @contextlib.contextmanager
    def _gradients_cleared(self) -> Iterator[None]:
        """A context for a step, which begins without gradients; if it raises they are what they were."""
        before = [(parameter, parameter.grad) for parameter in flatten_groups(self.param_groups)]
        try:
            for parameter, _ in before:
                parameter.grad = None
            yield
        except BaseException:
            for parameter, gradient in before:
                parameter.grad = gradient
            raise

    def _copy_of_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trainable.items()}

    def _check_snapshots(self, method: str) -> None:
        if not self.snapshots:
            raise RuntimeError(f"{method}() needs a trainer with `snapshots` True, this one has False")

    def _train(self, trainable: dict[str, nn.Parameter]) -> None:
        """Trains these parameters from now on: some were added, frozen, or need a gradient again."""
        if trainable.keys() == self._trainable.keys():
            return
        self._trainable = trainable
        now = self._copy_of_parameters() if self.snapshots else {}
        self._initial_parameters = {**now, **self._initial_parameters}
        if self._best_state is not None:
            self._best_state = {**now, **self._best_state}
        self._parameters_changed()

    def _abandon(self) -> None:
        """Leaves the open generation, if any, unfinished."""
        if self._population is not None:
            self._population.close()
        self._population = None

    def _check_group_options(self, groups: Iterable[dict[str, Any]]) -> None:
        known = {"params", "param_names", "initial_lr", *self._group_options, *self.optimizer.defaults}
        for group in groups:
            if unknown := set(group) - known:
                raise ValueError(
                    f"`params` groups may have the options {sorted(known - {'param_names', 'initial_lr'})}, "
                    f"got {sorted(unknown, key=str)}"
                )
            check_lr(group["lr"])


def _shapes(parameters: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in parameters.items()}


def _as_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"`device` must be a device of PyTorch, got {device!r}: {error}") from None


def _check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be callable, got {value!r}")
