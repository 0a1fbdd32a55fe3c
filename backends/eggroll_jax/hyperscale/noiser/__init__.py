"""The noisers by the names that code written for HyperscaleES looks them up with."""

from . import alteggroll as alteggroll
from . import base_noiser as base_noiser
from . import eggroll as eggroll
from . import eggroll_baseline_subtraction as eggroll_baseline_subtraction
from . import open_es as open_es
from . import sparse as sparse

__all__ = [
    "all_noisers",
    "alteggroll",
    "base_noiser",
    "eggroll",
    "eggroll_baseline_subtraction",
    "open_es",
    "sparse",
]

all_noisers = {
    "noop": base_noiser.Noiser,
    "open_es": open_es.OpenES,
    "eggroll": eggroll.EggRoll,
    "eggrollbs": eggroll_baseline_subtraction.EggRollBS,
    "alteggroll": alteggroll.EggRoll,
    "reeggroll": eggroll.EggRoll,
    "sparse": sparse.Sparse,
}
