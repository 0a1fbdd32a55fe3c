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

from ..member_mode import FUNCTIONS, uniform, vectorised_inside
from ..perturbed import unwrapped
from .layers import replaced

_OPTIONS = {"dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format"}
# What dropped elements of a self-normalising network become: minus SELU's scale times its alpha.
_SATURATED = -1.7580993408473766


# Mantissa bits of a uniform number on [0, 1): one more would be rounded up to 1.
_BITS = {torch.float16: 11, torch.bfloat16: 8}


def _uniform(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Uniform numbers on [0, 1) of a floating-point dtype."""
    drawn = uniform(shape)
    if dtype in _BITS:
        drawn = (drawn * 2.0 ** _BITS[dtype]).floor() * 2.0 ** -_BITS[dtype]
    return drawn.to(dtype)


def _normal(shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    # In the middle of the 2**24 steps that a uniform number takes, so never 0 or 1.
    return (torch.erfinv(uniform(shape) * 2 - (1 - 2.0**-24)) * math.sqrt(2)).to(dtype)


def _fine(shape: torch.Size) -> Tensor:
    """Uniform numbers on [0, 1) of 48 bits, float64."""
    return uniform(shape).double() + uniform(shape).double() * 2.0**-24


def _exponential(shape: torch.Size, lambd: float = 1.0) -> Tensor:
    return -torch.log(uniform(shape).double() + 2.0**-25) / lambd


def _answers(function: Any, answer: Callable[..., Any]) -> None:
    """Lets `answer` answer what it can, and the function itself the rest, such as calls with a generator.

    Under a `torch.vmap` of the model's own, too, the function itself draws: the member is the same in all entries.
    """

    def answered(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented
        if kwargs.get("generator") is None and kwargs.get("out") is None and not vectorised_inside():
            result = answer(*args, **{k: v for k, v in kwargs.items() if k not in {"generator", "out"}})
        return function(*args, **kwargs) if result is NotImplemented else result

    FUNCTIONS[function] = answered


Draw = Callable[[torch.Size, torch.dtype], Tensor]

# An answer of NotImplemented to what is wrong leaves it to PyTorch to say so.


def _fresh(draw: Draw) -> Callable[..., Any]:
    def answer(*shape: Any, size: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
        if size is None:
            size = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        dtype = dtype or torch.get_default_dtype()
        if not set(options) <= _OPTIONS or not dtype.is_floating_point:
            return NotImplemented
        return draw(torch.Size(size), dtype)

    return answer


def _like(draw: Draw) -> Callable[..., Any]:
    def answer(input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        dtype = dtype or input.dtype
        if not set(options) <= _OPTIONS or not dtype.is_floating_point:
            return NotImplemented
        return draw(input.shape, dtype)

    return answer


def _bernoulli(input: Tensor, p: float | None = None) -> Any:
    x = unwrapped(input)
    if isinstance(p, float | int) and not 0 <= p <= 1:
        return NotImplemented
    return (uniform(x.shape) < (x if p is None else p)).to(x.dtype)


def _normal_with(
    mean: Any, std: Any = 1.0, size: Any = None, *, dtype: torch.dtype | None = None, **options: Any
) -> Any:
    mean, std = unwrapped(mean), unwrapped(std)
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
    if not set(options) <= _OPTIONS or not dtype.is_floating_point or (not isinstance(std, Tensor) and std < 0):
        return NotImplemented
    shape = torch.broadcast_shapes(*(x.shape for x in tensors)) if size is None else size
    return (mean + std * _normal(torch.Size(shape))).to(dtype)


def _multinomial(input: Tensor, num_samples: int, replacement: bool = False) -> Any:
    shares = unwrapped(input).double()
    *lead, count = shares.shape
    if num_samples > count and not replacement:
        return NotImplemented
    if replacement or num_samples == 1:
        until = shares.cumsum(-1)
        drawn = uniform(torch.Size((*lead, num_samples))) * until[..., -1:]
        return (drawn.unsqueeze(-1) >= until.unsqueeze(-2)).sum(-1)
    # The first of a race are a draw without replacement (Gumbel, or exponential, top-k).
    return torch.topk(_exponential(shares.shape) / shares, num_samples, largest=False).indices


def _permutation(n: int, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    dtype = dtype or torch.int64
    if not set(options) <= _OPTIONS or not _holds(dtype, n - 1):
        return NotImplemented
    return _fine(torch.Size([n])).argsort().to(dtype)


def _integers(*bounds: Any, size: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """``randint(high, size)`` or ``randint(low, high, size)``, each argument by its place or by its name."""
    if size is None and bounds:
        bounds, size = bounds[:-1], bounds[-1]
    named: dict[str, Any] = {name: options.pop(name) for name in ("low", "high") if name in options}
    places = [name for name in ("low", "high") if name not in named]
    if len(bounds) == 1 and len(places) == 2:
        places = ["high"]
    named |= dict(zip(places, bounds, strict=False))
    low, high = named.get("low", 0), named.get("high")
    dtype = dtype or torch.int64
    # 48 bits give every number of a range of 32 its share, to 2**-16.
    if size is None or high is None or not set(options) <= _OPTIONS or not low < high <= low + 2**32:
        return NotImplemented
    if not _holds(dtype, high - 1) or not _holds(dtype, low):
        return NotImplemented
    drawn = (_fine(torch.Size(size)) * (high - low)).floor().to(torch.int64)
    return (low + drawn).to(dtype)


def _integers_like(input: Tensor, *bounds: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return _integers(*bounds, size=input.shape, dtype=dtype or input.dtype, **options)


def _holds(dtype: torch.dtype, number: int) -> bool:
    if dtype.is_complex or dtype == torch.bool:
        return False
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min <= number <= limits.max


def _gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    x = unwrapped(logits)
    soft = torch.softmax((x - _exponential(x.shape).log().to(x.dtype)) / tau, dim)
    return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0) if hard else soft


def _in_place(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` takes a tensor and the arguments of the method."""

    def answer(input: Tensor, *args: Any, **options: Any) -> Any:
        drawn = draw(input, *args, **options)
        if drawn is NotImplemented:
            return drawn
        try:
            return input.copy_(drawn)
        except RuntimeError:  # of a tensor that all members share, which PyTorch refuses, or fills for all alike
            return NotImplemented

    return answer


def _integers_between(like: Tensor, *bounds: int, **options: int) -> Any:
    bounds = (*bounds, *(options[name] for name in ("from", "to") if name in options))
    return _integers(*bounds, size=like.shape, dtype=like.dtype) if bounds and None not in bounds else NotImplemented


def _uniform_between(like: Tensor, low: float = 0.0, high: float = 1.0, **options: float) -> Any:
    low, high = options.get("from", low), options.get("to", high)
    if not like.is_floating_point() or low > high:
        return NotImplemented
    return low + (high - low) * _uniform(like.shape, like.dtype)


def _normal_around(like: Tensor, mean: float = 0.0, std: float = 1.0) -> Any:
    return mean + std * _normal(like.shape) if like.is_floating_point() and std >= 0 else NotImplemented


def _exponential_at(like: Tensor, lambd: float = 1.0) -> Any:
    return _exponential(like.shape, lambd) if like.is_floating_point() and lambd > 0 else NotImplemented


def _coins(like: Tensor, p: Any = 0.5) -> Any:
    return NotImplemented if isinstance(p, float | int) and not 0 <= p <= 1 else uniform(like.shape) < p


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
    torch.rand: _fresh(_uniform),
    torch.randn: _fresh(_normal),
    torch.rand_like: _like(_uniform),
    torch.randn_like: _like(_normal),
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.normal: _normal_with,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    torch.randperm: _permutation,
    torch.randint: _integers,
    torch.randint_like: _integers_like,
    torch.Tensor.random_: _in_place(_integers_between),
    torch.Tensor.uniform_: _in_place(_uniform_between),
    torch.Tensor.normal_: _in_place(_normal_around),
    torch.Tensor.bernoulli_: _in_place(_coins),
    torch.Tensor.exponential_: _in_place(_exponential_at),
    F.gumbel_softmax: _gumbel_softmax,
    F.alpha_dropout: _alpha_dropout(by_channel=False),
    F.feature_alpha_dropout: _alpha_dropout(by_channel=True),
}
for _function, _answer in _ANSWERS.items():
    _answers(_function, _answer)
