"""`EGGROLLTrainer`: trains a `torch.nn.Module` with low-rank evolution strategies."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eggroll import EggrollConfig
from eggroll.config import as_bool, as_positive_float

from . import kernels, update
from .base import FitnessFn, PopulationFitnessFn, Trainer
from .choices import OPTIONS, choices_by_name
from .chunking import Chunking, ChunkSize, chunk_ranges
from .compiling import Compile
from .estimate import estimate
from .fitness import Nonfinite, shaped_weights
from .forward import Randomness
from .groups import OptimizerFactory
from .member_weights import MemberWeights
from .memory import MemoryEstimate
from .noise import NoiseSource
from .parameters import ParameterNoise, circumstances, describe_parameters, model_keys
from .policy import Policy
from .population import Population
from .processes import Distributed, Processes
from .settings import Setting, one_of
from .sgd import check_plain_sgd, plain_sgd_steps
from .weights import EggrollWeights

__all__ = ["EGGROLLTrainer"]


class EGGROLLTrainer(Trainer):
    """Trains a model by EGGROLL (arXiv 2511.16652): no gradients, a score is enough.

    A generation evaluates `population_size` members, the model under low-rank perturbations of its matrices and dense
    ones of everything else, and hands the direction ``-sqrt(N) * mean(w * E)`` to a `torch.optim` optimizer. With
    z-scored fitness the RMS step of plain SGD is about ``learning_rate * sigma``, whatever population and rank: that
    is the rule for choosing a learning rate.

    Args:
        params: the model's parameters to train, or parameter groups, as for `torch.optim`. Those that require no
            gradient are left alone.
        model: the model.
        fitness_fn: scores one member: called with the model, whose weights are that member's for the call, returns a
            number, higher is better.
        population_size: members in one generation.
        learning_rate: the optimizer's, positive.
        sigma: scale of the perturbation, positive. May be set between generations: ``trainer.sigma = 0.05``.
        rank: rank of a matrix's perturbation.
        noise_reuse: evaluations of each draw: 0 or 1 for independent members, 2 for antithetic pairs.
        group_size: how many consecutive members have their fitness normalised together; 0: all.
        freeze_nonlora: train only what gets low-rank noise: biases and other vectors stay as they are.
        device: moves the model there first; by default it stays where it is.
        seed: an int or a key of two words; by default drawn from PyTorch's global generator. The same seed gives the
            same run on every machine and with every `chunk_size`.
        population_fitness_fn: scores all members in one call: called with a `Population`, returns a floating-point
            tensor of shape ``(len(population),)``.
        antithetic: whether members ``2 i`` and ``2 i + 1`` share a draw with opposite signs; by default as
            `noise_reuse` says.
        noise_lifetime: for how many generations the same noise is used; None: for ever.
        fitness_shaping: ``"zscore"``, ``"group_zscore"``, ``"centered_rank"``, ``"sign"``, ``"baseline"``, ``"raw"``
            or a callable from float64 fitness to weights, both of shape ``(population_size,)``.
        gradient_scale: ``"reference"``, or ``"unbiased"`` for the evolution strategies estimate of the gradient.
        noise_dtype: ``"float32"``, or ``"param"`` to draw in each parameter's dtype as the reference does.
        rng: the generator of the noise, ``"threefry"``, or ``"philox"``, which is cheaper on a GPU and draws other
            numbers, so that it is another run. What is random in the model is Threefry's either way.
        optimizer: makes the optimizer, called with parameter groups and ``lr``: a class of `torch.optim` or a
            `functools.partial` of one.
        fused: whether the step is taken where the direction is summed: parameters are added to in place, no direction
            is ever in memory and ``.grad`` is None. `optimizer` has to be `torch.optim.SGD` without momentum (weight
            decay and `maximize` are fine); its own ``step``, and with it hooks on it, is not called. Parameters agree
            with those of a run without it to rounding. An error within the step, such as of memory that has run out,
            leaves it half taken.
        chunk_size: members that are evaluated at a time; all by default. ``"auto"`` measures the first members and
            takes as many as fit the device's free memory. Does not change the result.
        compile: whether a population's forward pass is compiled: PyTorch's operations are recorded in the second call
            of a kind, and `torch.compile` makes a program of them. True, or options of `torch.compile` by name:
            ``{"backend": "eager"}`` runs the record as it is, and gives the numbers of a pass that is not compiled.
            Python in the model does not run again.
        nonfinite: ``"raise"`` an error that names the members whose fitness is NaN or infinite, or score them as the
            ``"worst"`` finite member.
        randomness: what is random in the model, such as dropout, is ``"different"`` for each member or the ``"same"``
            in all; either way it follows from `seed`.
        snapshots: whether to keep the initial parameters, for `reset`, and those of the best member, for
            `get_best_model`: twice the memory of the parameters. Without them these methods raise.
        distributed: whether the processes of `torch.distributed`'s default group, or of the group given here, each
            evaluate a share of the members, on the same data: fitness is compared across processes. Parameters and
            buffers start as the first process's; then nothing but fitness travels, and every process takes the same
            step by itself.
        noise: how single parameters are perturbed, by name pattern (as in `fnmatch`; the first that fits counts):
            ``"low_rank"``, ``"dense"``, ``"frozen"``, or a mapping with any of ``noise`` (one of these), ``rank`` and
            ``sigma``: ``{"head.*": "dense", "*.weight": {"rank": 4, "sigma": 0.02}}``. Parameter groups take the same
            options. By default matrices, convolutions, embeddings and stacks of matrices are low rank, others dense.
        unused: ``"raise"`` an error that names the parameters that no member used in a generation, before anything is
            updated, or ``"ignore"`` them: they stay as they are.
        strict: whether it is an error if an operation has no low-rank rule or the model cannot be vectorised. By
            default the weight of each member of a chunk is then formed, or members run one by one, with a warning.

    Example:
        >>> import torch
        >>> from eggroll.torch import EGGROLLTrainer
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> target = torch.tensor([[1.0, -1.0]])
        >>> def fitness_fn(model):
        ...     return -(model.weight - target).square().sum().item()
        >>> trainer = EGGROLLTrainer(
        ...     model.parameters(), model=model, fitness_fn=fitness_fn, noise_reuse=2, learning_rate=0.3, seed=0
        ... )
        >>> history = trainer.train(100, verbose=False)
        >>> bool((model.weight - target).abs().max() < 0.1)
        True
    """

    # Arguments that may be others in the next generation.
    unused = Setting[Literal["raise", "ignore"]](one_of("raise", "ignore"))
    fused = Setting[bool](as_bool)

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        fitness_fn: FitnessFn | None = None,
        population_size: int = 256,
        learning_rate: float = 0.01,
        sigma: float = 0.1,
        rank: int = 1,
        noise_reuse: int = 0,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        device: torch.device | str | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        *,
        population_fitness_fn: PopulationFitnessFn | None = None,
        antithetic: bool | None = None,
        noise_lifetime: int | None = 1,
        fitness_shaping: str | Callable[[Tensor], Tensor] = "zscore",
        gradient_scale: str = "reference",
        noise_dtype: str = "float32",
        rng: str = "threefry",
        optimizer: OptimizerFactory = torch.optim.SGD,
        fused: bool = False,
        chunk_size: ChunkSize = None,
        compile: Compile = False,
        nonfinite: Nonfinite = "raise",
        randomness: Randomness = "different",
        snapshots: bool = True,
        distributed: Distributed = False,
        noise: Mapping[str, Any] | None = None,
        unused: Literal["raise", "ignore"] = "raise",
        strict: bool = False,
    ):
        processes = Processes(distributed)
        with processes.together("the constructor"):
            self.config = EggrollConfig(
                population_size=population_size,
                sigma=sigma,
                rank=rank,
                antithetic=_antithetic(noise_reuse, antithetic),
                noise_lifetime=noise_lifetime,
                fitness_shaping=fitness_shaping,
                group_size=group_size,
                freeze_nonlora=freeze_nonlora,
                gradient_scale=gradient_scale,  # type: ignore[arg-type]
                noise_dtype=noise_dtype,  # type: ignore[arg-type]
                rng=rng,  # type: ignore[arg-type]
            )
            self._policy = Policy(strict=as_bool("strict", strict))
            self.unused = unused
            if noise is not None and not isinstance(noise, Mapping):
                raise TypeError(f"`noise` must be a mapping from name patterns, got {noise!r}")
            self._patterns = None if noise is None else dict(noise)
            self.fused = fused
        super().__init__(
            params,
            model,
            fitness_fn=fitness_fn,
            population_fitness_fn=population_fitness_fn,
            population_size=population_size,
            learning_rate=learning_rate,
            optimizer=optimizer,
            device=device,
            seed=seed,
            chunk_size=chunk_size,
            compile=compile,
            nonfinite=nonfinite,
            randomness=randomness,
            snapshots=snapshots,
            processes=processes,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ARGUMENTS and self.__dict__.get("_ready") and not hasattr(self, name):
            raise AttributeError(
                f"`{name}` is an argument of the constructor that stays what it was, got {value!r}: "
                "make another trainer"
            )
        super().__setattr__(name, value)

    @property
    def sigma(self) -> float:
        """The scale of the perturbation. A change counts from the next `ask` on."""
        return self.config.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self.config = replace(self.config, sigma=as_positive_float("sigma", value))

    @property
    def rank(self) -> int:
        """The rank of a matrix's perturbation."""
        return self.config.rank

    def memory_estimate(self, *args: Any, per_member: bool = False, **kwargs: Any) -> MemoryEstimate:
        """What a generation needs, before it runs.

        Args:
            *args, **kwargs, per_member: an example of a call of the population. Its forward pass is measured on the
                first members; without arguments, what it needs is left out.
        """
        weights = self._member_weights()
        members = self._processes.share(self.population_size, self._members_per_draw)
        population = Population(self.model, weights, members, self._chunking)
        found = estimate(population, args, kwargs, per_member)
        source = self._member_weights().source  # the other one may hold what was measured
        chunks = self._chunks(source)
        of_parameters = sum(p.parameter.numel() * p.parameter.element_size() for p in source.parameters)
        return MemoryEstimate(
            **found,
            noise=source.memory(max(found["chunk_size"], *map(len, chunks))),
            update=update.memory(source, len(chunks), in_place=self.fused),
            copies=2 * of_parameters if self.snapshots else 0,
        )

    @property
    def _group_options(self) -> tuple[str, ...]:
        return OPTIONS

    def _describe(self) -> list[ParameterNoise]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        choices = choices_by_name(self._patterns, self.param_groups, names)
        return describe_parameters(self.model, self._trainable, self.config, choices)

    def _parameters_changed(self) -> None:
        if not self._describe():
            raise ValueError("`params` must hold at least one parameter that is perturbed, all are frozen")
        self._keys = model_keys(self.model, self._base_key)
        self._source: tuple[Any, NoiseSource] | None = None

    def _member_weights(self) -> EggrollWeights:
        has_kernels = kernels.status(self.device, self.config.rng).available
        now = self.config, has_kernels, circumstances(self.model, self._trainable, self.param_groups)
        if self._source is None or self._source[0] != now:
            self._source = now, NoiseSource(self._describe(), self._keys, self.generation, self.config)
        source = self._source[1].in_generation(self.generation)
        return EggrollWeights(source, self._policy.of_generation(), self._randomness_key())

    def _update(self, weights: MemberWeights, fitness: Tensor) -> Callable[[], None]:
        if not self.fused:
            return super()._update(weights, fitness)
        assert isinstance(weights, EggrollWeights)
        steps = plain_sgd_steps(self.optimizer)
        unused = self._unused(weights)
        of_names = {name: steps[p] for name, p in self._trainable.items() if name not in unused}
        how = shaped_weights(fitness, weights.source.config), self._chunks(weights.source), of_names
        return functools.partial(self._descend_in_place, weights.source, *how)

    def _descend_in_place(self, source: NoiseSource, *how: Any) -> None:
        """The step of plain SGD; see `update.descend_`."""
        with self._gradients_cleared():
            try:
                update.descend_(source, *how)
            except Exception as error:
                error.add_note(
                    "The fused step was broken off: parameters may have taken a part of it. "
                    "Load the state_dict of model and trainer to go on from a whole one."
                )
                raise

    def _directions(self, weights: MemberWeights, fitness: Tensor) -> dict[str, Tensor]:
        assert isinstance(weights, EggrollWeights)
        source, unused = weights.source, self._unused(weights)
        found = update.direction(source, shaped_weights(fitness, source.config), self._chunks(source))
        return {name: direction for name, direction in found.items() if name not in unused}

    def _unused(self, weights: MemberWeights) -> list[str]:
        """The parameters to leave as they are because they took no part in the forward passes of the generation."""
        unused = weights.policy.unused(weights.watched)
        if unused and self.unused == "raise":
            raise ValueError(
                f"`params` must take part in the forward pass, but {', '.join(map(repr, unused))} did not: "
                "leave such parameters out, or `unused='ignore'` leaves them as they are"
            )
        return unused

    def _chunks(self, source: NoiseSource) -> list[range]:
        """The members in the chunks in which the update is summed."""
        everyone = range(self.population_size)
        # A kernel sums all of its draws at once, in one pass over the matrix, and needs no memory for their noise.
        if source.holds(everyone) or not source.stores_noise:
            return [everyone]
        # Parameters are rounded once for a chunk of a fused step: large ones. And processes with chunks of their own
        # would sum in other orders, and drift apart.
        of_any_size = self.fused or self._processes.count > 1
        chunking = Chunking(None) if of_any_size else self._chunking
        size = chunking.noise(len(everyone), source.members_per_draw, source.numbers_in_a_draw)
        # The last chunk evaluated is the one whose noise is still there.
        return list(chunk_ranges(everyone, size, source.members_per_draw))[::-1]

    def _check_optimizer(self, groups: Iterable[dict[str, Any]]) -> None:
        if self.fused:
            check_plain_sgd(self.optimizer, groups)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in {"_keys", "_source"}}

    @property
    def _members_per_draw(self) -> int:
        return self.config.members_per_draw

    def _settings(self) -> dict[str, Any]:
        weights = self._open_weights
        return {
            **super()._settings(),
            "unused": self.unused,
            "fused": self.fused,
            "noise": [(p.name, p.kind, p.rank, p.sigma, str(p.parameter.dtype)) for p in weights.source.parameters],
        }

    @property
    def _open_weights(self) -> EggrollWeights:
        """Those of the open generation."""
        assert self._population is not None
        weights = self._population.weights
        assert isinstance(weights, EggrollWeights)
        return weights

    def _observed(self) -> tuple[set[str], int]:
        policy = self._open_weights.policy
        return policy.used, policy.forward_passes

    def _learn(self, observed: list[Any]) -> None:
        policy = self._open_weights.policy
        for used, forward_passes in observed:
            policy.used |= used
            policy.forward_passes = max(policy.forward_passes, forward_passes)

    def _hyperparameters(self) -> dict[str, Any]:
        values = {**super()._hyperparameters(), **asdict(self.config)}
        del values["sigma"]  # it may change from one generation to the next
        if callable(self.config.fitness_shaping):
            values["fitness_shaping"] = getattr(self.config.fitness_shaping, "__qualname__", "callable")
        values["noise"] = copy.deepcopy(self._patterns)
        return values


def _antithetic(noise_reuse: Any, antithetic: bool | None) -> Any:
    if isinstance(noise_reuse, bool) or not isinstance(noise_reuse, Integral) or noise_reuse not in (0, 1, 2):
        raise ValueError(
            "`noise_reuse` must be 0 or 1 (independent members) or 2 (antithetic pairs), "
            f"got {noise_reuse!r}; for draws that live several generations use `noise_lifetime`"
        )
    if antithetic is None:
        return bool(noise_reuse == 2)
    if antithetic is False and noise_reuse == 2:
        raise ValueError("`noise_reuse` 2 means antithetic pairs, got `antithetic` False")
    return antithetic


_ARGUMENTS = frozenset(inspect.signature(EGGROLLTrainer.__init__).parameters)
