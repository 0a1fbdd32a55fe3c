"""Functions that a population has to answer differently from PyTorch, whatever their weights.

Active while a model runs for the members of a chunk. Dropout draws each member's mask from its own key, so that it
depends neither on the chunk nor on PyTorch's generators. Batch normalisation in training mode uses the statistics of
the member's own batch and leaves the running ones alone. Attention and recurrent layers have no usable batching rule
in PyTorch, and of a `torch.autograd.Function`, which it may refuse, the forward pass is all that is wanted.
"""

import math
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch import vmap as functorch_vmap
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from . import ops
from .aten import function_behind
from .autocast import autocasts
from .derivatives import differentiates
from .perturbed import LowRankWeight, Weight, accepts, formed, unwrapped
from .vectorising import called

__all__ = ["MemberMode", "attention", "copied_each", "dropout", "replaced", "uniform", "vectorised_inside"]

_current: ContextVar["MemberMode | None"] = ContextVar("eggroll_member_mode", default=None)


class MemberMode(TorchFunctionMode):
    """Answers `FUNCTIONS` for the members of a chunk.

    Args:
        member: int64, shape ``()``, the member's index in the population, or 0 for the same randomness in all; one
            for each member under `vmap`.
        key: int32, shape ``(2,)``, the key of the generation's randomness.
        own: the member's tensors by the ids of the model's, for uses of those that no module holds under a name.
        fills_tensors: whether tensors that the model makes are the member's own from the start, so that it may put
            into them what it computes: `torch.vmap` allows no writes of members to what they share.
    """

    def __init__(self, member: Tensor, key: Tensor, own: dict[int, Tensor], fills_tensors: bool = False):
        super().__init__()
        self._member = member
        self._key = key
        self._own = own
        self._fills_tensors = fills_tensors
        self._calls = 0

    def __enter__(self) -> "MemberMode":
        self._token = _current.set(self)
        self.level = _level()
        _UNSEEN.begin()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _UNSEEN.end()
        _current.reset(self._token)
        super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer, kwargs = FUNCTIONS.get(function_behind(func)), kwargs or {}
        if not torch.compiler.is_compiling():  # Dynamo does not follow ids
            own = self._own
            for value in args:
                if id(value) in own or type(value) in (list, tuple):
                    args = tuple(map(self._of_member, args))
                    break
            if kwargs:
                kwargs = {name: self._of_member(value) for name, value in kwargs.items()}
        if answer is None:
            result = func(*args, **kwargs)
            return copied_each(self._member, result) if self._fills_tensors and func in _MADE else result
        try:
            return answer(*args, **kwargs)
        except TypeError:
            if accepts(answer, args, kwargs):
                raise
            return func(*args, **kwargs)  # which has another spelling of this call than the answer, or refuses it

    def _of_member(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._of_member, value))
        return self._own.get(id(value), value)

    def uniform(self, shape: torch.Size) -> Tensor:
        """Uniform numbers on [0, 1), the next ones of the member, float32."""
        call = self._calls
        self._calls += 1
        return called(ops.member_uniform, self._key, call, self._member, list(shape))


_MADE = {
    *(torch.zeros, torch.ones, torch.empty, torch.full),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full),
    *(torch.clone, torch.Tensor.clone),
}
"""What makes tensors to be filled."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What `MemberMode` answers, by PyTorch function. `eggroll_torch.rules` adds to it."""


def uniform(shape: torch.Size) -> Tensor:
    """The next uniform numbers on [0, 1) of the member that runs, float32."""
    mode = _current.get()
    assert mode is not None
    return mode.uniform(shape)


