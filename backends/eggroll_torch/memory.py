"""How much memory a chunk of members needs, measured, and how much there is."""

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MemoryEstimate", "PeakMemory", "free_memory"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a generation needs besides the model itself.

    Attributes:
        chunk_size: members that are evaluated at a time.
        noise: the draws of one chunk, and of others that are kept for the update as long as they are few.
        forward: the forward pass of one chunk: members' dense weights, activations and temporaries.
        outputs: the outputs of all members, which `population(x)` returns.
        update: the direction, its float32 sum, and the one of the generation before, which is left in `.grad` until
            then; with `fused` the sums that cannot be taken in the parameters themselves.
        copies: the initial parameters, kept for `reset`, and those of the best member, if there are `snapshots`.
    """

    chunk_size: int
    noise: int
    forward: int
    outputs: int
    update: int
    copies: int

    @property
    def peak(self) -> int:
        """What is held at once at most."""
        return self.copies + self.noise + max(self.forward + self.outputs, self.outputs + self.update)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once among those made inside the context, on any device.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if _is_real(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if _is_real(leaf) and leaf.untyped_storage()._cdata not in known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._storages.pop(key)


def free_memory(device: torch.device) -> int:
    """Bytes that a program could still take on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 30  # nobody says: a size that any machine that trains networks has


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided
