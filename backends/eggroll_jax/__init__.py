"""EGGROLL for JAX: a population as a function, its direction as a gradient transformation.

Where things are, from what a user calls to what computes:

- `gradient` and `transformation`: the drop-in for `jax.value_and_grad` and the optax optimizer, which both end in
  `direction`; `population`: the function of all members.
- `layout`: how each parameter is perturbed; `batching`: how many members at a time; `tracing` and `jaxprs`: the
  user's function as a jaxpr; `arguments`: numbers that users pass.
- `perturbed`: the array that the function meets; `rules`, `structure`, `windows`, `ragged` and `control`: what JAX's
  primitives do with it, by quax.
- `draws`, `noise`, `keys` and `philox`: the noise and how it is drawn.
- `hyperscale`: the interface of HyperscaleES.
"""

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
