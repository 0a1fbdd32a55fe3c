"""The direction that the optimizer descends, summed over chunks of members. The oracle is `eggroll.update`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eggroll import perturbation
from eggroll.update import direction_scale, weights_of_draws

from .autocast import without_autocast
from .noise import ChunkNoise, DrawnFactors, NoiseSource
from .parameters import ParameterNoise
from .totals import add_
from .vectorising import called

__all__ = ["descend_", "direction", "memory"]

# Terms that libraries add up before they add them to what is there (MKL: 192). Of more they add parts, and what is
# there would be rounded for each: more are summed beside it, in blocks of rows that stay in the cache.
_FEW_TERMS = 128
_BLOCK_BYTES = 1 << 22


@torch.no_grad()
def direction(source: NoiseSource, weights: Tensor, chunks: Iterable[range]) -> dict[str, Tensor]:
    """The direction of every perturbed parameter.

    Args:
        source: the noise of the generation that was evaluated.
        weights: shape ``(population_size,)``, the shaped fitness.
        chunks: the members, in chunks of whole pairs; their order does not matter.

    Returns:
        By parameter name, in the shape of the parameter: float32 (float64 for float64 parameters), but in the dtype
        of a narrower parameter where a kernel sums all of its draws at once and rounds the sum.
    """
    chunks = list(chunks)
    totals = {parameter.name: _new_total(source, parameter, len(chunks)) for parameter in source.parameters}
    _sum_(totals, dict.fromkeys(totals, (1.0, 0.0)), source, weights, chunks)
    return {parameter.name: totals[parameter.name].view(parameter.parameter.shape) for parameter in source.parameters}


@torch.no_grad()
def descend_(
    source: NoiseSource, weights: Tensor, chunks: Iterable[range], steps: Mapping[str, tuple[float, float]]
) -> None:
    """``parameter = beta * parameter + alpha * direction``, without the direction in memory.

    A sum that would be rounded to a narrow parameter's dtype more than once, or whose parameter is not contiguous,
    is taken in memory of its own after all. A float32 parameter is rounded once for each chunk.

    Args:
        source, weights, chunks: see `direction`.
        steps: ``(alpha, beta)`` by the name of the parameter; what is not in it stays as it is.
    """
    chunks = list(chunks)
    parameters = {parameter.name: parameter for parameter in source.parameters if parameter.name in steps}
    totals, scales = {}, dict(steps)
    apart = []
    for name, parameter in parameters.items():
        if _is_summed_in_place(source, parameter, len(chunks)):
            totals[name] = parameter.parameter.detach().view((*parameter.stack, *parameter.layer))
        else:
            totals[name], scales[name] = _new_total(source, parameter, len(chunks)), (1.0, 0.0)
            apart.append(name)
    _sum_(totals, scales, source, weights, chunks)
    for name in apart:
        weight = parameters[name].parameter.detach()
        add_(weight, totals.pop(name).view(weight.shape), *steps[name])


def memory(source: NoiseSource, chunks: int, *, in_place: bool) -> int:
    """Bytes of the sums of `descend_`, or of `direction` with gradients: those that they become, and those before.

    Args:
        chunks: how many.
        in_place: whether it is `descend_`.
    """
    size = 0
    for parameter in source.parameters:
        weight, dtype = parameter.parameter, _dtype_of_total(source, parameter, chunks)
        if in_place:
            bytes_of_number = 0 if _is_summed_in_place(source, parameter, chunks) else dtype.itemsize
        else:
            bytes_of_number = dtype.itemsize + weight.element_size() * (1 if dtype == weight.dtype else 2)
        size += weight.numel() * bytes_of_number
    return size


def _sum_(
    totals: Mapping[str, Tensor],
    scales: Mapping[str, tuple[float, float]],
    source: NoiseSource,
    weights: Tensor,
    chunks: list[range],
) -> None:
    """``total = beta * total + alpha * direction`` for each parameter that has a total, `scales` by name."""
    weights = weights.cpu()
    for place, members in enumerate(chunks):
        chunk = source.chunk(members)
        # On the host: a GPU would be handed four launches for it.
        of_draws = weights_of_draws(weights[members.start : members.stop], chunk.host_signs, source.config)
        coefficients = of_draws.to(source.device, non_blocking=True)
        with without_autocast(source.device):
            for parameter in source.parameters:
                if parameter.name in totals:
                    alpha, beta = scales[parameter.name]
                    how = alpha, (1.0 if place else beta)
                    _add_sum_(totals[parameter.name], coefficients, source, parameter, chunk, *how)


def _is_summed_in_place(source: NoiseSource, parameter: ParameterNoise, chunks: int) -> bool:
    weight = parameter.parameter
    return weight.is_contiguous() and weight.dtype == _dtype_of_total(source, parameter, chunks)


def _dtype_of_total(source: NoiseSource, parameter: ParameterNoise, chunks: int) -> torch.dtype:
    """What a parameter's sum is taken in: where a kernel sums all of it at once, the parameter's own dtype."""
    dtype = parameter.parameter.dtype
    rounded_once = chunks == 1 and source.drawn_by_kernels(parameter)
    return dtype if rounded_once else torch.promote_types(dtype, torch.float32)


def _new_total(source: NoiseSource, parameter: ParameterNoise, chunks: int) -> Tensor:
    """Where a parameter's sum goes, not filled."""
    dtype = _dtype_of_total(source, parameter, chunks)
    return torch.empty((*parameter.stack, *parameter.layer), dtype=dtype, device=parameter.parameter.device)


