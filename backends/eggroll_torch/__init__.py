"""EGGROLL for PyTorch. Import it as `eggroll.torch`."""

from . import rules as rules
from .es_trainer import ESTrainer as ESTrainer
from .es_trainer import VanillaESTrainer as VanillaESTrainer
from .perturbed import MaterialisedWarning as MaterialisedWarning
from .population import Population as Population
from .trainer import EGGROLLTrainer as EGGROLLTrainer

__all__ = ["EGGROLLTrainer", "ESTrainer", "MaterialisedWarning", "Population", "VanillaESTrainer"]
