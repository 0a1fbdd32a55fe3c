"""Evolution strategies in the place of `jax.value_and_grad`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eggroll import EggrollConfig
from eggroll.config import as_bool

from .arguments import check_function
from .batching import BatchSize, draws_to_sum
from .direction import directions
from .layout import Layout, plan
from .population import evaluation_of

__all__ = ["es_value_and_grad"]


def es_value_and_grad(
    fn: Callable[..., Any],
    config: EggrollConfig,
    *,
    maximize: bool,
    has_aux: bool = False,
    layout: Layout = None,
    batch_size: BatchSize = "auto",
    strict: bool = False,
    mesh: Mesh | None = None,
    axis_name: str = "members",
) -> Callable[..., Any]:
    """`jax.value_and_grad` for a function that need not be differentiable.

    Args:
        fn: ``fn(params, *args)`` returns one number, or with `has_aux` a pair of it and anything.
        config: the hyperparameters.
        maximize: whether `fn` is a fitness (True) or a loss (False).
        layout, batch_size, strict, mesh, axis_name: see `population_apply`. `batch_size` also bounds the noise
            held for the update.

    Returns:
        ``value_and_grad(params, key, generation, *args, per_member=False, sigma=None) -> (value, grad)``. `value`
        is the mean over members, in the sign of `fn`; with `has_aux` it is ``(value, aux)``, `aux` stacked over
        members. `grad` has the structure, shapes and dtypes of `params` and is what an optimizer descends, whatever
        `maximize` is; leaves of `params` that are not arrays are None in it. With plain SGD and z-scored fitness
        the root mean square of a step is about ``learning_rate * sigma``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eggroll import EggrollConfig
        >>> loss = es_value_and_grad(lambda w: jnp.sum(w**2), EggrollConfig(population_size=64), maximize=False,
        ...                          layout="dense")
        >>> value, grad = loss(jnp.ones(3), jax.random.key(0), 0)
        >>> bool((grad > 0).all())
        True
    """
    check_function(fn)
    as_bool("maximize", maximize)
    as_bool("has_aux", has_aux)
    evaluate = evaluation_of(_with_scalar_value(fn, has_aux), config, layout, batch_size, strict, mesh, axis_name)

    def value_and_grad(
        params: Any,
        key: Any,
        generation: Any,
        *args: Any,
        per_member: bool | Sequence[bool] = False,
        sigma: Any = None,
    ) -> Any:
        evaluation = evaluate(params, key, generation, *args, per_member=per_member, sigma=sigma)
        values, aux = evaluation.outputs
        chosen = plan(params, config, layout)
        gradient = directions(
            chosen,
            key,
            generation,
            values if maximize else -values,
            config,
            sigma=sigma,
            # The compiler draws noise once for both if both have that of all members.
            batch=None if evaluation.at_once else draws_to_sum(batch_size, config, chosen),
            mesh=mesh,
            axis_name=axis_name,
        )
        value = jnp.mean(values)
        return ((value, aux) if has_aux else value), chosen.tree(gradient, constants=False)

    return value_and_grad


def _with_scalar_value(fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    def checked(params: Any, *args: Any) -> tuple[jax.Array, Any]:
        out = fn(params, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with `has_aux` the function must return a pair (value, aux), got {type(out).__name__}")
        value, aux = out if has_aux else (out, None)
        if not jax.tree_util.all_leaves([value]):
            raise TypeError(
                f"the function must return one real number for a member, got {type(value).__name__}; "
                "with `has_aux=True` it returns a pair of that and anything"
            )
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"the function must return one real number for a member, got {dtype} of shape {shape}")
        # Whatever was counted or rounded, fitness is shaped in float32 at least.
        return jnp.asarray(value, jnp.promote_types(dtype, jnp.float32)), aux

    return checked