def _add_sum_(
    total: Tensor,
    coefficients: Tensor,
    source: NoiseSource,
    parameter: ParameterNoise,
    chunk: ChunkNoise,
    alpha: float,
    beta: float,
) -> None:
    """``total = beta * total + alpha *`` a chunk's part of the direction; with `beta` 0 `total` may hold anything."""
    low_rank = parameter.kind == "low_rank"
    alpha *= float(direction_scale(source.config, low_rank=low_rank, sigma=parameter.sigma, rank=parameter.rank))
    if source.drawn_by_kernels(parameter):
        _add_sum_of_kernels_(total, coefficients, source, parameter, chunk, alpha, beta)
        return
    noise = source.noise(parameter, chunk)
    c = coefficients.to(total.dtype) * alpha
    if isinstance(noise, perturbation.LowRank):
        _add_low_rank_sum_(total, c, noise, beta)
    else:
        # Apart: `addmv_` would round what the total holds once for every draw.
        add_(total.view(-1), noise.reshape(len(noise), -1).to(total.dtype).mT @ c, 1.0, beta)


def _add_sum_of_kernels_(
    total: Tensor,
    coefficients: Tensor,
    source: NoiseSource,
    parameter: ParameterNoise,
    chunk: ChunkNoise,
    alpha: float,
    beta: float,
) -> None:
    """`_add_sum_` for a parameter whose noise kernels draw."""
    from .kernels.dense import add_dense_sum_drawn_
    from .kernels.update import add_low_rank_sum_, add_low_rank_sum_drawn_

    how = parameter.precision, parameter.rng, alpha, beta
    if parameter.kind == "dense":
        called(add_dense_sum_drawn_, total, coefficients, source.keys(parameter, chunk), *how)
        return
    # In the parameter's dtype: those are the numbers that the members saw.
    dtype = parameter.parameter.dtype
    factors = source.factors(parameter, chunk)
    if isinstance(factors, DrawnFactors):
        called(add_low_rank_sum_drawn_, total, coefficients, factors.keys, parameter.rank, dtype, *how)
    else:
        called(add_low_rank_sum_, total, coefficients, factors.A, factors.B, dtype, alpha, beta)
    increment_version(total)  # PyTorch does not see what a kernel writes


def _add_low_rank_sum_(total: Tensor, coefficients: Tensor, noise: perturbation.LowRank, beta: float) -> None:
    """``total = beta * total + sum_d c_d * A_d @ B_d.T``: for each stacked layer one product."""
    stack = total.ndim - 2
    A = noise.A.to(total.dtype) * coefficients.view(-1, *(1,) * (stack + 2))
    left, right = _columns(A, stack), _columns(noise.B.to(total.dtype), stack)
    if stack:
        total, left, right = (tensor.flatten(0, stack - 1) for tensor in (total, left, right))
    multiply = torch.bmm if stack else torch.mm
    if beta == 0:
        multiply(left, right.mT, out=total)
    elif left.shape[-1] <= _FEW_TERMS:
        (total.baddbmm_ if stack else total.addmm_)(left, right.mT, beta=beta)
    else:
        step = max(1, _BLOCK_BYTES // max(1, total[:1].numel() * total.element_size()))
        block = torch.empty_like(total[:step])
        for start in range(0, len(total), step):
            these = slice(start, start + step)
            summed = block[: len(total[these])]
            multiply(left[these], (right[these] if stack else right).mT, out=summed)
            add_(total[these], summed, 1.0, beta)


def _columns(factor: Tensor, stack: int) -> Tensor:
    """``(draws, *stack, features, rank)`` as ``(*stack, features, draws * rank)``."""
    return factor.permute(*range(1, stack + 2), 0, stack + 2).flatten(-2)
