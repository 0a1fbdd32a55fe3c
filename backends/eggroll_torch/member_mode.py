"""The mode in which a model runs for the members of a chunk: some functions are answered otherwise than by PyTorch.

What draws random numbers draws each member's own, so that they depend neither on the chunk nor on PyTorch's
generators; what `torch.vmap` cannot do, or does badly, is done in another way. `eggroll_torch.rules` says which
functions these are, and what they return. Of a `torch.autograd.Function`, which `torch.vmap` may refuse, the forward
pass is all that is wanted.
"""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch import vmap as functorch_vmap
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from . import member_ops
from .aten import function_behind
from .derivatives import differentiates
from .perturbed import Weight, accepts, formed
from .vectorising import called

__all__ = [
    "FUNCTIONS",
    "MemberMode",
    "copied_each",
    "is_active",
    "transformation_level",
    "uniform",
    "vectorised_inside",
]

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
        self.level = transformation_level()
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
        return called(member_ops.member_uniform, self._key, call, self._member, list(shape))


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


def is_active() -> bool:
    """Whether a member runs, alone or under `torch.vmap` with others."""
    return _current.get() is not None


def vectorised_inside() -> bool:
    """Whether the model itself runs something under `torch.vmap`, or another transformation, right now."""
    mode = _current.get()
    return mode is not None and transformation_level() != mode.level


def transformation_level() -> int | None:
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
        if has_rule or differentiates() or _current.get() is None or transformation_level() is None:
            return self._original.__get__(None, function)(*args, **kwargs)
        if function.setup_context is not Function.setup_context:
            return function.forward(*args, **kwargs)
        context = function._backward_cls()  # the context that PyTorch gives it
        context.needs_input_grad = (False,) * len(args)
        return function.forward(context, *args, **kwargs)


_UNSEEN = _Unseen()
