"""EGGROLL for PyTorch. Import it as `eggroll.torch`.

Where things are, from what a user calls to what computes:

- `trainer` and `es_trainer`: the trainers; `base`: the generation loop that they share. What users hand in is checked
  and described in `groups`, `choices`, `parameters`, `fitness` and `settings`; `processes`: several of these.
- `population`: what scores members, with `lora` and `estimate`; `forward`: the forward pass of a chunk of them, with
  `calls`, `trees`, `chunking` and `memory`; `member_mode`, `swap`, `threads` and `interrupts`: the state that the
  model is then in; `compiling`, with `comparing`, `simplifying` and `fusing`: a forward pass recorded and compiled.
- `perturbed`: the weight that a model meets; `rules`: what PyTorch's functions do with it, also as operations of
  `aten`, under `autocast`, and where the model takes `derivatives`; `ops`, `grouped` and `member_ops`: the operations
  that this comes down to, with batching rules by `vectorising`; `policy`: what is done where there is no rule.
- `noise`: the noise of a generation; `drawing`, with `drawing_cpu`, `threefry` and `philox`: how it is drawn;
  `member_weights` and `weights`: how it gets into a forward pass; `update`, `totals` and `sgd`: how into a step.
- `kernels`: the Triton kernels that take over on GPUs.
"""

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
