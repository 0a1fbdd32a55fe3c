"""The PyTorch backend, through `EGGROLLTrainer`, on the CPU and on CUDA."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, nn

import eggroll_torch.choices
import eggroll_torch.fitness
import eggroll_torch.noise
import eggroll_torch.parameters
import eggroll_torch.threefry
from eggroll import EggrollConfig, prng
from eggroll.perturbation import LowRank
from eggroll.torch import EGGROLLTrainer
from eggroll_torch.drawing import Draws, Rows

from .backends import Backend, DrawnNoise, Evaluation, Parameters
from .models import Model
from .optimizers import check_options
from .report import InexpressibleError
from .torch_models import module_of
from .trajectory import Replay, Trajectory

__all__ = ["TorchBackend", "on_every_device"]


class TorchBackend(Backend):
    """PyTorch on one device. Draws come from its own fast generator, models run as unmodified modules."""

    def __init__(self, device: str):
        self.name = f"torch-{device}"
        self.device = torch.device(device)

    def key(self, seed: int) -> np.ndarray:
        return _numpy(eggroll_torch.parameters.base_key_of(seed))

    def fold_in(self, key: np.ndarray, data: np.ndarray) -> np.ndarray:
        words = eggroll_torch.threefry.fold_in(
            self._words(key), torch.from_numpy(data.view(np.int32)).to(self.device)
        )
        return _numpy(words).view(np.uint32)

    def split(self, key: np.ndarray, n: int) -> np.ndarray:
        return _numpy(prng.split(self._key(key), n))

    def parameter_keys(self, model: Model, parameters: Parameters, key: np.ndarray) -> Parameters:
        module = self._module(model, parameters)
        keys = eggroll_torch.parameters.model_keys(module, torch.from_numpy(key))
        return {name: _numpy(own) for name, own in keys.items()}

    def bits(self, key: np.ndarray, shape: tuple[int, ...], rng: prng.Rng = "threefry") -> np.ndarray:
        (drawn,) = self._row(shape, rng).bits(self._words(key).view(1, 1, 2))
        return _numpy(drawn[0, 0]).view(np.uint32)

    def uniform(self, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return _numpy(prng.uniform(self._key(key), shape))

    def normal(
        self, key: np.ndarray, shape: tuple[int, ...], precision: prng.Precision, rng: prng.Rng = "threefry"
    ) -> np.ndarray:
        (drawn,) = self._row(shape, rng).normals(self._words(key).view(1, 1, 2), precision)
        return _numpy(drawn[0, 0])

    def noise(
        self,
        parameter_key: np.ndarray,
        shape: tuple[int, ...],
        generation: int,
        members: range,
        config: EggrollConfig,
        *,
        low_rank: bool,
        dtype: str = "float32",
    ) -> DrawnNoise:
        config = replace(config, freeze_nonlora=False)
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device))
        choice = eggroll_torch.choices.Choice(noise="low_rank" if low_rank else "dense")
        [described] = eggroll_torch.parameters.describe_parameters(
            module, {"weight": module.weight}, config, {"weight": choice}
        )
        keys = {"weight": torch.from_numpy(parameter_key)}
        source = eggroll_torch.noise.NoiseSource([described], keys, generation, config)
        chunk = source.chunk(members)
        drawn = source.noise(described, chunk)
        parts = tuple(drawn) if isinstance(drawn, LowRank) else (drawn,)
        return DrawnNoise(
            _numpy(chunk.signs),
            tuple(_numpy(part.repeat_interleave(source.members_per_draw, 0)) for part in parts),
        )

    def shape_fitness(self, fitness: np.ndarray, config: EggrollConfig) -> np.ndarray:
        scores = eggroll_torch.fitness.as_fitness(torch.from_numpy(fitness), config.population_size)
        scores = eggroll_torch.fitness.as_finite(scores, "raise")
        return _numpy(eggroll_torch.fitness.shaped_weights(scores, config))

    def outputs(self, evaluation: Evaluation) -> np.ndarray:
        with _exact_products():
            trainer = self._trainer(evaluation)
            return _numpy(trainer.ask()(torch.from_numpy(evaluation.inputs).to(self.device)))

    def direction(self, evaluation: Evaluation, fitness: np.ndarray) -> Parameters:
        with _exact_products():
            trainer = self._trainer(evaluation)
            trainer.ask()(torch.from_numpy(evaluation.inputs).to(self.device))
            trainer.tell(fitness)
        return {
            name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else _numpy(parameter.grad)
            for name, parameter in trainer.model.named_parameters()
        }

    def replay(self, trajectory: Trajectory) -> Replay:
        config = trajectory.config()
        dtype = getattr(torch, trajectory.dtype)
        module = self._module(trajectory.model, trajectory.init).to(dtype)
        noise = None if trajectory.low_rank else {"*": "dense"}
        with _exact_products():
            trainer = _trainer_of(
                module,
                config,
                trajectory.key,
                optimizer=_optimizer(trajectory),
                learning_rate=trajectory.learning_rate,
                noise=noise,
            )
            outputs, raw, after = [], [], []
            for rows in trajectory.inputs:
                inputs = torch.from_numpy(rows).to(self.device, dtype)
                out = trainer.ask()(inputs, per_member=True)
                target = torch.from_numpy(trajectory.target(rows)).to(self.device, dtype)
                scores = -((out - target) ** 2)[:, 0]
                trainer.tell(scores)
                outputs.append(_numpy(out))
                raw.append(_numpy(scores))
                after.append({name: _numpy(parameter) for name, parameter in module.named_parameters()})
        return Replay(np.stack(outputs), np.stack(raw), after[0], after[-1])

    def _row(self, shape: tuple[int, ...], rng: prng.Rng) -> Rows:
        return Rows([Draws(1, shape)], self.device, rng)

    def _key(self, key: np.ndarray) -> Tensor:
        return prng.key_from_words(key, xp=xp, device=self.device)

    def _words(self, key: np.ndarray) -> Tensor:
        return torch.from_numpy(key.view(np.int32)).to(self.device)

    def _module(self, model: Model, parameters: Parameters) -> nn.Module:
        module = module_of(model).to(self.device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(parameters[name]))
        return module

    def _trainer(self, evaluation: Evaluation) -> EGGROLLTrainer:
        module = self._module(evaluation.model, evaluation.parameters)
        trainer = _trainer_of(module, evaluation.config, evaluation.key, chunk_size=evaluation.chunk_size)
        trainer.generation = evaluation.generation
        return trainer


def _trainer_of(module: nn.Module, config: EggrollConfig, key: np.ndarray, **options: Any) -> EGGROLLTrainer:
    """The trainer of a configuration; `options` are its other arguments."""
    return EGGROLLTrainer(
        module.parameters(),
        model=module,
        population_size=config.population_size,
        sigma=config.sigma,
        rank=config.rank,
        group_size=config.group_size,
        freeze_nonlora=config.freeze_nonlora,
        seed=key.tolist(),
        antithetic=config.antithetic,
        noise_lifetime=config.noise_lifetime,
        fitness_shaping=config.fitness_shaping,
        gradient_scale=config.gradient_scale,
        noise_dtype=config.noise_dtype,
        rng=config.rng,
        strict=True,
        **options,
    )


def _optimizer(trajectory: Trajectory) -> Any:
    """The `torch.optim` counterpart of an optax optimizer, clipped where the run has a trust region."""
    chosen = check_options(trajectory.solver, trajectory.solver_options)
    if trajectory.solver == "sgd":
        kind: Any = torch.optim.SGD
        options = {"momentum": chosen["momentum"] or 0.0, "nesterov": chosen["nesterov"]}
    else:
        kind = torch.optim.AdamW if trajectory.solver == "adamw" else torch.optim.Adam
        options = {"betas": (chosen["b1"], chosen["b2"]), "eps": chosen["eps"]}
        if trajectory.solver == "adamw":
            options["weight_decay"] = chosen["weight_decay"]
            if trajectory.freeze and chosen["weight_decay"]:
                raise InexpressibleError("torch.optim leaves frozen parameters alone, optax.adamw decays them")
    return partial(_clipped(kind, trajectory.trust_region), **options)


def _clipped(kind: Any, norm: float | None) -> Any:
    if norm is None:
        return kind

    class Clipped(kind):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            length = torch.stack([gradient.norm() for gradient in gradients]).norm()
            if length > norm:
                torch._foreach_mul_(gradients, norm / length)
            super().step()

    return Clipped


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products in float32: PyTorch lets cuDNN use TF32, with 10 bits of mantissa, unless told otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy().copy()


def on_every_device() -> list[Backend]:
    """One backend for the CPU, and one for CUDA where there is one."""
    return [TorchBackend(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
