"""`ESTrainer`, to be subclassed, and `VanillaESTrainer`: full-rank evolution strategies on one flat vector."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll.config import as_positive_float

from . import threefry
from .base import FitnessFn, PopulationFitnessFn, Trainer
from .chunking import ChunkSize
from .compiling import Compile
from .drawing import Draws, Rows
from .fitness import Nonfinite
from .forward import Randomness
from .groups import OptimizerFactory
from .member_weights import MemberWeights
from .perturbed import DenseWeight
from .policy import Policy
from .processes import Distributed, Processes
from .settings import Setting
from .swap import seeded

__all__ = ["ESTrainer", "VanillaESTrainer"]

# What is folded into the key of a generation to seed the sampling and the update: the indices of no members.
_PERTURBATIONS, _UPDATE = -1, -2


class ESTrainer(Trainer):
    """Evolution strategies on the flattened parameters, for your own algorithm.

    A subclass defines `sample_perturbations` and `compute_update`. Member ``i`` is evaluated at
    ``current_params + sigma * perturbations[i]``, and the update, times the learning rate, is *added* to the
    parameters (the optimizer gets its negative as the gradient).

    PyTorch's global generators are seeded from `seed` and the generation around `sample_perturbations` and
    `compute_update`, and put back, so `torch.randn` in them is reproducible.

    Args: see `EGGROLLTrainer`, whose arguments of the same name mean the same.

    Example:
        >>> import torch
        >>> from eggroll.torch import ESTrainer
        >>> class MyESTrainer(ESTrainer):
        ...     def sample_perturbations(self, population_size):
        ...         return torch.randn(population_size, self.current_params.shape[0], device=self.device)
        ...     def compute_update(self, perturbations, fitnesses):
        ...         weights = (fitnesses - fitnesses.mean()) / fitnesses.std()
        ...         return (weights[:, None] * perturbations).mean(dim=0)
        >>> model = torch.nn.Linear(3, 1)
        >>> trainer = MyESTrainer(model.parameters(), model=model, fitness_fn=lambda m: m.weight.sum(), seed=0)
        >>> trainer.step()["generation"]
        1
    """

    # A change counts from the next `ask` on.
    sigma = Setting[float](as_positive_float)

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        fitness_fn: FitnessFn | None = None,
        population_size: int = 50,
        learning_rate: float = 0.01,
        sigma: float = 0.1,
        device: torch.device | str | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        *,
        population_fitness_fn: PopulationFitnessFn | None = None,
        optimizer: OptimizerFactory = torch.optim.SGD,
        chunk_size: ChunkSize = None,
        compile: Compile = False,
        nonfinite: Nonfinite = "raise",
        randomness: Randomness = "different",
        snapshots: bool = True,
        distributed: Distributed = False,
    ):
        processes = Processes(distributed)
        with processes.together("the constructor"):
            self.sigma = sigma
            self._policy = Policy()
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

    def sample_perturbations(self, population_size: int) -> Tensor:
        """Perturbations in units of sigma, shape ``(population_size, current_params.shape[0])``."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_perturbations(population_size)")

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        """The update, shape ``(current_params.shape[0],)``, to be added times the learning rate.

        Args:
            perturbations: what `sample_perturbations` returned.
            fitnesses: float32, shape ``(population_size,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_update(perturbations, fitnesses)")

    @property
    def current_params(self) -> Tensor:
        """All trained parameters as one vector, a copy."""
        return torch.cat([parameter.detach().flatten() for parameter in self._trainable.values()])

    def _member_weights(self) -> MemberWeights:
        key = self._randomness_key()
        with torch.no_grad(), seeded(key, _PERTURBATIONS, self.device):
            perturbations = self.sample_perturbations(self.population_size)
        expected = (self.population_size, sum(p.numel() for p in self._trainable.values()))
        _check_returned("sample_perturbations", perturbations, expected)
        return _FlatWeights(self._trainable, perturbations, self.sigma, key, self._policy)

    def _directions(self, weights: MemberWeights, fitness: Tensor) -> dict[str, Tensor]:
        assert isinstance(weights, _FlatWeights)
        with torch.no_grad(), seeded(weights.randomness_key, _UPDATE, self.device), self._with_sigma(weights.sigma):
            update = self.compute_update(weights.perturbations, self._as_fitnesses(fitness))
        _check_returned("compute_update", update, tuple(weights.perturbations.shape[1:]))
        if not torch.isfinite(update).all():
            raise ValueError("`compute_update` must return finite values, got NaN or infinity")
        return weights.unflatten(-update)

    @contextlib.contextmanager
    def _with_sigma(self, sigma: float) -> Iterator[None]:
        """With the sigma that the members were made with, which may be another one by now."""
        set_since, self.sigma = self.sigma, sigma
        try:
            yield
        finally:
            self.sigma = set_since

    def _as_fitnesses(self, fitness: Tensor) -> Tensor:
        """What `compute_update` is handed, from what `tell` was."""
        return fitness.to(self.device, torch.float32)


def _check_returned(method: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{method}` must return a tensor of shape {shape}, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"`{method}` must return a tensor of shape {shape}, got the shape {tuple(value.shape)}")


class VanillaESTrainer(ESTrainer):
    """Full-rank evolution strategies: every parameter gets dense Gaussian noise, independent for each member.

    The update is the estimate of Salimans et al. (arXiv 1703.03864), ``1 / (N * sigma) * sum_i w_i * eps_i``, with
    z-scored fitness as the weights. `compute_update` gets the fitness less that of the first member, since float32
    would lose the differences between large scores. All ``population_size`` full perturbations are in memory, which
    those of `EGGROLLTrainer` are not.
    """

    def sample_perturbations(self, population_size: int) -> Tensor:
        generation_key = torch.from_numpy(
            threefry.folded(self._base_key.numpy()[None], self.generation).view(np.int32)
        )
        members = torch.arange(population_size, dtype=torch.int32, device="cpu")
        keys = threefry.fold_in(generation_key[0], members)
        size = sum(parameter.numel() for parameter in self._trainable.values())
        rows = Rows([Draws(1, (size,))], self.device)
        return rows.normals(keys.unsqueeze(1).to(self.device))[0].squeeze(1)

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        shifted = (fitnesses - fitnesses[0]).cpu().double()
        weights = (shifted - shifted.mean()) / torch.sqrt(shifted.var(correction=0) + 1e-5)
        return weights.to(perturbations) @ perturbations / (len(weights) * self.sigma)

    def _as_fitnesses(self, fitness: Tensor) -> Tensor:
        return (fitness - fitness[0]).to(self.device, torch.float32)


class _FlatWeights:
    """Members' weights from dense perturbations of the flattened parameters; see `MemberWeights`."""

    members_per_draw = 1
    signature: Hashable = None

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        perturbations: Tensor,
        sigma: float,
        randomness_key: Tensor,
        policy: Policy,
    ):
        self.policy = policy
        self.device = perturbations.device
        self.randomness_key = randomness_key
        self.numbers_in_a_draw = perturbations.shape[1]
        self.watched: list[str] = []
        self._parameters = parameters
        self.perturbations = perturbations
        self.sigma = sigma

    def prepare(self, members: range) -> None:
        """All perturbations are held anyway."""

    def prepare_shared(self) -> None:
        """See `prepare`."""

    def batched(self, members: range) -> dict[str, Tensor]:
        return self._perturbed(self.perturbations[members.start : members.stop])

    def shared(self, members: range) -> dict[str, list[Tensor]]:
        return {}

    def bind(self, place: Tensor, mine: dict[str, Tensor], shared: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: DenseWeight.make(weight, name, self.policy) for name, weight in mine.items()}

    @torch.no_grad()
    def materialise(self, member: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return self._perturbed(self.perturbations[member], dtype)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector, or several along leading axes, as tensors of the parameters' shapes."""
        parts = flat.split([parameter.numel() for parameter in self._parameters.values()], dim=-1)
        return {
            name: part.reshape((*part.shape[:-1], *parameter.shape))
            for (name, parameter), part in zip(self._parameters.items(), parts, strict=True)
        }

    def _perturbed(self, perturbations: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {
            name: (parameter.detach() + self.sigma * part).to(dtype or parameter.dtype)
            for (name, part), parameter in zip(
                self.unflatten(perturbations).items(), self._parameters.values(), strict=True
            )
        }
