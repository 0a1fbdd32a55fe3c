"""The interface of HyperscaleES, computed by `eggroll.jax`: ``import eggroll.jax.hyperscale as hs``."""

from . import models as models
from . import noiser as noiser

__all__ = ["models", "noiser"]
