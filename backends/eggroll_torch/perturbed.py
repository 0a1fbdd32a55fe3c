"""A perturbed weight: a tensor that ordinary model code consumes without knowing.

`PerturbedWeight` looks like the parameter it was made from. `torch.nn.functional.linear`, `@`, `embedding` and so on
find a rule here that applies the low-rank term without forming ``W_i``; transposing, slicing and splitting give
another perturbed weight. What has no rule is materialised for the members of the current chunk, with one warning,
or refused in strict mode.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

__all__ = ["MaterialisedWarning", "PerturbedWeight", "Policy"]


class MaterialisedWarning(UserWarning):
    """An operation has no low-rank rule: the weight was formed for every member of the chunk."""


@dataclass
class Policy:
    """What to do about operations without a rule, and what was seen of the parameters.

    Attributes:
        strict: raise instead of materialising.
        warned: (operation, parameter) pairs that were warned about.
        used: names of the parameters that took part in a computation.
    """

    strict: bool = False
    warned: set[tuple[str, str]] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def materialise(self, operation: str, parameter: str) -> None:
        message = f"no low-rank rule for {operation} on parameter {parameter!r}"
        if self.strict:
            raise NotImplementedError(f"{message}, and strict=True forbids to materialise the weight of every member")
        if (operation, parameter) not in self.warned:
            self.warned.add((operation, parameter))
            warnings.warn(
                f"{message}: the weight is materialised for every member of a chunk",
                MaterialisedWarning,
                stacklevel=6,
            )


@dataclass(frozen=True)
class Noise:
    """The low-rank noise that a perturbed weight carries.

    A weight of shape ``(*stack, rows, columns)`` is ``W + signs[member] * scale * A[d] @ B[d].T``.

    Attributes:
        A: shape ``(draws, *stack, rows, rank)``.
        B: shape ``(draws, *stack, columns, rank)``.
        member: int64, shape ``()``: the member's place in the chunk, one for each member under `vmap`.
        signs: float32, shape ``(members,)``.
        scale: ``sigma / sqrt(rank)``.
        name: of the parameter.
        policy: shared by all weights of a population.
    """

    A: Tensor
    B: Tensor
    member: Tensor
    signs: Tensor
    scale: float
    name: str
    policy: Policy

    def of_member(self) -> tuple[Tensor, Tensor]:
        """The member's own ``signs * scale * A``, shape ``(*stack, rows, rank)``, and ``B``."""
        draw = self.member // (self.signs.shape[0] // self.A.shape[0])
        coefficient = self.signs[self.member] * self.scale
        return (self.A[draw] * coefficient).to(self.A.dtype), self.B[draw]


class PerturbedWeight(torch.Tensor):
    """``W + signs[member] * scale * A[d] @ B[d].T``, where ``d`` is the member's draw.

    The tensor itself holds ``W``, shape ``(*stack, rows, columns)``; `noise` holds the rest.
    """

    noise: Noise

    @staticmethod
    def make(weight: Tensor, noise: Noise) -> "PerturbedWeight":
        perturbed = weight.as_subclass(PerturbedWeight)
        perturbed.noise = noise
        return perturbed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _materialising(func, args, kwargs)


def plain(weight: Tensor) -> Tensor:
    """The unperturbed tensor under a perturbed weight."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(torch.Tensor)


def materialise(weight: PerturbedWeight) -> Tensor:
    """The member's weight, formed."""
    weight.noise.policy.used.add(weight.noise.name)
    A, B = weight.noise.of_member()
    return plain(weight) + A @ B.mT


def _materialising(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    operation = getattr(func, "__name__", str(func))

    def dense(value: Any) -> Any:
        if isinstance(value, PerturbedWeight):
            value.noise.policy.materialise(operation, value.noise.name)
            return materialise(value)
        return value

    args, kwargs = torch.utils._pytree.tree_map(dense, (args, kwargs))
    return func(*args, **kwargs)


# --- rules ---------------------------------------------------------------------------------------------------------

_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}


def _rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule for functions. A rule returns NotImplemented for arguments that it does not cover."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _RULES[function] = rule
        return rule

    return register


def _linear(x: Tensor, weight: PerturbedWeight, bias: Tensor | None = None) -> Tensor:
    noise = weight.noise
    noise.policy.used.add(noise.name)
    W = plain(weight)
    return ops.perturbed_linear(x, W, bias, noise.A, noise.B, noise.member, noise.signs, noise.scale)


@_rule(F.linear)
def _functional_linear(input, weight, bias=None):
    if isinstance(input, PerturbedWeight) or isinstance(bias, PerturbedWeight) or weight.ndim != 2:
        return NotImplemented
    return _linear(input, weight, bias)


@_rule(torch.addmm, torch.Tensor.addmm)
def _addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    if isinstance(input, PerturbedWeight) or isinstance(mat1, PerturbedWeight) or out is not None:
        return NotImplemented
    product = _matmul(mat1, mat2)
    return product if product is NotImplemented else torch.add(input * beta, product, alpha=alpha)


@_rule(
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.mv,
    torch.Tensor.mv,
)
def _matmul(input, other):
    if isinstance(input, PerturbedWeight) == isinstance(other, PerturbedWeight):
        return NotImplemented
    if isinstance(other, PerturbedWeight):
        return _linear(input, transposed(other)) if other.ndim == 2 else NotImplemented
    if input.ndim != 2:
        return NotImplemented
    return _linear(other, input) if other.ndim == 1 else _linear(other.mT, input).mT


@_rule(torch.Tensor.__rmatmul__)
def _rmatmul(right, left):
    return _matmul(left, right)


@_rule(F.embedding)
def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:
        raise NotImplementedError(
            f"parameter {weight.noise.name!r}: an embedding with max_norm renormalises its weight in place, "
            "which a member cannot do to the weight that all members share"
        )
    if isinstance(input, PerturbedWeight) or weight.ndim != 2:
        return NotImplemented
    return _rows(weight, input)


def _rows(weight: PerturbedWeight, index: Tensor) -> Tensor:
    noise = weight.noise
    noise.policy.used.add(noise.name)
    return ops.perturbed_embedding(index, plain(weight), noise.A, noise.B, noise.member, noise.signs, noise.scale)


# Views of a matrix, or of a stack of them, that are perturbed weights themselves.


def transposed(weight: PerturbedWeight) -> PerturbedWeight:
    """The matrix transposed: rows and columns, hence ``A`` and ``B``, change places."""
    noise = weight.noise
    return PerturbedWeight.make(plain(weight).mT, replace(noise, A=noise.B, B=noise.A))


@_rule(
    torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.t, torch.Tensor.t, torch.Tensor.H.__get__, torch.adjoint
)
def _t(input):
    return transposed(input) if input.ndim == 2 else NotImplemented


@_rule(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def _transpose(input, dim0, dim1):
    dims = {dim % input.ndim for dim in (dim0, dim1)}
    return transposed(input) if dims == {input.ndim - 2, input.ndim - 1} else NotImplemented


@_rule(torch.Tensor.__getitem__)
def _getitem(input, index):
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool and input.ndim == 2:
        return _rows(input, index)
    return NotImplemented


@_rule(torch.Tensor.detach, torch.detach, torch.Tensor.contiguous)
def _same(input):
    return input


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
