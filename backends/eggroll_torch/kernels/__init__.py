"""Triton kernels for a population on a GPU, each equal to the array-API core within its rounding.

Importing this package needs neither Triton nor a GPU: `usable` says whether the kernels can take a tensor, and only
then are the modules imported that hold them (`noise`, `linear`, `update`, `dense`). On every GPU they are first
compared with the core, see `check`; where one does not compile or does not agree, the PyTorch path runs.

The kernels also run on a CPU, in Triton's interpreter, a thousand times slower than the PyTorch path: good for tests
and for nothing else. So a CPU tensor is left to PyTorch even where ``TRITON_INTERPRET=1`` is set for other code,
unless ``EGGROLL_KERNELS=interpret`` asks for it. ``EGGROLL_KERNELS=off`` keeps CUDA tensors from the kernels too.
"""

import functools
import importlib
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from eggroll import prng

from ..interrupts import uninterrupted

__all__ = ["DTYPES", "Status", "status", "usable"]

_log = logging.getLogger("eggroll")

# bfloat16 on the tensor cores and asynchronous copies to shared memory: Ampere and later.
_CAPABILITY = (8, 0)
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What the kernels take."""


@dataclass(frozen=True)
class Status:
    """Whether the kernels run.

    Attributes:
        available: whether they can.
        reason: why, or why not, in words.
        triton: the version of Triton; None where it cannot be imported.
        device: the GPU's name and capability, ``"interpreter"``, or None.
    """

    available: bool
    reason: str
    triton: str | None
    device: str | None


def status(device: torch.device | str | None = None, rng: prng.Rng = "threefry") -> Status:
    """Whether the kernels can take tensors of a device, and why.

    Args:
        device: where the tensors are; by default the current GPU, or the CPU where there is none.
        rng: the generator that they draw noise with; what is wrong with Philox alone leaves Threefry its kernels.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    where = device.type, index, os.environ.get("EGGROLL_KERNELS", "auto")
    found = _status(*where)
    if found.available and found.device != "interpreter" and rng != "threefry":
        found = _checked(found, *where[:2], rng)
    _say(found)
    return found


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can take this tensor: float32, bfloat16 or float16, where `status` is available."""
    return tensor.dtype in DTYPES and status(tensor.device).available


@functools.cache
def _status(kind: str, index: int | None, wish: str) -> Status:
    if wish not in {"auto", "interpret", "off"}:
        raise ValueError(f"`EGGROLL_KERNELS` must be 'auto', 'interpret' or 'off', got {wish!r}")
    version, interprets, problem = _triton()

    def no(reason: str) -> Status:
        return Status(False, f"{reason}: the PyTorch path runs", version, None)

    if problem is not None:
        return no(problem)
    if wish == "off":
        return no("EGGROLL_KERNELS=off")
    if wish == "interpret" and interprets:
        return Status(True, "Triton's interpreter runs the kernels, as asked for", version, "interpreter")
    if interprets:
        return no("TRITON_INTERPRET is set, but not EGGROLL_KERNELS=interpret")
    if kind != "cuda":
        return no(f"tensors are on a {kind} device, not on a CUDA one")
    if torch.version.hip is not None:
        return no("the kernels have not been tried on ROCm")
    if not torch.cuda.is_available():
        return no("there is no CUDA device")
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, capability {'.'.join(map(str, capability))}"
    if capability < _CAPABILITY:
        return no(f"{name}, is below {'.'.join(map(str, _CAPABILITY))}")
    compiled = Status(True, "Triton compiles the kernels for the GPU, where they agree with the core", version, name)
    return _checked(compiled, kind, index, "threefry")


@functools.cache
def _checked(found: Status, kind: str, index: int | None, rng: prng.Rng) -> Status:
    """What was found, if the kernels draw on that GPU what they should."""
    problem = _problem(torch.device(f"{kind}:{index}"), rng)
    if problem is None:
        return found
    _log.warning("kernels: %s: the PyTorch path runs instead", problem)
    return Status(False, f"on {found.device}, {problem}: the PyTorch path runs", found.triton, None)


def _problem(device: torch.device, rng: prng.Rng) -> str | None:
    from . import check

    return check.problem(device, rng)


@functools.cache
@uninterrupted(once=True)  # a module whose import is cut short may not be imported any more
def _triton() -> tuple[str | None, bool, str | None]:
    """Triton's version, whether it interprets, and what is wrong with it."""
    try:
        triton = importlib.import_module("triton")
        return triton.__version__, bool(triton.knobs.runtime.interpret), None
    except ImportError as error:
        return None, False, f"Triton cannot be imported ({error})"
    except AttributeError:
        return triton.__version__, False, f"Triton {triton.__version__} is too old"


@functools.cache
def _say(found: Status) -> None:
    where = f" (Triton {found.triton}, {found.device})" if found.available else ""
    _log.debug("kernels: %s%s", found.reason, where)
