"""A population: one function of parameters, evaluated for every member without forming a member's weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from eggroll import EggrollConfig
from eggroll.config import as_bool, as_size
from eggroll.perturbation import draws_and_signs

from .arguments import check_config, check_function, integer, sigma_of
from .batching import BatchSize, draws_to_evaluate
from .draws import draw, draw_keys, generation_keys
from .layout import Layout, Leaf, Plan, plan
from .perturbed import PerturbedArray, fall_back, one_warning_for_each_primitive
from .tracing import trace

__all__ = ["Evaluation", "evaluation_of", "member_mesh", "perturb", "population_apply"]

Array = jax.Array


def perturb(
    params: Any,
    key: Any,
    generation: Any,
    member: Any,
    config: EggrollConfig,
    *,
    layout: Layout = None,
    sigma: Any = None,
    strict: bool = False,
) -> Any:
    """The parameters as one member sees them: ``W + s * sigma / sqrt(rank) * A @ B.T``, ``P + s * sigma * Z``.

    Args:
        params: pytree of floating-point arrays.
        key: the run's key, see `jax.random.key`.
        generation, member: non-negative integers, possibly traced; `member` below the population's size.
        config: the hyperparameters.
        layout: which parameters are matrices, dense or frozen; see `eggroll.jax.Layout`.
        sigma: instead of `config.sigma`, possibly traced.
        strict: whether an operation that has to materialise a matrix is an error instead of a warning.

    Returns:
        `params` with a `PerturbedArray` in the place of each matrix, for functions under `quax.quaxify`, and
        arrays elsewhere. `materialise` makes all of it dense.
    """
    check_config(config)
    as_bool("strict", strict)
    chosen = plan(params, config, layout)
    member = integer("member", member)
    if isinstance(member, int) and member >= config.population_size:
        raise ValueError(f"`member` must be below the population of {config.population_size}, got {member}")
    draws, signs = draws_and_signs(jnp.asarray(member, jnp.int32)[None], config)
    noise = draw(chosen, draw_keys(generation_keys(chosen, key, generation, config), draws), config)
    own = jax.tree.map(lambda values: values[0], noise)
    return chosen.tree(perturbed(chosen, chosen.arrays(params), own, signs[0], config, sigma, strict))


def population_apply(
    fn: Callable[..., Any],
    config: EggrollConfig,
    *,
    layout: Layout = None,
    batch_size: BatchSize = "auto",
    strict: bool = False,
    mesh: Mesh | None = None,
    axis_name: str = "members",
) -> Callable[..., Any]:
    """`fn` for every member of a population.

    Args:
        fn: ``fn(params, *args)``, any pure function: `model.apply`, a call through `nnx.merge`, an Equinox module.
        config: the hyperparameters.
        layout: which parameters are matrices, dense or frozen; see `eggroll.jax.Layout`.
        batch_size: members evaluated at a time, by `jax.lax.map`, rounded up to whole pairs; None for all of them at
            once. By default as many as keep the largest value of a batch small, within the caches of a CPU or a GiB
            elsewhere, and its noise within 32 MiB. The result does not depend on it, memory and time do.
        strict: whether an operation that has to materialise a matrix is an error instead of a warning.
        mesh: devices that share the members along its axis `axis_name`, by `jax.shard_map`; the others stay as
            they are.

    Returns:
        ``apply(params, key, generation, *args, per_member=False, sigma=None)``, which returns the outputs of `fn`
        stacked over members, shape ``(population_size, ...)``. `per_member` says whether `args` have a leading
        axis of members: a bool for all of them, or a sequence of one for each. `sigma` replaces `config.sigma` and
        may be traced, as may `generation`.

        `apply` raises ValueError if a trainable parameter takes no part in the output, if an argument has another
        number of members, or if the devices do not divide the draws.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eggroll import EggrollConfig
        >>> apply = population_apply(lambda w, x: x @ w, EggrollConfig(population_size=8))
        >>> apply(jnp.zeros((3, 2)), jax.random.key(0), 0, jnp.ones((5, 3))).shape
        (8, 5, 2)
    """
    check_function(fn)
    evaluate = evaluation_of(fn, config, layout, batch_size, strict, mesh, axis_name)

    def apply(*args: Any, **options: Any) -> Any:
        return evaluate(*args, **options).outputs

    return apply


class Evaluation(NamedTuple):
    """What a population returned, and how."""

    outputs: Any
    """Those of `fn`, stacked over members."""
    at_once: bool
    """Whether all members were evaluated together, with the noise of all in memory."""


def evaluation_of(
    fn: Callable[..., Any],
    config: EggrollConfig,
    layout: Layout,
    batch_size: BatchSize,
    strict: bool,
    mesh: Mesh | None,
    axis_name: str,
) -> Callable[..., Evaluation]:
    """`population_apply`, whose function also says how it went."""
    check_config(config)
    as_size("batch_size", batch_size)
    as_bool("strict", strict)

    def apply(
        params: Any,
        key: Any,
        generation: Any,
        *args: Any,
        per_member: bool | Sequence[bool] = False,
        sigma: Any = None,
    ) -> Evaluation:
        chosen = plan(params, config, layout)
        stacked = _stacked(args, per_member, config)
        one = [_one_member(arg) if stack else arg for arg, stack in zip(args, stacked, strict=True)]

        def of_arrays(arrays: list[Any], *args: Any) -> Any:
            return fn(chosen.tree(arrays), *args)

        traced = trace(of_arrays, chosen.arrays(params), one, stacked)
        check_used(chosen, traced.used)
        step = draws_to_evaluate(batch_size, config, chosen, traced)
        # One draw serves the members of a pair: what has an axis of members becomes (draws, members of a draw).
        pairs = config.draws, config.members_per_draw
        paired = [
            jax.tree.map(lambda leaf: jnp.reshape(leaf, (*pairs, *jnp.shape(leaf)[1:])), arg) if stack else arg
            for arg, stack in zip(args, stacked, strict=True)
        ]

        def evaluate(inputs: Inputs, draws: Array, signs: Array, *args: Any) -> list[Array]:
            call = traced.call
            if mesh is not None:
                # What was traced outside is tied to the mesh that the user has set there, if any.
                one = [_one_member(_one_member(arg)) if own else arg for arg, own in zip(args, stacked, strict=True)]
                call = trace(of_arrays, inputs.arrays, one, stacked).call
            return _evaluated(call, inputs, draws, signs, args, chosen, config, stacked, step, strict)

        if mesh is not None:
            evaluate = _over_devices(evaluate, mesh, axis_name, config, stacked)
        members = jnp.arange(config.population_size, dtype=jnp.int32)
        draws, signs = (values.reshape(pairs) for values in draws_and_signs(members, config))
        keys = generation_keys(chosen, key, generation, config)
        inputs = Inputs(chosen.arrays(params), keys, sigma_of(config, sigma))
        with one_warning_for_each_primitive():
            out = evaluate(inputs, draws[:, 0], signs, *paired)
        out = [jnp.reshape(leaf, (config.population_size, *leaf.shape[2:])) for leaf in out]
        return Evaluation(jax.tree.unflatten(traced.out_tree, out), step is None)

    return apply


class Inputs(NamedTuple):
    """What every member's evaluation needs."""

    arrays: list[Any]
    """The parameters, in the order of the plan's leaves."""
    keys: Array
    """Those of the generation, see `generation_keys`."""
    sigma: Any


