"""A perturbed weight: a tensor that ordinary model code consumes without knowing.

`PerturbedWeight` looks like the parameter it was made from. `torch.nn.functional.linear`, `@`, `embedding` and so on
find a rule (see `eggroll_torch.rules`) that applies the low-rank term without forming ``W_i``; transposing, slicing
and splitting give another perturbed weight. What has no rule is materialised for the members of the current chunk,
with one warning, or refused in strict mode.
"""

import contextlib
import functools
import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from eggroll import prng

from . import ops
from .aten import function_behind
from .derivatives import differentiates
from .noise import DrawnFactors, StoredFactors
from .vectorising import called

__all__ = ["MaterialisedWarning", "Noise", "PerturbedWeight", "Policy", "UnsupportedOperationError", "Way", "accepts"]


class MaterialisedWarning(UserWarning):
    """Slower or larger than it could be: a weight was formed for every member, or members ran one by one."""


class UnsupportedOperationError(NotImplementedError):
    """The operation cannot be done for a population, or `strict` forbids the way in which it could be."""


@dataclass
class Way:
    """How calls of one kind have turned out to run.

    Attributes:
        writes_to_inputs: whether the model changes its inputs in place, once it has run.
        fills_tensors: whether the model puts what members compute into tensors that it makes, such as zeros, or
            into its buffers.
        own_buffers: the names of those buffers, and of tensors that are plain attributes.
        own_inputs: whether the model puts what members compute into its inputs, or into what it makes of them alone.
        one_by_one: the model cannot be vectorised over members.
        captured: the model has operators that have to be captured as a whole, such as `torch.cond`, in which the use
            of weights is not seen.
    """

    writes_to_inputs: bool | None = None
    fills_tensors: bool = False
    own_buffers: frozenset[str] = frozenset()
    own_inputs: bool = False
    one_by_one: bool = False
    captured: bool = False


