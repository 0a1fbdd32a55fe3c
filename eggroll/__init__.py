"""EGGROLL: low-rank evolution strategies (arXiv 2511.16652) for PyTorch and JAX.

`import eggroll` loads NumPy and nothing heavier. `eggroll.torch` and `eggroll.jax` are the two backends; the
trainers are also reachable from here and load PyTorch on first use.
"""

from typing import TYPE_CHECKING, Any

from .config import EggrollConfig as EggrollConfig

if TYPE_CHECKING:
    from eggroll_torch import EGGROLLTrainer as EGGROLLTrainer
    from eggroll_torch import ESTrainer as ESTrainer
    from eggroll_torch import VanillaESTrainer as VanillaESTrainer

__version__ = "0.1.0"

__all__ = ["EGGROLLTrainer", "ESTrainer", "EggrollConfig", "VanillaESTrainer"]

_TRAINERS = frozenset({"EGGROLLTrainer", "ESTrainer", "VanillaESTrainer"})


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:
        from . import torch

        return getattr(torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAINERS})