def _evaluated(
    call: Callable[..., list[Any]],
    inputs: Inputs,
    draws: Array,
    signs: Array,
    args: Sequence[Any],
    chosen: Plan,
    config: EggrollConfig,
    stacked: Sequence[bool],
    step: int | None,
    strict: bool,
) -> list[Array]:
    """The outputs of the members of some draws, with axes over draws and over the members of a draw in front.

    Args:
        call: from the parameters of a member and the leaves of its arguments to the leaves of its output.
        draws: int32, shape ``(n,)``.
        signs: float32, shape ``(n, members of a draw)``.
        args: those of the function of one member; with the same two axes in front where `stacked` says so.
        step: draws that are evaluated at a time; None for all.
    """

    def of_draw(keys: Array, signs: Array, *args: Any) -> list[Array]:
        noise = draw(chosen, keys, config)

        def of_member(sign: Array, *args: Any) -> list[Array]:
            leaves = perturbed(chosen, inputs.arrays, noise, sign, config, inputs.sigma, strict)
            out = call(*leaves, *jax.tree.leaves(args))
            return [fall_back(x, "output") if isinstance(x, PerturbedArray) else x for x in out]

        return jax.vmap(of_member, in_axes=(0, *axes))(signs, *args)

    axes = [0 if stack else None for stack in stacked]
    if step is None:
        return jax.vmap(of_draw, in_axes=(0, 0, *axes))(draw_keys(inputs.keys, draws), signs, *args)
    own = [arg for arg, stack in zip(args, stacked, strict=True) if stack]

    def of_row(row: tuple[Array, Array, list[Any]]) -> list[Array]:
        index, signs, own = row
        rest = iter(own)
        members_args = [next(rest) if stack else arg for arg, stack in zip(args, stacked, strict=True)]
        return of_draw(draw_keys(inputs.keys, index[None])[0], signs, *members_args)

    return _in_batches(of_row, (draws, signs, own), min(step, draws.shape[0]))


