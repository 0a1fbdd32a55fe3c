"""The core on NumPy: the definition that backends are compared with, and itself compared with recorded vectors."""

import numpy as np

from eggroll import EggrollConfig, fitness, perturbation, prng, update

from .backends import Backend, DrawnNoise, Evaluation, Parameters
from .models import NUMPY_OPS, Model
from .optimizers import optimizer
from .report import InexpressibleError
from .trajectory import Replay, Trajectory

__all__ = ["NumpyCore", "on_every_device"]


class NumpyCore(Backend):
    """Weights of each member are materialised in float32, models run in float64, nothing is chunked."""

    name = "numpy"

    def key(self, seed: int) -> np.ndarray:
        return prng.key(seed)

    def fold_in(self, key: np.ndarray, data: np.ndarray) -> np.ndarray:
        return prng.fold_in(key, data)

    def split(self, key: np.ndarray, n: int) -> np.ndarray:
        return prng.split(key, n)

    def parameter_keys(self, model: Model, parameters: Parameters, key: np.ndarray) -> Parameters:
        return perturbation.parameter_keys(key, parameters)

    def bits(self, key: np.ndarray, shape: tuple[int, ...], rng: prng.Rng = "threefry") -> np.ndarray:
        return prng.bits(key, shape, rng=rng)

    def uniform(self, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return prng.uniform(key, shape)

    def normal(
        self, key: np.ndarray, shape: tuple[int, ...], precision: prng.Precision, rng: prng.Rng = "threefry"
    ) -> np.ndarray:
        return prng.normal(key, shape, precision, rng=rng)

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
        index = np.arange(members.start, members.stop, dtype=np.int32)
        draws, signs = perturbation.draws_and_signs(index, config)
        keys = perturbation.draw_keys(parameter_key, generation, draws, config)
        precision = perturbation.noise_precision(config, dtype)
        if low_rank:
            parts = tuple(perturbation.low_rank_noise(keys, shape, config.rank, precision, config.rng))
            return DrawnNoise(signs, parts)
        return DrawnNoise(signs, (perturbation.dense_noise(keys, shape, precision, config.rng),))

    def shape_fitness(self, fitness_values: np.ndarray, config: EggrollConfig) -> np.ndarray:
        return fitness.shape_fitness(fitness_values.astype(np.float64), config).astype(np.float32)

    def outputs(self, evaluation: Evaluation) -> np.ndarray:
        return self._outputs(evaluation, None, None)

    def direction(self, evaluation: Evaluation, fitness_values: np.ndarray) -> Parameters:
        weights = self.shape_fitness(fitness_values, evaluation.config)
        return self._direction(evaluation, weights, None)

    def replay(self, trajectory: Trajectory) -> Replay:
        config = trajectory.config()
        if trajectory.dtype != "float32":
            raise InexpressibleError(f"NumPy has no {trajectory.dtype}")
        low_rank = None if trajectory.low_rank else False
        step = optimizer(trajectory.solver, trajectory.learning_rate, trajectory.solver_options)
        parameters: Parameters = dict(trajectory.init)
        outputs, raw, after = [], [], []
        for generation, inputs in enumerate(trajectory.inputs):
            evaluation = Evaluation(trajectory.model, parameters, trajectory.key, generation, inputs, config)
            out = self._outputs(evaluation, low_rank, inputs)
            scores = -((out - trajectory.target(inputs)) ** 2)[:, 0]
            found = self._direction(evaluation, self.shape_fitness(scores, config), low_rank)
            parameters = step(parameters, clipped(found, trajectory.trust_region))
            outputs.append(out)
            raw.append(scores)
            after.append(parameters)
        return Replay(np.stack(outputs), np.stack(raw), after[0], after[-1])

    def _outputs(self, evaluation: Evaluation, low_rank: bool | None, rows: np.ndarray | None) -> np.ndarray:
        """Outputs of every member, each for its own one of `rows` where they are given."""
        model, config = evaluation.model, evaluation.config
        keys = self.parameter_keys(model, evaluation.parameters, evaluation.key)
        outputs = []
        for member in range(config.population_size):
            mine = {
                name: perturbation.member_parameter(
                    _as_matrix(value), keys[name], evaluation.generation, member, config, low_rank=low_rank
                )
                .reshape(value.shape)
                .astype(np.float64)
                for name, value in evaluation.parameters.items()
            }
            x = evaluation.inputs if rows is None else rows[member]
            outputs.append(model.forward(NUMPY_OPS, mine, x))
        return np.stack(outputs).astype(np.float32)

    def _direction(self, evaluation: Evaluation, weights: np.ndarray, low_rank: bool | None) -> Parameters:
        keys = self.parameter_keys(evaluation.model, evaluation.parameters, evaluation.key)
        return {
            name: update.direction(
                keys[name],
                _as_matrix(value).shape,
                evaluation.generation,
                weights,
                evaluation.config,
                low_rank=low_rank,
            ).reshape(value.shape)
            for name, value in evaluation.parameters.items()
        }


def clipped(direction: Parameters, norm: float | None) -> Parameters:
    """The direction scaled down to the global norm `norm` where it is longer."""
    if norm is None:
        return direction
    length = np.sqrt(sum(float(np.sum(np.square(part, dtype=np.float64))) for part in direction.values()))
    return (
        {name: part * np.float32(min(1.0, norm / length)) for name, part in direction.items()}
        if length
        else direction
    )


def _as_matrix(value: np.ndarray) -> np.ndarray:
    """A convolution's kernel ``(out, in, height, width)`` as the matrix ``(out, in * height * width)``."""
    return value.reshape(len(value), -1) if value.ndim == 4 else value


def on_every_device() -> list[Backend]:
    return [NumpyCore()]
