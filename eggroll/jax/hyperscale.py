"""The interface of HyperscaleES: ``import eggroll.jax.hyperscale as hs``."""

from eggroll_jax.hyperscale import *  # noqa: F403
from eggroll_jax.hyperscale import __all__ as __all__
