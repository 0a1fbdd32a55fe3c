"""EGGROLL as an optax gradient transformation, whose gradient is made of fitness."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from eggroll import EggrollConfig
from eggroll.config import as_size

from .arguments import check_config
from .batching import BatchSize, draws_to_sum
from .direction import directions
from .keys import key_words
from .layout import Layout, plan

__all__ = ["EggrollState", "eggroll", "scale_by_eggroll"]


class EggrollState(NamedTuple):
    """State of `scale_by_eggroll`: what `population_apply` needs to evaluate the next generation."""

    count: jax.Array  # type: ignore[assignment]  # optax's own states shadow tuple.count likewise
    """Generations done, int32, shape ()."""
    key: jax.Array
    """The run's key, as it was given: it never changes."""


def scale_by_eggroll(
    config: EggrollConfig,
    key: jax.Array,
    *,
    sigma: Any = None,
    layout: Layout = None,
    batch_size: BatchSize = "auto",
    template: Any = None,
    mesh: Mesh | None = None,
    axis_name: str = "members",
) -> optax.GradientTransformationExtraArgs:
    """The direction of a generation from the fitness of its members (arXiv 2511.16652, section 4).

    ``update(updates, state, params, *, fitness)`` replaces `updates`, whose values do not matter, by the direction
    for generation ``state.count``, which must have been evaluated with the same key, config, layout and sigma:
    ``population_apply(fn, config)(params, state.key, state.count, ...)``.

    Args:
        config: the hyperparameters.
        key: the run's key, see `jax.random.key`.
        sigma: instead of `config.sigma`; a number or a traced scalar, so that `optax.inject_hyperparams` can
            schedule it.
        layout: as in `population_apply`.
        batch_size: members whose noise is held at a time; None for all of them. By default that is 32 MiB of it.
        template: the whole tree of parameters, required where `update` sees a part of it (`optax.masked`,
            `optax.partition`), since a parameter's noise depends on its place among all.
        mesh, axis_name: devices that share the members, as in `population_apply`.

    Returns:
        A gradient transformation whose state is an `EggrollState`. Directions have the dtypes of the parameters.
    """
    check_config(config)
    key_words(key)
    as_size("batch_size", batch_size)

    def init(params: Any) -> EggrollState:
        _checked_plan(params, config, layout, template)
        # A copy: who donates the state keeps the key.
        return EggrollState(count=jnp.zeros([], jnp.int32), key=jnp.copy(key))

    def update(
        updates: Any, state: EggrollState, params: Any = None, *, fitness: Any = None, **extra_args: Any
    ) -> tuple[Any, EggrollState]:
        del extra_args
        if fitness is None:
            raise TypeError(
                "`update` needs the keyword argument `fitness`, one value for each member; where a wrapper does not "
                "pass it on, give the optimizer the gradient of `es_value_and_grad`"
            )
        chosen = _checked_plan(updates if params is None else params, config, layout, template)
        gradient = directions(
            chosen,
            state.key,
            state.count,
            fitness,
            config,
            sigma=sigma,
            batch=draws_to_sum(batch_size, config, chosen),
            mesh=mesh,
            axis_name=axis_name,
        )
        return chosen.tree(gradient, constants=False), EggrollState(optax.safe_increment(state.count), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def eggroll(
    learning_rate: optax.ScalarOrSchedule,
    config: EggrollConfig,
    key: jax.Array,
    *,
    sigma: Any = None,
    weight_decay: Any = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    layout: Layout = None,
    batch_size: BatchSize = "auto",
    template: Any = None,
    mesh: Mesh | None = None,
    axis_name: str = "members",
) -> optax.GradientTransformationExtraArgs:
    """EGGROLL with plain gradient descent: `scale_by_eggroll`, decoupled weight decay, learning rate.

    Args:
        learning_rate: a number or a schedule. The root mean square of a step is about ``learning_rate * sigma``,
            whatever the population and the rank are, with z-scored fitness.
        weight_decay: decoupled, multiplied by the learning rate; `mask` says where, see
            `optax.add_decayed_weights`. Frozen parameters stay as they are.
        config, key, sigma, layout, batch_size, template, mesh, axis_name: see `scale_by_eggroll`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from eggroll import EggrollConfig
        >>> from eggroll.jax import population_apply
        >>> config, w = EggrollConfig(population_size=64), jnp.ones((3, 2))
        >>> evaluate = population_apply(lambda w: -jnp.sum(w**2), config, layout="dense")
        >>> optimizer = eggroll(0.5, config, jax.random.key(0), layout="dense")
        >>> state = optimizer.init(w)
        >>> fitness = evaluate(w, jax.random.key(0), 0)
        >>> updates, state = optimizer.update(w, state, w, fitness=fitness)
        >>> bool(jnp.sum(optax.apply_updates(w, updates)**2) < jnp.sum(w**2))
        True
    """
    direction = scale_by_eggroll(
        config,
        key,
        sigma=sigma,
        layout=layout,
        batch_size=batch_size,
        template=template,
        mesh=mesh,
        axis_name=axis_name,
    )
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decayed, state = decay.update(updates, state, params)
        chosen = _checked_plan(updates, config, layout, template)
        both = zip(chosen.leaves, chosen.arrays(updates), chosen.arrays(decayed), strict=True)
        return chosen.tree(plain if leaf.kind == "frozen" else new for leaf, plain, new in both), state

    decay_of_trained = optax.GradientTransformation(decay.init, update)
    return optax.chain(direction, decay_of_trained, optax.scale_by_learning_rate(learning_rate))


def _checked_plan(params: Any, config: EggrollConfig, layout: Layout, template: Any) -> Any:
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if template is None and any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "a part of the parameters is masked, and the noise of a parameter depends on its place among all: "
            "pass the whole tree as `template`"
        )
    return plan(params, config, layout, template)
