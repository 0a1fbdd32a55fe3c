"""The direction that the optimizer descends, summed over chunks of members. The oracle is `eggroll.update`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from eggroll import perturbation
from eggroll.update import direction_scale, weights_of_draws

from .noise import NoiseSource
from .parameters import ParameterNoise

__all__ = ["direction"]


@torch.no_grad()
def direction(
    source: NoiseSource, weights: Tensor, chunks: Iterable[range], progress: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """The direction of every perturbed parameter.

    Args:
        source: the noise of the generation that was evaluated.
        weights: shape ``(population_size,)``, the shaped fitness.
        chunks: the members, in chunks of whole pairs; their order does not matter.
        progress: called after each chunk.

    Returns:
        By parameter name, float32 (float64 for float64 parameters), in the shape of the parameter.
    """
    totals = {
        parameter.name: torch.zeros(
            (*parameter.stack, *parameter.layer),
            dtype=torch.promote_types(parameter.parameter.dtype, torch.float32),
            device=parameter.parameter.device,
        )
        for parameter in source.parameters
    }
    for members in chunks:
        chunk = source.chunk(members)
        coefficients = weights_of_draws(
            weights[members.start : members.stop].to(chunk.signs.device), chunk.signs, source.config
        )
        for parameter in source.parameters:
            total = totals[parameter.name]
            if source.in_registers(parameter):
                _add_drawn_sum_(total, coefficients, source.keys(parameter, chunk), parameter)
                continue
            noise = source.noise(parameter, chunk)
            c = coefficients.to(total.dtype)
            if isinstance(noise, perturbation.LowRank):
                _add_low_rank_sum_(total, c, noise)
            else:
                total.view(-1).addmv_(noise.reshape(len(noise), -1).to(total.dtype).mT, c)
        if progress is not None:
            progress()
    return {
        parameter.name: totals[parameter.name].mul_(_scale(source, parameter)).view(parameter.parameter.shape)
        for parameter in source.parameters
    }


def _scale(source: NoiseSource, parameter: ParameterNoise) -> float:
    low_rank = parameter.kind == "low_rank"
    return float(direction_scale(source.config, low_rank=low_rank, sigma=parameter.sigma, rank=parameter.rank))


def _add_drawn_sum_(total: Tensor, coefficients: Tensor, keys: Tensor, parameter: ParameterNoise) -> None:
    """Adds the sum over draws of a parameter whose noise kernels draw, from its keys."""
    from .kernels.dense import add_dense_sum_drawn_
    from .kernels.update import add_low_rank_sum_drawn_

    how = parameter.precision, parameter.rng
    if parameter.kind == "dense":
        add_dense_sum_drawn_(total, coefficients, keys, *how)
    else:
        # In the parameter's dtype: those are the numbers that the members saw.
        dtype = parameter.parameter.dtype
        add_low_rank_sum_drawn_(total, coefficients, keys, parameter.rank, dtype, *how)


def _add_low_rank_sum_(total: Tensor, coefficients: Tensor, noise: perturbation.LowRank) -> None:
    """Adds ``sum_d c_d * A_d @ B_d.T``: for each stacked layer one product over draws and columns."""
    stack = total.ndim - 2
    A = noise.A.to(total.dtype) * coefficients.view(-1, *(1,) * (stack + 2))
    left, right = _columns(A, stack), _columns(noise.B.to(total.dtype), stack)
    if stack:
        flat = total.view(-1, *total.shape[-2:])
        flat.baddbmm_(left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:]).mT)
    else:
        total.addmm_(left, right.mT)


def _columns(factor: Tensor, stack: int) -> Tensor:
    """``(draws, *stack, features, rank)`` as ``(*stack, features, draws * rank)``."""
    return factor.permute(*range(1, stack + 2), 0, stack + 2).flatten(-2)
