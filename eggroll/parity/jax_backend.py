"""The JAX backend, through its public functions, on every platform that JAX has."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll_jax.draws
import eggroll_jax.keys
import eggroll_jax.layout
import eggroll_jax.noise
from eggroll import EggrollConfig, fitness, perturbation, prng
from eggroll.jax import population_apply, scale_by_eggroll

from .backends import Backend, DrawnNoise, Evaluation, Parameters
from .models import Model, Ops
from .report import InexpressibleError
from .trajectory import CORE_NOISERS, Replay, Trajectory

__all__ = ["JAX_OPS", "JaxBackend", "flat", "nested", "on_every_device"]

Array = jax.Array


def _conv2d(x: Array, weight: Array) -> Array:
    return jax.lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)))


JAX_OPS = Ops(jnp, _conv2d)


class JaxBackend(Backend):
    """JAX on one platform. Everything runs under `jax.jit`, as users run it."""

    def __init__(self, device: Any):
        self.name = f"jax-{device.platform}"
        self.device = device

    def key(self, seed: int) -> np.ndarray:
        with self._here():
            # Without x64 JAX takes the low 32 bits of a seed; the high ones are a key's first word.
            if seed >= 2**32:
                raise InexpressibleError("jax.random.key takes seeds below 2**32 unless jax_enable_x64 is set")
            return np.asarray(eggroll_jax.keys.key_words(jax.random.key(seed)))

    def fold_in(self, key: np.ndarray, data: np.ndarray) -> np.ndarray:
        return self._run(eggroll_jax.keys.fold_in, key, data)

    def split(self, key: np.ndarray, n: int) -> np.ndarray:
        return self._run(lambda key: eggroll_jax.keys.split(key, n), key)

    def parameter_keys(self, model: Model, parameters: Parameters, key: np.ndarray) -> Parameters:
        config = EggrollConfig(population_size=2)
        chosen = eggroll_jax.layout.plan(nested(parameters), config)
        keys = self._run(lambda key: eggroll_jax.keys.split(key, chosen.parameters), key)
        return {leaf.path: keys[leaf.index] for leaf in chosen.leaves}

    def bits(self, key: np.ndarray, shape: tuple[int, ...], rng: prng.Rng = "threefry") -> np.ndarray:
        draws = [eggroll_jax.keys.Draws(1, shape)]

        def bits(key: Any) -> Any:
            return eggroll_jax.keys.parted(eggroll_jax.keys.random_bits(key[None], draws, rng), draws, rng)[0]

        return self._run(bits, key).reshape(shape)

    def uniform(self, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return self._run(lambda key: prng.uniform(key, shape), key)

    def normal(
        self, key: np.ndarray, shape: tuple[int, ...], precision: prng.Precision, rng: prng.Rng = "threefry"
    ) -> np.ndarray:
        draws = [eggroll_jax.keys.Draws(1, shape)]
        drawn = self._run(lambda key: eggroll_jax.noise.normals(key[None], draws, precision, rng)[0], key)
        return drawn.reshape(shape)

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
        epoch = 0 if config.noise_lifetime is None else generation // config.noise_lifetime
        # None of these changes the noise: leave them out of what is compiled.
        whole = 2**30 // (config.group_size or 1) * (config.group_size or 1)
        same = replace(config, sigma=1.0, noise_lifetime=1, population_size=whole, freeze_nonlora=False)
        same = same if low_rank else replace(same, rank=1)
        with self._here():
            draw = _compiled_noise(shape, same, low_rank, dtype)
            signs, noise = jax.tree.map(_numpy, draw(parameter_key, np.int32(epoch), index))
        return DrawnNoise(signs, noise if low_rank else (noise,))

    def shape_fitness(self, fitness_values: np.ndarray, config: EggrollConfig) -> np.ndarray:
        return self._run(lambda scores: fitness.shape_fitness(scores, config), fitness_values.astype(np.float32))

    def outputs(self, evaluation: Evaluation) -> np.ndarray:
        model = evaluation.model
        apply = population_apply(
            lambda params, x: model.forward(JAX_OPS, flat(params), x),
            evaluation.config,
            batch_size=evaluation.chunk_size,
            strict=True,
        )
        return self._run(
            apply, nested(evaluation.parameters), evaluation.key, evaluation.generation, evaluation.inputs
        )

    def direction(self, evaluation: Evaluation, fitness_values: np.ndarray) -> Parameters:
        parameters = nested(evaluation.parameters)

        def found(parameters: Any, key: Array, generation: Array, scores: Array) -> Any:
            transformation = scale_by_eggroll(evaluation.config, key, batch_size=evaluation.chunk_size)
            state = transformation.init(parameters)._replace(count=generation)
            return transformation.update(parameters, state, parameters, fitness=scores)[0]

        generation = np.int32(evaluation.generation)
        scores = fitness_values.astype(np.float32)
        return flat(self._run(found, parameters, evaluation.key, generation, scores))

    def replay(self, trajectory: Trajectory) -> Replay:
        if trajectory.noiser not in CORE_NOISERS:
            return self._replay_by_name(trajectory)
        config = trajectory.config()
        layout = None if trajectory.low_rank else "dense"
        model = trajectory.model
        apply = population_apply(
            lambda params, x: model.forward(JAX_OPS, flat(params), x), config, layout=layout, strict=True
        )
        solver = [solver_of(trajectory)]
        if trajectory.trust_region is not None:
            solver.insert(0, optax.clip_by_global_norm(trajectory.trust_region))
        optimizer = optax.chain(scale_by_eggroll(config, jnp.asarray(trajectory.key), layout=layout), *solver)

        @jax.jit
        def generation(params: Any, state: Any, inputs: Array, target: Array) -> Any:
            outputs = apply(params, trajectory.key, state[0].count, inputs, per_member=True)
            raw = -((outputs - target) ** 2)[:, 0]
            updates, state = optimizer.update(params, state, params, fitness=raw)
            return optax.apply_updates(params, updates), state, outputs, raw

        with self._here():
            dtype = jnp.dtype(trajectory.dtype)
            params = jax.tree.map(lambda value: jnp.asarray(value, dtype), nested(trajectory.init))
            state = optimizer.init(params)
            outputs, raw, after = [], [], []
            for rows in trajectory.inputs:
                target = jnp.asarray(trajectory.target(rows), dtype)
                params, state, out, scores = generation(params, state, jnp.asarray(rows, dtype), target)
                outputs.append(_numpy(out))
                raw.append(_numpy(scores))
                after.append(flat(jax.tree.map(_numpy, params)))
        return Replay(np.stack(outputs), np.stack(raw), after[0], after[-1])

    def _replay_by_name(self, trajectory: Trajectory) -> Replay:
        from . import hyperscale

        with self._here():
            return hyperscale.run(hyperscale.ours(), trajectory).replay

    def _run(self, function: Any, *args: Any) -> Any:
        """``function(*args)`` compiled for this device, as NumPy arrays."""
        with self._here():
            return jax.tree.map(_numpy, jax.jit(function)(*args))

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """This device, and float32 products in float32, where GPU and TPU use narrower ones by default."""
        with jax.default_device(self.device), jax.default_matmul_precision("highest"):
            yield


@functools.cache
def _compiled_noise(shape: tuple[int, ...], config: EggrollConfig, low_rank: bool, dtype: str) -> Any:
    """``(parameter key, epoch, members) -> (signs, noise)``, compiled once for all keys, epochs and members."""
    parameter = {"weight": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}
    chosen = eggroll_jax.layout.plan(parameter, config, None if low_rank else "dense")

    def draw(key: Array, epoch: Array, members: Array) -> Any:
        draws, signs = perturbation.draws_and_signs(members, config)
        keys = eggroll_jax.draws.draw_keys(eggroll_jax.keys.fold_in(key[None], epoch), draws)
        return signs, eggroll_jax.draws.draw(chosen, keys, config)[0]

    return jax.jit(draw)


def solver_of(trajectory: Trajectory) -> optax.GradientTransformation:
    """The optax optimizer of a run."""
    factory = getattr(optax, trajectory.solver, None)
    try:
        return factory(trajectory.learning_rate, **trajectory.solver_options)  # type: ignore[misc]
    except TypeError as error:
        raise InexpressibleError(
            f"optax.{trajectory.solver} with {dict(trajectory.solver_options)}: {error}"
        ) from None


def nested(parameters: Parameters) -> dict[str, Any]:
    """Parameters by dotted name as nested dictionaries, whose order JAX and the core agree on."""
    tree: dict[str, Any] = {}
    for name, value in parameters.items():
        *path, last = name.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    return tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _numpy(array: Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)


def on_every_device() -> list[Backend]:
    """One backend for each platform: the CPU, and what else `jax.devices` lists."""
    devices = {device.platform: device for device in [*jax.devices("cpu")[:1], *jax.devices()]}
    return [JaxBackend(device) for device in devices.values()]
