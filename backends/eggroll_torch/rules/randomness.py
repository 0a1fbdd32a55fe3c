"""PyTorch's random functions, for which a member draws from its own key: the same whatever the chunk.

Those that are not here, such as `Tensor.exponential_` and `torch.randperm`, draw from PyTorch's generator, which
follows from the run's seed and, unless the randomness is the same for all members, from the first of the chunk.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..member_mode import FUNCTIONS, replaced, uniform
from ..perturbed import unwrapped

_OPTIONS = {"dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format"}
# What dropped elements of a self-normalising network become: minus SELU's scale times its alpha.
_SATURATED = -1.7580993408473766


def _normal(shape: torch.Size) -> Tensor:
    # In the middle of the 2**24 steps that a uniform number takes, so never 0 or 1.
    return torch.erfinv(uniform(shape) * 2 - (1 - 2.0**-24)) * math.sqrt(2)


def _answers(function: Any, answer: Callable[..., Any]) -> None:
    """Lets `answer` answer what it can, and the function itself the rest, such as calls with a generator."""

    def answered(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented
        if kwargs.get("generator") is None and kwargs.get("out") is None:
            result = answer(*args, **{k: v for k, v in kwargs.items() if k not in {"generator", "out"}})
        return function(*args, **kwargs) if result is NotImplemented else result

    FUNCTIONS[function] = answered


def _fresh(draw: Callable[[torch.Size], Tensor]) -> Callable[..., Any]:
    def answer(*shape: Any, size: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
        if size is None:
            size = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if not set(options) <= _OPTIONS:
            return NotImplemented
        return draw(torch.Size(size)).to(dtype or torch.get_default_dtype())

    return answer


def _like(draw: Callable[[torch.Size], Tensor]) -> Callable[..., Any]:
    def answer(input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        return draw(input.shape).to(dtype or input.dtype) if set(options) <= _OPTIONS else NotImplemented

    return answer


def _bernoulli(input: Tensor, p: float | None = None) -> Tensor:
    x = unwrapped(input)
    return (uniform(x.shape) < (x if p is None else p)).to(x.dtype)


def _normal_with(mean: Any, std: Any = 1.0, size: Any = None, **options: Any) -> Any:
    if options:
        return NotImplemented
    mean, std = unwrapped(mean), unwrapped(std)
    shape = size or torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    dtype = next((x.dtype for x in (mean, std) if isinstance(x, Tensor)), torch.get_default_dtype())
    return (mean + std * _normal(torch.Size(shape))).to(dtype)


def _multinomial(input: Tensor, num_samples: int, replacement: bool = False) -> Any:
    shares = unwrapped(input).double()
    *lead, count = shares.shape
    if num_samples > count and not replacement:
        return NotImplemented  # PyTorch says what is wrong
    if replacement or num_samples == 1:
        until = shares.cumsum(-1)
        drawn = uniform(torch.Size((*lead, num_samples))) * until[..., -1:]
        return (drawn.unsqueeze(-1) >= until.unsqueeze(-2)).sum(-1)
    # The first of a race are a draw without replacement (Gumbel, or exponential, top-k).
    arrival = -torch.log(uniform(shares.shape).double() + 2.0**-25) / shares
    return torch.topk(arrival, num_samples, largest=False).indices


def _alpha_dropout(by_channel: bool) -> Callable[..., Any]:
    def answer(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
        if not training or not 0 < p < 1:
            return NotImplemented
        x = unwrapped(input)
        shape = torch.Size((*x.shape[:2], *(1,) * (x.ndim - 2))) if by_channel else x.shape
        kept = torch.where(uniform(shape) >= p, x, _SATURATED)
        scale = 1 / math.sqrt((1 - p) * (1 + p * _SATURATED**2))
        return replaced(input, ((kept - p * _SATURATED) * scale).to(x.dtype), inplace)

    return answer


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.rand: _fresh(lambda shape: uniform(shape)),
    torch.randn: _fresh(_normal),
    torch.rand_like: _like(lambda shape: uniform(shape)),
    torch.randn_like: _like(_normal),
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.normal: _normal_with,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    F.alpha_dropout: _alpha_dropout(by_channel=False),
    F.feature_alpha_dropout: _alpha_dropout(by_channel=True),
}
for _function, _answer in _ANSWERS.items():
    _answers(_function, _answer)
