"""EGGROLL for JAX: a population as a function, its direction as a gradient transformation."""

# Importing these registers their rules with quax.
from . import control as control
from . import rules as rules
from . import structure as structure
from . import windows as windows
from .gradient import es_value_and_grad as es_value_and_grad
from .layout import Dense as Dense
from .layout import Layout as Layout
from .layout import Matrix as Matrix
from .layout import default_layout as default_layout
from .perturbed import PerturbedArray as PerturbedArray
from .perturbed import materialise as materialise
from .population import perturb as perturb
from .population import population_apply as population_apply
from .transformation import EggrollState as EggrollState
from .transformation import eggroll as eggroll
from .transformation import scale_by_eggroll as scale_by_eggroll

__all__ = [
    "Dense",
    "EggrollState",
    "Layout",
    "Matrix",
    "PerturbedArray",
    "default_layout",
    "eggroll",
    "es_value_and_grad",
    "materialise",
    "perturb",
    "population_apply",
    "scale_by_eggroll",
]