@dataclass
class Policy:
    """What to do about operations without a rule, and what was seen of the model and its parameters.

    Attributes:
        strict: raise instead of materialising or running members one by one.
        warned: what was warned about.
        used: names of the parameters that took part in a computation.
        forward_passes: how many were seen whose use of parameters could be followed.
        ways: by kind of call.
    """

    strict: bool = False
    warned: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    forward_passes: int = 0
    ways: defaultdict[Hashable, Way] = field(default_factory=lambda: defaultdict(Way))

    def unused(self, names: Iterable[str]) -> list[str]:
        """The parameters that took no part in any forward pass so far; none where no pass could be followed."""
        return [name for name in names if name not in self.used] if self.forward_passes else []

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Notes which parameters of the model itself are used inside, the first time that some are.

        Nothing is concluded for modules that are `_opaque`, nor where no parameter is used at all, as by a score that
        is computed elsewhere.
        """
        if self.forward_passes or _opaque(model):
            yield
            return
        with _Watch({id(parameter): name for name, parameter in model.named_parameters()}, self.used):
            yield
        self.forward_passes += bool(self.used)

    @contextlib.contextmanager
    def watching_member(self, model: nn.Module, parameters: Mapping[str, Tensor], way: Way) -> Iterator[None]:
        """Notes which parameters of a member that runs alone are used inside; all where that cannot be seen."""
        if way.captured or _opaque(model):
            self.used.update(parameters)
            yield
            return
        with _Watch({id(parameter): name for name, parameter in parameters.items()}, self.used):
            yield

    def run(
        self,
        way: Way,
        vectorised: Callable[[], Any],
        written_to: Callable[[], frozenset[str]],
        one_by_one: Callable[[], Any],
    ) -> Any:
        """What `vectorised` returns, or, where the model cannot be vectorised, `one_by_one`, which is said once.

        Before that it is tried whether it is enough that members have tensors of their own to write to.

        Args:
            way: how the call runs, which is noted there.
            vectorised: runs all members at once.
            written_to: runs one member alone; the names of the buffers that it has written to.
            one_by_one: runs members one by one.
        """
        if way.one_by_one:
            return one_by_one()
        try:
            return vectorised()
        except (UnsupportedOperationError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problem = error
        way.captured = isinstance(problem, torch._dynamo.exc.UncapturedHigherOrderOpError)
        if not way.fills_tensors:
            # Not every error means that vmap is at fault: if members fail alone too, theirs is the true one.
            way.own_buffers = written_to()
            way.fills_tensors = True
            for way.own_inputs in (False, True):
                with contextlib.suppress(Exception):
                    return vectorised()
            way.fills_tensors, way.own_buffers, way.own_inputs = False, frozenset(), False
        result = one_by_one()
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        self.fall_back(
            f"the model cannot be vectorised over members ({reason})",
            "members run one by one",
        )
        way.one_by_one = True
        return result

    def fall_back(self, problem: str, remedy: str, kind: str | None = None) -> None:
        """Warns once that `remedy` is taken because of `problem`, or of its `kind`, or raises in strict mode."""
        if self.strict:
            raise UnsupportedOperationError(f"{problem}; strict=True forbids the way around: {remedy}")
        if (kind or problem) not in self.warned:
            self.warned.add(kind or problem)
            warnings.warn(f"{problem}: {remedy}", MaterialisedWarning, stacklevel=2)


def _opaque(model: nn.Module) -> bool:
    """Whether there are compiled or scripted modules, which compute where `_Watch` cannot see."""
    opaque = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return any(isinstance(module, opaque) for module in model.modules())


class _Watch(TorchFunctionMode):
    """Notes the names of parameters that are handed to PyTorch's functions for more than their metadata."""

    def __init__(self, names: dict[int, str], used: set[str]):
        super().__init__()
        self._names = names
        self._used = used

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _METADATA:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (name := self._names.get(id(leaf))) is not None:
                    self._used.add(name)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Noise:
    """The low-rank noise that a perturbed weight carries.

    A weight of shape ``(*stack, rows, columns)`` is ``W + scales[member] * A[d] @ B[d].T``, where ``d`` is the
    member's draw, ``member // (members / draws)``.

    Attributes:
        factors: `A`, shape ``(draws, *stack, rows, rank)``, and `B`, ``(draws, *stack, columns, rank)``, or the keys
            that they are drawn from.
        member: int64, shape ``()``: the member's place in the chunk, one for each member under `vmap`.
        scales: float32, shape ``(members,)``: ``sigma / sqrt(rank)`` times the member's sign.
        name: of the parameter.
        policy: shared by all weights of a population.
        kernel: for the weight of a convolution, its shape; `A` and `B` then belong to the matrix
            ``(kernel[0], prod(kernel[1:]))``.
    """

    factors: StoredFactors | DrawnFactors
    member: Tensor
    scales: Tensor
    name: str
    policy: Policy
    kernel: tuple[int, ...] | None = None

    @property
    def A(self) -> Tensor:
        """Shape ``(draws, *stack, rows, rank)``."""
        return self.factors.A

    @property
    def B(self) -> Tensor:
        """Shape ``(draws, *stack, columns, rank)``."""
        return self.factors.B

    def having(self, A: Tensor, B: Tensor) -> "Noise":
        """The same with other factors, those of a view of the weight."""
        return replace(self, factors=StoredFactors(A, B))

    def of_member(self) -> tuple[Tensor, Tensor]:
        """The member's ``scale * A``, ``(*stack, rows, rank)``, and ``B``, ``(*stack, columns, rank)``."""
        self.policy.used.add(self.name)
        # Not ``A[draw]``: before 2.10 PyTorch reads the value of an index without axes, which `vmap` refuses.
        member = self.member.view(1)
        draw = member // (self.scales.shape[0] // self.A.shape[0])
        A, B, scale = self.A.index_select(0, draw), self.B.index_select(0, draw), self.scales.index_select(0, member)
        return A.squeeze(0) * scale.to(A.dtype), B.squeeze(0)

    def operands(self) -> tuple[Tensor, Tensor]:
        """What the operations of `eggroll_torch.ops` take after the weight and the factors."""
        self.policy.used.add(self.name)
        return self.member, self.scales


