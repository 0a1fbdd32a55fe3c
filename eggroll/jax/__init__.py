"""The JAX backend under the name that users import."""

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
    import quax as _quax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in {"jax", "optax", "quax"}:
        raise
    raise ModuleNotFoundError(
        f"eggroll.jax needs {error.name}: pip install 'eggroll-xp[jax]'", name=error.name
    ) from error

from eggroll_jax import *  # noqa: F403
from eggroll_jax import __all__ as __all__