def copied_each(member: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor, of any dtype, for each member under `torch.vmap`, which may write to it."""
    return torch.where(member >= 0, tensor, tensor)


def vectorised_inside() -> bool:
    """Whether the model itself runs something under `torch.vmap`, or another transformation, right now."""
    mode = _current.get()
    return mode is not None and _level() != mode.level


def _level() -> int | None:
    """How many transformations of functions, such as `torch.vmap`, are at work; None for none."""
    return torch._C._functorch.maybe_current_level()


class _Unseen:
    """Answers, while a member runs, what no mode sees.

    That is `Function.apply`, which `vmap` refuses without a rule for it, for the thread that runs the member alone:
    others get what PyTorch does, and so does a model that takes derivatives. An `apply` that was taken from its class
    before is not seen here. And a weight that the model itself runs a `vmap` over, or takes a derivative with respect
    to: these take it without asking it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._original: Any = None
        self._answer = classmethod(self._apply)
        self._add_batch_dim: Any = None
        self._wrap_for_grad: Any = None

    def begin(self) -> None:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._original = vars(Function)["apply"]  # which may be another library's
                Function.apply = self._answer  # type: ignore[method-assign,assignment]
                self._add_batch_dim = functorch_vmap._add_batch_dim
                functorch_vmap._add_batch_dim = self._vectorised_over  # type: ignore[assignment]
                self._wrap_for_grad = eager_transforms._wrap_for_grad
                eager_transforms._wrap_for_grad = self._differentiated

    def end(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
            if vars(Function)["apply"] is self._answer:
                Function.apply = self._original  # type: ignore[method-assign]
            functorch_vmap._add_batch_dim = self._add_batch_dim
            eager_transforms._wrap_for_grad = self._wrap_for_grad

    def _vectorised_over(self, tensor: Tensor, dim: int, level: int) -> Tensor:
        return self._add_batch_dim(formed(tensor, "torch.vmap"), dim, level)

    def _differentiated(self, tensor: Tensor, level: int) -> Tensor:
        if isinstance(tensor, Weight):
            with retrieve_current_functorch_interpreter().lower():  # before there is a derivative
                tensor = formed(tensor, "torch.func")
        return self._wrap_for_grad(tensor, level)

    def _apply(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        has_rule = function.generate_vmap_rule or function.vmap is not Function.vmap
        if has_rule or differentiates() or _current.get() is None or _level() is None:
            return self._original.__get__(None, function)(*args, **kwargs)
        if function.setup_context is not Function.setup_context:
            return function.forward(*args, **kwargs)
        context = function._backward_cls()  # the context that PyTorch gives it
        context.needs_input_grad = (False,) * len(args)
        return function.forward(context, *args, **kwargs)


_UNSEEN = _Unseen()


def replaced(input: Tensor, result: Tensor, inplace: bool) -> Tensor:
    """What a function with an `inplace` argument returns."""
    return input.copy_(result) if inplace else result


def dropout(x: Tensor, p: float, shape: torch.Size | None = None) -> Tensor:
    """`x` with elements zeroed at rate `p` and the rest scaled up; `shape` broadcasts one decision over axes of 1."""
    mode = _current.get()
    if mode is None or vectorised_inside():
        return F.dropout(x, p) if shape is None else x * F.dropout(x.new_ones(shape), p)
    if not 0 <= p <= 1:
        raise ValueError(f"`p` must be a probability, got {p!r}")
    if p == 1:
        return x * 0
    keep = mode.uniform(x.shape if shape is None else shape) >= p
    return x * (keep.to(x.dtype) / (1 - p))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whose dropout is the member's own."""
    q, k, v = unwrapped(q), unwrapped(k), unwrapped(v)
    if dropout_p == 0 and not differentiates():
        return called(ops.attention, q, k, v, mask, is_causal, scale, enable_gqa)
    if dropout_p == 0 and _level() is None:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = (q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    shares = torch.softmax(scores, dim=-1)
    return (dropout(shares, dropout_p) if dropout_p else shares) @ v


def _answers(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            FUNCTIONS[function] = answer
        return answer

    return register


@_answers(F.dropout)
def _dropout(input, p=0.5, training=True, inplace=False):
    return replaced(input, dropout(unwrapped(input), p), inplace) if training and p else input


@_answers(torch.dropout)
def _torch_dropout(input, p, train):
    return _dropout(input, p, train)


@_answers(torch.dropout_)
def _torch_dropout_(input, p, train):
    return _dropout(input, p, train, inplace=True)


def _channel_dropout(spatial: int) -> Callable[..., Any]:
    def answer(input, p=0.5, training=True, inplace=False):
        x = unwrapped(input)
        shape = torch.Size((*x.shape[: x.ndim - spatial], *(1,) * spatial))
        return replaced(input, dropout(x, p, shape), inplace) if training and p else input

    return answer


for _function, _spatial in ((F.dropout1d, 1), (F.dropout2d, 2), (F.dropout3d, 3)):
    FUNCTIONS[_function] = _channel_dropout(_spatial)


@_answers(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        running_mean = running_var = None
    x = _widened(input, weight, running_mean)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).to(input.dtype)


@_answers(torch.batch_norm)
def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@_answers(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if use_input_stats:
        running_mean = running_var = None
    x = _widened(input, weight, running_mean)
    return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps).to(input.dtype)


def _norm(function: Callable[..., Any]) -> Callable[..., Any]:
    def answer(input, *args, **kwargs):
        out = function(input, *args, **kwargs)
        # On a CPU, or without autocast, the result has the input's dtype, which `vmap` widens to that of the weight.
        return out if input.device.type != "cpu" and autocasts(input.device) else out.to(input.dtype)

    return answer


def _group_norm(input, *args, **kwargs):
    # In another layout `torch.vmap` asks for one that it does not know.
    return F.group_norm(input.contiguous(), *args, **kwargs)


FUNCTIONS |= {F.layer_norm: _norm(F.layer_norm), F.group_norm: _norm(_group_norm), F.rms_norm: _norm(F.rms_norm)}


@_answers(torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def _data(input):
    # `torch.vmap` gives none. A low-rank weight has an answer of its own.
    return input.data if isinstance(input, LowRankWeight) or _level() is None else unwrapped(input).detach()


@_answers(torch.Tensor.requires_grad_)
def _requires_grad_(input, requires_grad=True):
    # Refused under `torch.vmap`, and without gradients of no consequence.
    return input if _level() is not None and not torch.is_grad_enabled() else input.requires_grad_(requires_grad)


@_answers(torch.Tensor.contiguous)
def _contiguous(input, memory_format=torch.contiguous_format):
    if memory_format != torch.contiguous_format and _level() is not None:
        return input  # `torch.vmap` knows no other layout, and numbers do not depend on it
    return input.contiguous(memory_format=memory_format)


@_answers(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(input, output_size):
    if output_size in (1, (1, 1), [1, 1]) and input.ndim in (3, 4):
        # The same numbers; PyTorch would go through the members of what lies in memory with channels last.
        return unwrapped(input).mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


def _widened(x: Tensor, *others: Tensor | None) -> Tensor:
    """`x` in the dtype of the others where that is wider, which `vmap` does not do by itself."""
    for other in others:
        x = x if other is None else x.to(torch.promote_types(x.dtype, other.dtype))
    return x


@_answers(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