class Weight(torch.Tensor):
    """A parameter as one member sees it: a tensor without values, which its `__torch_function__` puts in.

    Not `as_subclass`, which recording cannot follow and which takes no tensor that is of a subclass itself.

    Attributes:
        base: the values, or those before they are perturbed.
    """

    base: Tensor
    _is_param = True  # what `isinstance(weight, nn.Parameter)` asks for

    @classmethod
    def wrapping(cls, base: Tensor) -> Self:
        weight: Self = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, base.stride(), dtype=base.dtype, device=base.device
        )
        weight.base = base
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            return func == _REQUIRES_GRAD or func(
                *map(plain, args), **{name: plain(value) for name, value in kwargs.items()}
            )
        return cls.computed(func, args, kwargs)

    @classmethod
    def computed(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function that is about values returns."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        # What does not ask `__torch_function__`, such as TorchScript.
        args, kwargs = pytree.tree_map(lambda leaf: formed(leaf, str(func)), (args, kwargs or {}))
        return func(*args, **kwargs)


class LowRankWeight(Weight):
    """A weight that stays in parts where there is a rule for what is done with it, and is formed where there is none.

    Attributes:
        noise: its low-rank noise.
    """

    noise: Noise
    rules: ClassVar[dict[Any, Callable[..., Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.rules = {}

    def formed(self) -> Tensor:
        """The member's weight, an ordinary tensor."""
        raise NotImplementedError

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix: no stack of them, no convolution kernel."""
        return self.ndim == 2 and self.noise.kernel is None

    @classmethod
    def computed(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        rule = cls.rules.get(function_behind(func))
        if rule is not None:
            try:
                result = rule(*args, **kwargs)
            except TypeError:
                if accepts(rule, args, kwargs):
                    raise
                result = NotImplemented  # PyTorch has another spelling of this call than the rule
            if result is not NotImplemented:
                return result
        return _with_weights_formed(func, args, kwargs)


class PerturbedWeight(LowRankWeight):
    """``W + scales[member] * A[d] @ B[d].T``, where ``d`` is the member's draw.

    Attributes:
        base: ``W``, shape ``(*stack, rows, columns)``.
        noise: the rest.
    """

    @staticmethod
    def make(base: Tensor, noise: Noise) -> "PerturbedWeight":
        perturbed = PerturbedWeight.wrapping(base)
        perturbed.noise = noise
        return perturbed

    def formed(self) -> Tensor:
        A, B = self.noise.of_member()
        base = plain(self)
        return base + (A @ B.mT).reshape(base.shape)


class ScaledWeight(LowRankWeight):
    """``diag(rows) @ W_i @ diag(columns)``: a perturbed weight times what may be the member's own.

    Attributes:
        weight: ``W_i``, a matrix or a convolution kernel, whose rows are along axis 0.
        rows: shape ``(rows,)`` or ``()``, or None for ones.
        columns: shape ``(columns,)`` or ``()``, or None for ones, as for every convolution kernel.
    """

    weight: PerturbedWeight
    rows: Tensor | None
    columns: Tensor | None

    @staticmethod
    def make(weight: PerturbedWeight, rows: Tensor | None, columns: Tensor | None) -> "ScaledWeight":
        scaled = ScaledWeight.wrapping(plain(weight))
        scaled.noise = weight.noise
        scaled.weight, scaled.rows, scaled.columns = weight, rows, columns
        return scaled

    def formed(self) -> Tensor:
        values = self.weight.formed()
        rows = self.rows
        if rows is not None and rows.ndim:
            rows = rows.view(-1, *(1,) * (values.ndim - 1))
        return times(times(values, rows), self.columns)


@dataclass(frozen=True)
class DenseNoise:
    """Dense noise ``scales[member] * Z[d]`` that kernels draw where they need it; see `Noise`.

    Attributes:
        keys: int32, shape ``(draws, 2)``.
        precision, rng: the dtype to draw in and the generator, see `eggroll.prng.normal`.
        member: int64, shape ``()``.
        scales: float32, shape ``(members,)``: ``sigma`` times the member's sign.
    """

    keys: Tensor
    precision: prng.Precision
    rng: prng.Rng
    member: Tensor
    scales: Tensor


class DenseWeight(Weight):
    """A parameter with dense noise: an ordinary tensor that notes its use, or one that becomes one when it is used.

    Attributes:
        noise: what kernels are yet to add to `base`; None where it is there.
    """

    use: Callable[[], None]
    """Notes that the parameter took part in a computation."""
    noise: DenseNoise | None

    @staticmethod
    def make(base: Tensor, name: str, policy: Policy, noise: DenseNoise | None = None) -> "DenseWeight":
        dense = DenseWeight.wrapping(base)
        dense.use = functools.partial(policy.used.add, name)
        dense.noise = noise
        return dense

    def values(self) -> Tensor:
        """The parameter as the member sees it."""
        self.use()
        noise = self.noise
        if noise is None:
            return self.base
        operands = noise.keys, noise.precision, noise.rng, noise.member, noise.scales
        values = called(ops.perturbed_dense, self.base, *operands)
        if not differentiates():  # whose tensors are over with it
            # Once: a model may write to it.
            self.base, self.noise = values, None
        return values

    @classmethod
    def computed(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def used(leaf: Any) -> Any:
            return unwrapped(leaf) if type(leaf) is cls else leaf

        args, kwargs = pytree.tree_map(used, (args, kwargs))
        return func(*args, **kwargs)


def plain(weight: Tensor) -> Tensor:
    """The ordinary tensor under a weight: the values before noise that is not added yet."""
    return weight.base if isinstance(weight, Weight) else weight


def unwrapped(value: Any) -> Any:
    """A tensor that may be a parameter, used as data: an ordinary tensor. Other values as they are."""
    if isinstance(value, DenseWeight):
        return value.values()
    return value.formed() if isinstance(value, LowRankWeight) else value


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor`` in the dtype of `x`; no factor is 1."""
    return x if factor is None else x * factor.to(x.dtype)


def rule(
    *functions: Any, of: tuple[type[LowRankWeight], ...] = (PerturbedWeight,)
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what a function does with weights of these kinds among its arguments.

    A rule returns NotImplemented for arguments that it does not cover; the weights are then materialised.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for kind in of:
            kind.rules |= dict.fromkeys(functions, rule)
        return rule

    return register


EITHER = (PerturbedWeight, ScaledWeight)


def formed(value: Any, operation: str) -> Any:
    """A tensor as an operation without a rule needs it: where it is a perturbed weight, materialised."""
    if isinstance(value, LowRankWeight):
        value.noise.policy.fall_back(
            f"no low-rank rule for {operation} on parameter {value.noise.name!r}",
            "the weight is materialised for every member of a chunk (said once for this operation)",
            kind=operation,
        )
    return unwrapped(value)


def _with_weights_formed(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    operation = _operation(func)
    if args and isinstance(args[0], LowRankWeight) and _IN_PLACE.fullmatch(operation):
        # One by one members have weights of their own, which they can change.
        raise RuntimeError(f"{operation} changes parameter {args[0].noise.name!r} in place")

    def of_member(leaf: Any) -> Any:
        return formed(leaf, operation) if isinstance(leaf, LowRankWeight) else leaf

    args, kwargs = pytree.tree_map(of_member, (args, kwargs))
    return func(*args, **kwargs)


def _operation(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    return f"the attribute {func.__self__.__name__!r}" if name == "__get__" else name  # type: ignore[attr-defined]


_IN_PLACE = re.compile(r".*[^_]_|__set(item)?__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|[lr]shift)__")


def accepts(rule: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a rule can be called with these arguments."""
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]

# What asks about the tensor, not about its values.
_ATTRIBUTES = """
    shape dtype device layout ndim requires_grad is_leaf grad grad_fn itemsize nbytes output_nr _version
    is_cuda is_cpu is_meta is_mps is_xpu is_mkldnn is_sparse is_sparse_csr is_quantized is_nested
"""
_METHODS = """
    size dim ndimension numel nelement __len__ stride storage_offset element_size get_device data_ptr untyped_storage
    is_floating_point is_complex is_contiguous is_signed is_inference
"""
_METADATA: set[Any] = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
