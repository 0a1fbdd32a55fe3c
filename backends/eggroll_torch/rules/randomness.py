"""PyTorch's random functions, for which a member draws from its own key: the same whatever the chunk.

Those that are not here, such as `torch.poisson`, draw from PyTorch's generator, which follows from the run's seed
and, unless the randomness is the same for all members, from the first of the chunk.
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


def _fine(shape: torch.Size) -> Tensor:
    """Uniform numbers on [0, 1) of 48 bits, float64."""
    return uniform(shape).double() + uniform(shape).double() * 2.0**-24


def _exponential(shape: torch.Size, lambd: float = 1.0) -> Tensor:
    return -torch.log(uniform(shape).double() + 2.0**-25) / lambd


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
    return torch.topk(_exponential(shares.shape) / shares, num_samples, largest=False).indices


def _permutation(n: int, *, dtype: torch.dtype = torch.int64, **options: Any) -> Any:
    return _fine(torch.Size([n])).argsort().to(dtype) if set(options) <= _OPTIONS else NotImplemented


def _integers(*bounds: Any, size: Any = None, dtype: torch.dtype = torch.int64, **options: Any) -> Any:
    """``randint(high, size)`` or ``randint(low, high, size)``, each argument by its place or by its name."""
    if size is None and bounds:
        bounds, size = bounds[:-1], bounds[-1]
    low = options.pop("low", bounds[0] if len(bounds) == 2 else 0)
    high = options.pop("high", bounds[-1] if bounds else None)
    if size is None or high is None or not set(options) <= _OPTIONS or not low < high <= low + 2**32:
        return NotImplemented
    return (low + (_fine(torch.Size(size)) * (high - low)).floor()).to(dtype)


def _integers_like(input: Tensor, *bounds: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return _integers(*bounds, size=input.shape, dtype=dtype or input.dtype, **options)


def _gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    x = unwrapped(logits)
    soft = torch.softmax((x - _exponential(x.shape).log().to(x.dtype)) / tau, dim)
    return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0) if hard else soft


def _in_place(draw: Callable[..., Tensor]) -> Callable[..., Any]:
    """`draw` takes a shape and the arguments of the method."""

    def answer(input: Tensor, *args: Any, **options: Any) -> Any:
        drawn = draw(input.shape, *args, **options)
        try:
            return input.copy_(drawn)
        except RuntimeError:  # of a tensor that all members share, which PyTorch refuses, or fills for all alike
            return NotImplemented

    return answer


def _uniform_between(shape: torch.Size, low: float = 0.0, high: float = 1.0, **options: float) -> Tensor:
    low, high = options.get("from", low), options.get("to", high)
    return low + (high - low) * uniform(shape)


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
    torch.randperm: _permutation,
    torch.randint: _integers,
    torch.randint_like: _integers_like,
    torch.Tensor.uniform_: _in_place(_uniform_between),
    torch.Tensor.normal_: _in_place(lambda shape, mean=0.0, std=1.0: mean + std * _normal(shape)),
    torch.Tensor.bernoulli_: _in_place(lambda shape, p=0.5: uniform(shape) < p),
    torch.Tensor.exponential_: _in_place(_exponential),
    F.gumbel_softmax: _gumbel_softmax,
    F.alpha_dropout: _alpha_dropout(by_channel=False),
    F.feature_alpha_dropout: _alpha_dropout(by_channel=True),
}
for _function, _answer in _ANSWERS.items():
    _answers(_function, _answer)
