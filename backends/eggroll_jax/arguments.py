"""Numbers that a user passes, possibly traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll import EggrollConfig
from eggroll.config import as_int, as_positive_float

__all__ = ["check_config", "check_function", "integer", "sigma_of"]


def check_config(config: Any) -> None:
    """Raises a TypeError unless it is an `EggrollConfig`."""
    if not isinstance(config, EggrollConfig):
        raise TypeError(f"`config` must be an EggrollConfig, got {config!r}")


def check_function(fn: Any) -> None:
    """Raises a TypeError unless it can be called."""
    if not callable(fn):
        raise TypeError(f"`fn` must be callable, got {fn!r}")


def integer(name: str, value: Any) -> Any:
    """`value` if it is a non-negative int or an integer array of shape ``()``.

    Raises:
        TypeError, ValueError: it is neither; the message names argument, rule and value.
    """
    if not isinstance(value, jax.Array):
        return as_int(name, value, 0)
    if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim != 0:
        raise TypeError(f"`{name}` must be an integer, got {value.dtype} of shape {value.shape}")
    return value


def sigma_of(config: EggrollConfig, sigma: Any) -> Any:
    """The scale of the noise: `sigma`, a positive number or a real array of shape ``()``, or the configuration's.

    Raises:
        TypeError, ValueError: as for `integer`.
    """
    if sigma is None:
        return config.sigma
    if isinstance(sigma, np.ndarray) and sigma.ndim == 0:
        sigma = sigma.item()
    if not isinstance(sigma, jax.Array | np.ndarray):
        return as_positive_float("sigma", sigma)
    if not (jnp.issubdtype(sigma.dtype, jnp.floating) or jnp.issubdtype(sigma.dtype, jnp.integer)) or sigma.ndim != 0:
        raise TypeError(f"`sigma` must be a positive number, got {sigma.dtype} of shape {sigma.shape}")
    return sigma
