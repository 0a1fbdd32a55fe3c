"""EGGROLL for PyTorch. Import it as `eggroll.torch`."""

from . import kernels as kernels
from . import rules as rules  # registers what PyTorch's functions do with perturbed weights
from .es_trainer import ESTrainer as ESTrainer
from .es_trainer import VanillaESTrainer as VanillaESTrainer
from .memory import MemoryEstimate as MemoryEstimate
from .policy import MaterialisedWarning as MaterialisedWarning
from .policy import UnsupportedOperationError as UnsupportedOperationError
from .population import Population as Population
from .trainer import EGGROLLTrainer as EGGROLLTrainer

__all__ = [
    "EGGROLLTrainer",
    "ESTrainer",
    "MaterialisedWarning",
    "MemoryEstimate",
    "Population",
    "UnsupportedOperationError",
    "VanillaESTrainer",
    "kernels",
]
