"""The parts of `memory_estimate` that depend on the model: a measured forward pass and its outputs."""

from typing import Any

import torch

from .memory import PeakMemory
from .population import Population
from .trees import Parts

__all__ = ["estimate"]


def estimate(population: Population, args: Any, kwargs: Any, per_member: bool) -> dict[str, int]:
    """What of a `MemoryEstimate` a call with `args` and `kwargs` decides, by the name of the attribute."""
    weights, members = population.weights, len(population)
    multiple = weights.members_per_draw
    forward = outputs = 0
    chunk = population.chunk_size(*args, per_member=per_member, **kwargs)
    if args or kwargs:
        few, more = multiple, min(4 * multiple, members)
        (peak_few, _), (peak_more, of_more) = (
            _measured(population, count, args, kwargs, per_member) for count in (few, more)
        )
        for_a_member = (peak_more - peak_few) / max(more - few, 1)
        forward = int(peak_few + for_a_member * (chunk - few))
        outputs = of_more * members // more
    return {"chunk_size": chunk, "forward": forward, "outputs": outputs}


def _measured(population: Population, count: int, args: Any, kwargs: Any, per_member: bool) -> tuple[int, int]:
    """Bytes alive at once in the forward pass of the first members, beyond their noise, and bytes of its outputs."""
    part = next(population.chunks(count))
    if per_member:
        given = Parts((args, kwargs))
        args, kwargs = given.rebuilt([tensor[: len(part)] for tensor in given.tensors])
    part.weights.prepare_shared()
    part.weights.prepare(part.members)
    with PeakMemory() as memory, torch.no_grad():
        result = part(*args, per_member=per_member, **kwargs)
    return memory.peak, sum(tensor.numel() * tensor.element_size() for tensor in Parts(result).tensors)
