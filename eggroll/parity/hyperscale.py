"""Runs code of the shape of HyperscaleES: a checkout of it, or `eggroll.jax.hyperscale`, which has its interface."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .jax_backend import JAX_OPS, flat, nested
from .models import activate
from .report import InexpressibleError
from .runs import RecordedRun
from .trajectory import Replay, Trajectory

__all__ = ["Api", "ours", "perturbed", "run"]

Array = jax.Array


@dataclass(frozen=True)
class Api:
    """What is used of HyperscaleES.

    Attributes:
        noisers: classes by name, ``hyperscalees.noiser.all_noisers``.
        common: the module ``hyperscalees.models.common``.
    """

    noisers: Mapping[str, Any]
    common: Any


def ours() -> Api:
    """`eggroll.jax.hyperscale`."""
    try:
        package = importlib.import_module("eggroll.jax.hyperscale")
    except ModuleNotFoundError as error:
        raise InexpressibleError(f"eggroll.jax.hyperscale cannot be loaded: {error}") from None
    return Api(package.noiser.all_noisers, package.models.common)


def run(api: Api, trajectory: Trajectory) -> RecordedRun:
    """A training run, as a recording of it would have it."""
    if trajectory.rng != "threefry":
        raise InexpressibleError(f"the reference draws with Threefry, not with {trajectory.rng!r}")
    noiser = _noiser(api, trajectory)
    members = trajectory.population_size
    dtype = jnp.dtype(trajectory.dtype)
    widths = trajectory.widths
    _, params, scan_map, es_map = api.common.MLP.rand_init(
        jax.random.key(0),
        widths[0],
        widths[-1],
        list(widths[1:-1]),
        trajectory.bias,
        trajectory.activation,
        trajectory.dtype,
    )
    if set(flat(params)) != set(trajectory.init):
        raise InexpressibleError(f"its MLP has the parameters {sorted(flat(params))}")
    params = jax.tree.map(lambda value: jnp.asarray(value, dtype), nested(trajectory.init))
    keys = api.common.simple_es_tree_key(params, _key(trajectory.key), scan_map)
    frozen, noiser_params = _started(noiser, trajectory, params)

    def forward(noiser_params: Any, params: Any, iterinfo: Any, x: Array) -> Array:
        for layer in map(str, range(len(widths) - 1)):
            weight, key = params[layer]["weight"], keys[layer]["weight"]
            x = noiser.do_mm(frozen, noiser_params, weight, key, iterinfo, x)
            if trajectory.bias:
                bias, key = params[layer]["bias"], keys[layer]["bias"]
                x = x + noiser.get_noisy_standard(frozen, noiser_params, bias, key, iterinfo)
            if int(layer) < len(widths) - 2:
                x = activate(JAX_OPS.xp, trajectory.activation, x)
        return x

    @jax.jit
    def generation(noiser_params: Any, params: Any, epoch: Array, inputs: Array, target: Array) -> Any:
        iterinfos = jnp.full(members, epoch, jnp.int32), jnp.arange(members, dtype=jnp.int32)
        outputs = jax.vmap(lambda *iterinfo, x: forward(noiser_params, params, iterinfo, x))(*iterinfos, x=inputs)
        raw = -((outputs - target) ** 2)[:, 0]
        weights = noiser.convert_fitnesses(frozen, noiser_params, raw)
        weights = jnp.tile(weights, members // len(weights))  # baseline shaping gives those of one group
        noiser_params, params = noiser.do_updates(frozen, noiser_params, params, keys, weights, iterinfos, es_map)
        return noiser_params, params, outputs, raw, weights

    outputs, scores, shaped, after = [], [], [], []
    for epoch, rows in enumerate(trajectory.inputs):
        target = jnp.asarray(trajectory.target(rows), dtype)
        noiser_params, params, out, raw, weights = generation(
            noiser_params, params, np.int32(epoch), jnp.asarray(rows, dtype), target
        )
        outputs.append(_numpy(out))
        scores.append(_numpy(raw))
        shaped.append(_numpy(weights))
        after.append(flat(jax.tree.map(_numpy, params)))
    replay = Replay(np.stack(outputs), np.stack(scores), after[0], after[-1])
    return RecordedRun(trajectory, replay, {name: _words(key) for name, key in flat(keys).items()}, np.stack(shaped))


def perturbed(
    api: Api, trajectory: Trajectory, matrix: np.ndarray, vector: np.ndarray, key: np.ndarray, epochs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and a vector with the same key as every member sees them in some generations.

    Returns:
        float32, shapes ``(epochs, members, out, in)`` and ``(epochs, members, *vector.shape)``.
    """
    noiser = _noiser(api, trajectory)
    parameters = {"matrix": jnp.asarray(matrix), "vector": jnp.asarray(vector)}
    frozen, noiser_params = _started(noiser, trajectory, parameters)

    def member(epoch: Array, thread: Array) -> tuple[Array, Array]:
        common = (frozen, noiser_params)
        rows = jnp.eye(matrix.shape[1], dtype=np.float32)
        product = noiser.do_mm(*common, parameters["matrix"], _key(key), (epoch, thread), rows)
        return product.T, noiser.get_noisy_standard(*common, parameters["vector"], _key(key), (epoch, thread))

    every_member = jax.vmap(jax.vmap(member, (None, 0)), (0, None))
    threads = np.arange(trajectory.population_size, dtype=np.int32)
    matrices, vectors = jax.jit(every_member)(np.asarray(epochs, np.int32), threads)
    return _numpy(matrices), _numpy(vectors)


def _noiser(api: Api, trajectory: Trajectory) -> Any:
    if trajectory.noiser not in api.noisers:
        raise InexpressibleError(f"there is no noiser {trajectory.noiser!r}")
    return api.noisers[trajectory.noiser]


def _started(noiser: Any, trajectory: Trajectory, params: Any) -> tuple[Any, Any]:
    options = {} if trajectory.trust_region is None else {"trust_region_norm": trajectory.trust_region}
    with warnings.catch_warnings():
        # noise_reuse=0, the same noise for ever, is what the recorded run asks for.
        warnings.simplefilter("ignore")
        return noiser.init_noiser(
            params,
            trajectory.sigma,
            trajectory.learning_rate,
            solver=getattr(optax, trajectory.solver),
            solver_kwargs=dict(trajectory.solver_options),
            group_size=trajectory.group,
            freeze_nonlora=trajectory.freeze,
            noise_reuse=trajectory.noise_reuse,
            rank=trajectory.rank,
            **options,
        )


def _key(words: np.ndarray) -> Array:
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _words(key: Any) -> np.ndarray:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)


def _numpy(array: Array) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.float32))