def _in_batches(function: Callable[[Any], list[Array]], rows: Any, size: int) -> list[Array]:
    """`jax.lax.map` in batches of `size` rows, which itself cannot join outputs without elements."""
    count = jax.tree.leaves(rows)[0].shape[0]
    whole = count - count % size
    batches = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), rows)
    out = [x.reshape(whole, *x.shape[2:]) for x in jax.lax.map(jax.vmap(function), batches)]
    if whole == count:
        return out
    rest = jax.vmap(function)(jax.tree.map(lambda x: x[whole:], rows))
    return [jnp.concatenate(parts) for parts in zip(out, rest, strict=True)]


def _over_devices(
    evaluate: Callable[..., Any], mesh: Mesh, axis_name: str, config: EggrollConfig, stacked: Sequence[bool]
) -> Callable[..., Any]:
    """`evaluate` with its draws, signs and per-member arguments divided over an axis of devices."""
    whole, divided = PartitionSpec(), PartitionSpec(axis_name)
    return jax.shard_map(
        evaluate,
        mesh=member_mesh(mesh, axis_name, config),
        in_specs=(whole, divided, divided, *[divided if stack else whole for stack in stacked]),
        out_specs=divided,
        axis_names={axis_name},
        check_vma=False,
    )


def member_mesh(mesh: Mesh, axis_name: str, config: EggrollConfig) -> Mesh:
    """`mesh`, checked, with automatic axes: what is divided over members is known here, not by the caller's types."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {mesh!r}")
    if axis_name not in mesh.shape:
        raise ValueError(f"`axis_name` must be an axis of the mesh, {tuple(mesh.shape)}, got {axis_name!r}")
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in around.axis_types:
        raise ValueError(
            "`mesh` divides members where no mesh is set or one with automatic axes, such as "
            f"`jax.make_mesh(..., axis_types=(AxisType.Auto,))`, got {around} from `jax.set_mesh`"
        )
    devices = mesh.shape[axis_name]
    if config.draws % devices:
        raise ValueError(
            f"the {devices} devices along {axis_name!r} must divide the {config.draws} draws "
            f"of the {config.population_size} members"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def perturbed(
    chosen: Plan, arrays: list[Any], noise: list[Any], sign: Any, config: EggrollConfig, sigma: Any, strict: bool
) -> list[Any]:
    """The parameters as the member with this noise and sign sees them."""
    scale = sign * sigma_of(config, sigma)
    return [_perturbed_leaf(*one, scale, config, strict) for one in zip(chosen.leaves, arrays, noise, strict=True)]


def _perturbed_leaf(leaf: Leaf, array: Any, noise: Any, scale: Any, config: EggrollConfig, strict: bool) -> Any:
    if noise is None:
        return array
    array = jnp.asarray(array)
    if leaf.kind == "dense":
        return array + (scale * noise).astype(array.dtype)
    A, B = noise
    scale = scale / math.sqrt(config.rank)
    return PerturbedArray.from_factors(
        array, A, B, scale, rows=leaf.rows, columns=leaf.columns, name=leaf.path, strict=strict
    )


def check_used(chosen: Plan, used: Sequence[bool]) -> None:
    """Refuse parameters that would be updated by a fitness they have no part in."""
    unused = [leaf.path for leaf, use in zip(chosen.leaves, used, strict=True) if leaf.kind != "frozen" and not use]
    if unused:
        raise ValueError(
            f"{'parameters' if len(unused) > 1 else 'parameter'} {', '.join(map(repr, unused))} took no part in the "
            "output, so no fitness could tell its noise from nothing: make it 'frozen' in `layout`, "
            "or leave it out of `params`"
        )


def _stacked(args: Sequence[Any], per_member: bool | Sequence[bool], config: EggrollConfig) -> list[bool]:
    """For each argument whether it has an axis of members, checked."""
    stacked = [per_member] * len(args) if isinstance(per_member, bool) else per_member
    if not isinstance(stacked, Sequence) or len(stacked) != len(args) or not all(own in (0, 1) for own in stacked):
        raise ValueError(
            f"`per_member` must be a bool or one for each of the {len(args)} arguments, got {per_member!r}"
        )
    for place, (arg, stack) in enumerate(zip(args, stacked, strict=True)):
        for leaf in jax.tree.leaves(arg) if stack else ():
            shape = jnp.shape(leaf)
            if not shape or shape[0] != config.population_size:
                raise ValueError(
                    f"argument {place} must have a leading axis of {config.population_size} members, "
                    f"got shape {shape}"
                )
    return list(stacked)


def _one_member(arg: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), arg)
