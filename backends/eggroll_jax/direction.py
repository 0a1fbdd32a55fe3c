"""From the fitness of a generation to the direction that an optimizer descends, drawn again in chunks and summed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from eggroll import EggrollConfig
from eggroll.fitness import shape_fitness
from eggroll.perturbation import LowRank, draws_and_signs
from eggroll.update import dense_sum, direction_scale, low_rank_sum, weights_of_draws

from .arguments import sigma_of
from .draws import draw, draw_keys, generation_keys
from .layout import Leaf, Plan
from .population import member_mesh

__all__ = ["directions", "sum_in_chunks"]

Array = jax.Array


def directions(
    chosen: Plan,
    key: Any,
    generation: Any,
    fitness: Any,
    config: EggrollConfig,
    *,
    sigma: Any = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    axis_name: str = "members",
) -> list[Array]:
    """The direction of every parameter: ``-sqrt(N) * mean_i(w_i * E_i)``, see `eggroll.update`.

    Args:
        chosen: from `eggroll_jax.layout.plan`.
        fitness: shape ``(population_size,)``, higher is better, of any real dtype.
        sigma: what the generation was evaluated with, where not `config.sigma`.
        batch: draws whose noise is held at a time; all of them by default.
        mesh: devices that share the draws along `axis_name`; each sums its own, then they add up.

    Returns:
        In the order of `chosen.leaves`, the shape and dtype of each parameter; zeros where it is frozen.
    """
    fitness = jnp.asarray(fitness)
    if jnp.issubdtype(fitness.dtype, jnp.complexfloating):
        raise TypeError(f"`fitness` must be real, got {fitness.dtype}")
    # Whatever was counted or rounded, in float32 at least.
    weights = shape_fitness(fitness.astype(jnp.promote_types(fitness.dtype, jnp.float32)), config)
    draws, signs = draws_and_signs(jnp.arange(config.population_size, dtype=jnp.int32), config)
    coefficients = weights_of_draws(weights, signs, config).astype(jnp.float32)
    draws = draws.reshape(config.draws, -1)[:, 0]
    keys = generation_keys(chosen, key, generation, config)

    def total(keys: Array, draws: Array, coefficients: Array) -> list[Any]:
        def sums(draws: Array, coefficients: Array) -> list[Any]:
            return _sums(chosen, draw_keys(keys, draws), coefficients, config)

        return sum_in_chunks(sums, (draws, coefficients), batch)

    if mesh is not None:
        own, divided = total, PartitionSpec(axis_name)
        total = jax.shard_map(
            lambda *inputs: jax.lax.psum(own(*inputs), axis_name),
            mesh=member_mesh(mesh, axis_name, config),
            in_specs=(PartitionSpec(), divided, divided),
            out_specs=PartitionSpec(),
            axis_names={axis_name},
            check_vma=False,
        )
    sums = total(keys, draws, coefficients)
    sigma = sigma_of(config, sigma)
    return [_finished(leaf, own, config, sigma) for leaf, own in zip(chosen.leaves, sums, strict=True)]


def sum_in_chunks(sums: Callable[..., Any], values: Sequence[Array], batch: int | None) -> Any:
    """``sums(*values)``, where that adds up along the first axis of `values`, with `batch` of it at a time.

    Args:
        values: shape ``(n,)`` each. The last chunk is filled up with zeros, which must add nothing: one of `values`
            is the coefficients of the others.
        batch: at least 1; None for all at once.
    """
    if batch is None or batch >= len(values[0]):
        return sums(*values)
    padding = -len(values[0]) % batch
    chunks = [jnp.pad(value, (0, padding)).reshape(-1, batch) for value in values]

    def add(total: Any, chunk: Sequence[Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums(*chunk)), None

    shapes = jax.eval_shape(sums, *(chunk[0] for chunk in chunks))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), chunks)[0]


def _sums(chosen: Plan, keys: Array, coefficients: Array, config: EggrollConfig) -> list[Any]:
    """``sum_d c_d * noise_d`` for each parameter, None where it is frozen."""
    return [
        None
        if noise is None
        else low_rank_sum(coefficients, LowRank(*noise))
        if leaf.kind == "low_rank"
        else dense_sum(coefficients, noise)
        for leaf, noise in zip(chosen.leaves, draw(chosen, keys, config), strict=True)
    ]


def _finished(leaf: Leaf, total: Array | None, config: EggrollConfig, sigma: Any) -> Array:
    """The sum scaled, with its axes where the parameter has them."""
    if total is None:
        return jnp.zeros(leaf.shape, leaf.dtype)
    scaled = total * direction_scale(config, low_rank=leaf.kind == "low_rank", sigma=sigma)
    if leaf.kind == "low_rank":
        order = (*leaf.stack, *leaf.rows, *leaf.columns)
        spread = scaled.reshape([leaf.shape[axis] for axis in order])
        scaled = jnp.transpose(spread, sorted(range(len(order)), key=order.__getitem__))
    return scaled.astype(leaf.dtype)
