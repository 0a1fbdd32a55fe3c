"""The interface of all noisers, and the one that perturbs nothing."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eggroll.config import as_bool, as_int, as_positive_float

__all__ = ["FrozenNoiserParams", "Noiser"]

IterInfo = tuple[Any, Any] | None
"""None for the unperturbed model, or ``(epoch, thread_id)``."""


@dataclass(frozen=True)
class FrozenNoiserParams:
    """What does not change during a run: hashable, so that it may be a static argument of `jax.jit`."""

    solver: optax.GradientTransformation
    group_size: int
    freeze_nonlora: bool
    noise_reuse: int
    rank: int
    use_batched_update: bool
    trust_region_norm: float | None = None


class Noiser:
    """No noise and no updates; the interface that the other noisers fill in.

    All methods are class methods and pure. `noiser_params` is a dict of ``sigma`` and ``opt_state``.
    """

    @classmethod
    def init_noiser(
        cls,
        params: Any,
        sigma: float,
        lr: Any,
        *args: Any,
        solver: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        noise_reuse: int = 0,
        rank: int = 1,
        use_batched_update: bool = False,
    ) -> tuple[FrozenNoiserParams, dict[str, Any]]:
        """Start a run.

        Args:
            params: pytree of floating-point arrays.
            sigma: scale of the perturbation; `lr`: learning rate or schedule.
            solver: an optax factory called with ``(lr, **solver_kwargs)``; `optax.sgd` by default.
            group_size: consecutive members that are normalised together; 0 for all.
            freeze_nonlora: perturb and update matrices only.
            noise_reuse: generations that one draw lives; 0 means the same noise for ever, and warns.
            rank: columns of the factors.
            use_batched_update: kept for code that passes it; every update here is batched already.

        Raises:
            TypeError, ValueError: an argument breaks its rule, or is not known.
        """
        if args:
            raise TypeError(f"`init_noiser` takes params, sigma and lr by position, got {len(args)} more: {args}")
        if solver is not None and not callable(solver):
            raise TypeError(f"`solver` must be an optax factory such as optax.sgd, got {solver!r}")
        as_positive_float("sigma", sigma)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise TypeError(f"parameter {name!r} must be floating point, got {jnp.result_type(leaf)}")
        transformation = (optax.sgd if solver is None else solver)(lr, **(solver_kwargs or {}))
        frozen = FrozenNoiserParams(
            solver=transformation,
            group_size=as_int("group_size", group_size, 0),
            freeze_nonlora=as_bool("freeze_nonlora", freeze_nonlora),
            noise_reuse=as_int("noise_reuse", noise_reuse, 0),
            rank=as_int("rank", rank, 1),
            use_batched_update=as_bool("use_batched_update", use_batched_update),
        )
        return frozen, {"sigma": sigma, "opt_state": transformation.init(params)}

    @classmethod
    def do_mm(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        """``x @ param.T`` as the member sees it: `param` is ``(out, in)``, `x` is ``(..., in)``."""
        return x @ param.T

    @classmethod
    def do_Tmm(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        """``x @ param`` as the member sees it."""
        return x @ param

    @classmethod
    def do_emb(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo, x: Any
    ) -> Any:
        """``param[x]`` as the member sees it; `x` holds integers."""
        return param[x]

    @classmethod
    def get_noisy_standard(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, param: Any, base_key: Any, iterinfo: IterInfo
    ) -> Any:
        """A parameter that is no matrix, as the member sees it."""
        return param

    @classmethod
    def convert_fitnesses(
        cls, frozen: FrozenNoiserParams, noiser_params: Any, raw_scores: Any, num_episodes_list: Any = None
    ) -> Any:
        """The scores of all members, higher is better, as the weights that `do_updates` takes."""
        return raw_scores

    @classmethod
    def do_updates(
        cls,
        frozen: FrozenNoiserParams,
        noiser_params: Any,
        params: Any,
        base_keys: Any,
        fitnesses: Any,
        iterinfos: Any,
        es_map: Any,
    ) -> tuple[Any, Any]:
        """One step of the solver: ``(noiser_params, params)``, nothing changed in place.

        Args:
            base_keys: from `hs.models.common.simple_es_tree_key`.
            fitnesses: from `convert_fitnesses`.
            iterinfos: ``(epochs, thread_ids)``, integers of shape ``(N,)`` each.
            es_map: of each parameter, what it is: `PARAM`, `MM_PARAM`, `EMB_PARAM`, `EXCLUDED`.
        """
        return noiser_params, params
