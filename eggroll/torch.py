"""The PyTorch backend under the name that users import."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("eggroll.torch needs PyTorch: pip install 'eggroll-xp[torch]'", name="torch") from error

from eggroll_torch import *  # noqa: F403
from eggroll_torch import __all__ as __all__
