"""The interface of HyperscaleES: ``import eggroll.jax.hyperscale as hs``.

Its modules are also there as ordinary imports: ``from eggroll.jax.hyperscale.models.common import MLP``.
"""

import sys

import eggroll_jax.hyperscale as _code
from eggroll_jax.hyperscale import *  # noqa: F403
from eggroll_jax.hyperscale import __all__ as __all__

# The same modules under a second name, as `posixpath` is `os.path`.
for _name, _module in list(sys.modules.items()):
    if _name.startswith(f"{_code.__name__}."):
        sys.modules[__name__ + _name.removeprefix(_code.__name__)] = _module
