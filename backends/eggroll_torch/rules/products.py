"""Products with a perturbed matrix, or with a stack of them: ``x @ W.T + scale * (x @ B) @ A.T``."""

import functools
import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import grouped, kernels, ops
from ..autocast import autocast_operands, autocasts, without_autocast
from ..derivatives import differentiates
from ..member_mode import FUNCTIONS
from ..noise import DrawnFactors, StoredFactors
from ..perturbed import (
    EITHER,
    DenseNoise,
    DenseWeight,
    LowRankWeight,
    PerturbedWeight,
    ScaledWeight,
    formed,
    plain,
    rule,
    times,
    unwrapped,
)
from ..vectorising import called
from .views import layer, transposed

__all__ = ["linear"]


def linear(x: Tensor, weight: LowRankWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W_i.T + bias``: `x` of shape ``(..., in)``, `weight` ``(out, in)``, `bias` ``(out,)``."""
    x = unwrapped(x)
    if isinstance(weight, ScaledWeight):
        out = times(linear(times(x, weight.columns), weight.weight), weight.rows)
        return out if bias is None else out + unwrapped(bias).to(out.dtype)
    noise = weight.noise
    if differentiates():
        bias = unwrapped(bias)
        x, W, bias, A, B = autocast_operands(x, plain(weight), bias, *noise.of_member())
        return F.linear(x, W, bias) + (x @ B) @ A.mT
    if isinstance(noise.factors, DrawnFactors):
        factors, parameter = [noise.factors.keys], noise.factors.parameter
        rank, precision, rng = parameter.rank, parameter.precision, parameter.rng
    else:
        factors, rank = [noise.A, noise.B], noise.A.shape[-1]
        precision, rng = "float32", "threefry"  # not used: the factors are there
    bias_noise: list[Tensor] = []
    if isinstance(bias, DenseWeight) and (drawn := _noise_for_kernel(x, weight, bias)):
        bias.use()
        bias, bias_noise, precision, rng = plain(bias), [drawn.keys, drawn.scales], drawn.precision, drawn.rng
    elif bias is not None:
        bias = unwrapped(bias)
        bias = bias if bias.shape == plain(weight).shape[:1] else bias.expand(weight.shape[:1])
    x, W, bias, *factors = autocast_operands(x, plain(weight), bias, *factors)
    return called(ops.perturbed_linear, x, W, bias, factors, bias_noise, rank, precision, rng, *noise.operands())


def _noise_for_kernel(x: Tensor, weight: LowRankWeight, bias: DenseWeight) -> DenseNoise | None:
    """The noise of a bias, where the kernel that multiplies with the weight can draw it."""
    noise, factors = bias.noise, weight.noise.factors
    together = (
        noise is not None
        and noise.member is weight.noise.member  # of one population
        and plain(bias).shape == plain(weight).shape[:1]
        and plain(bias).dtype == plain(weight).dtype
        and (isinstance(factors, StoredFactors) or factors.parameter.precision == noise.precision)
        and kernels.usable(x)
    )
    return noise if together else None


def stacked_linear(x: Tensor, weight: LowRankWeight) -> Tensor:
    """``x[e] @ W_i[e].T`` for each matrix of a stack: `x` ``(stack, rows, in)``, `weight` ``(stack, out, in)``."""
    noise = weight.noise
    if differentiates():
        x, W, A, B = autocast_operands(x, plain(weight), *noise.of_member())
        return torch.bmm(x, W.mT) + torch.bmm(torch.bmm(x, B), A.mT)
    operands = autocast_operands(x, plain(weight), noise.A, noise.B)
    return called(ops.perturbed_stacked_linear, *operands, *noise.operands())


@rule(F.linear, of=EITHER)
def _linear(input, weight, bias=None):
    if not isinstance(weight, LowRankWeight) or not weight.is_matrix or isinstance(bias, PerturbedWeight):
        return NotImplemented
    return linear(formed(input, "linear"), weight, bias)  # a weight may be the input of another


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, of=EITHER)
def _broadcast_matmul(input, other):
    return _matmul(_single(input, other), _single(other, input))


@rule(
    torch.mm,
    torch.Tensor.mm,
    torch.mv,
    torch.Tensor.mv,
    torch.bmm,
    torch.Tensor.bmm,
    of=EITHER,
)
def _matmul(input, other):
    if isinstance(input, LowRankWeight) == isinstance(other, LowRankWeight):
        return NotImplemented
    if isinstance(other, LowRankWeight):
        if other.is_matrix:
            return linear(input, transposed(other))
        return stacked_linear(input, transposed(other)) if _stacks_match(other, input) else NotImplemented
    if input.is_matrix:
        return linear(other, input) if other.ndim == 1 else linear(other.mT, input).mT
    return stacked_linear(other.mT, input).mT if _stacks_match(input, other) else NotImplemented


@rule(torch.Tensor.__rmatmul__, of=EITHER)
def _rmatmul(right, left):
    return _broadcast_matmul(left, right)


@rule(torch.linalg.multi_dot, of=EITHER)
def _multi_dot(tensors, *, out=None):
    if out is not None:
        return NotImplemented
    if isinstance(tensors[0], LowRankWeight):  # from the other end, where there may be no weight
        return functools.reduce(lambda right, left: left @ right, reversed(tensors))
    return functools.reduce(torch.matmul, tensors)


@rule(*(getattr(of, name) for of in (torch, Tensor) for name in ("addmm", "baddbmm", "addmv")))
def _addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    if isinstance(input, PerturbedWeight) or out is not None:
        return NotImplemented
    product = _matmul(mat1, mat2)
    if product is NotImplemented:
        return product
    if autocasts(product.device):
        input = input.to(product.dtype)
    return product * alpha if beta == 0 else torch.add(input if beta == 1 else input * beta, product, alpha=alpha)


_GROUPED_MM = [torch._grouped_mm, *([F.grouped_mm] if hasattr(F, "grouped_mm") else [])]


@rule(*_GROUPED_MM)
def _grouped_mm(mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    if isinstance(mat_a, PerturbedWeight) or not _is_grouped_product(mat_a, mat_b, offs, bias, out_dtype):
        return NotImplemented
    if mat_b.noise.kernel is not None:
        return NotImplemented
    weight, x = transposed(mat_b), unwrapped(mat_a)
    noise = weight.noise
    with without_autocast(x.device):  # which leaves grouped products alone, but not what they are made of here
        return called(grouped.perturbed_grouped_linear, x, plain(weight), offs, noise.A, noise.B, *noise.operands())


def _answer_grouped_mm(mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    """A weight that is not perturbed: PyTorch would go through the members."""
    plain_weights = not isinstance(mat_a, PerturbedWeight) and not isinstance(mat_b, PerturbedWeight)
    if plain_weights and _is_grouped_product(mat_a, mat_b, offs, bias, out_dtype):
        return called(grouped.unperturbed_grouped_linear, unwrapped(mat_a), unwrapped(mat_b).mT, offs)
    return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)


FUNCTIONS |= dict.fromkeys(_GROUPED_MM, _answer_grouped_mm)


def _is_grouped_product(mat_a: Any, mat_b: Any, offs: Any, bias: Any, out_dtype: Any) -> bool:
    """Whether rows in groups meet a matrix for each, and nothing else is asked for, derivatives either."""
    return (
        mat_a.ndim == 2
        and mat_b.ndim == 3
        and offs is not None
        and offs.dtype == torch.int32
        and offs.shape == mat_b.shape[:1]
        and bias is None
        and out_dtype in (None, mat_a.dtype)
        and not differentiates()
    )


@rule(torch.einsum, of=EITHER)
def _einsum(equation: Any, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    if len(operands) != 2 or not isinstance(equation, str):
        return NotImplemented
    return _contracted(equation, operands)


def _contracted(equation: str, operands: Any) -> Any:
    if isinstance(operands[0], LowRankWeight) and isinstance(operands[1], LowRankWeight):
        return NotImplemented
    plan = _Contraction.parse(equation, operands)
    return NotImplemented if plan is None else plan.run()


@rule(torch.tensordot, of=EITHER)
def _tensordot(a, b, dims=2, out=None):
    if out is not None or isinstance(dims, Tensor):
        return NotImplemented
    axes_a, axes_b = (range(-dims, 0), range(dims)) if isinstance(dims, int) else dims
    if len(axes_a) != 1 or len(axes_b) != 1:
        return NotImplemented  # a perturbed weight is contracted over one of its axes
    labels_a, labels_b = _LABELS[: a.ndim], _LABELS[a.ndim : a.ndim + b.ndim]
    both, other = labels_a[axes_a[0]], labels_b[axes_b[0]]
    rest = labels_a.replace(both, "") + labels_b.replace(other, "")
    return _contracted(f"{labels_a},{labels_b.replace(other, both)}->{rest}", (a, b))


@rule(torch.inner, torch.Tensor.inner, of=EITHER)
def _inner(input, other):
    return _tensordot(input, other, dims=((-1,), (-1,)))


@rule(F.bilinear)
def _bilinear(input1, input2, weight, bias=None):
    """``sum(x1 * (x2 @ W_i[o].T))`` for each output `o`: `weight` is a stack of matrices ``(out, in1, in2)``."""
    perturbed = isinstance(weight, PerturbedWeight) and weight.noise.kernel is None
    if not perturbed or any(isinstance(other, PerturbedWeight) for other in (input1, input2, bias)):
        return NotImplemented
    # As many numbers as the weight has for every row of its first input.
    right = _contracted("rj,oij->ori", (input2.reshape(-1, input2.shape[-1]), weight))
    out = (right * input1.reshape(-1, input1.shape[-1])).sum(-1).mT.reshape(*input1.shape[:-1], -1)
    return out if bias is None else out + bias


_LABELS = string.ascii_letters


class _Contraction:
    """An einsum of a perturbed matrix, or a stack of them, over one of its axes, as a product."""

    def __init__(self, x: Tensor, weight: LowRankWeight, x_labels: str, w_labels: str, out_labels: str):
        self.x, self.weight = x, weight
        self.x_labels, self.w_labels, self.out_labels = x_labels, w_labels, out_labels

    @classmethod
    def parse(cls, equation: str, operands: Any) -> "_Contraction | None":
        """The contraction, or None where it is not a plain product with the weight."""
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        if not arrow:
            once = (label for label in inputs if label.isalpha() and inputs.count(label) == 1)
            output = "..." * ("..." in inputs) + "".join(sorted(once))
        left, comma, right = inputs.partition(",")
        if not comma:
            return None
        first_is_weight = isinstance(operands[0], LowRankWeight)
        x, weight = reversed(operands) if first_is_weight else operands
        x_labels, w_labels = (right, left) if first_is_weight else (left, right)
        free = [label for label in _LABELS if label not in equation]
        dots = "".join(free[: x.ndim - len(x_labels.replace("...", ""))])
        x_labels, output = x_labels.replace("...", dots), output.replace("...", dots)
        if "." in x_labels + w_labels + output or len(x_labels) != x.ndim:
            return None
        if weight.noise.kernel is not None or not 2 <= len(w_labels) == weight.ndim <= 3:
            return None
        row, column = w_labels[-2], w_labels[-1]
        if row in x_labels and column not in x_labels:
            weight, w_labels = transposed(weight), w_labels[:-2] + column + row
            row, column = column, row
        stack = w_labels[:-2]
        plain_product = (
            column in x_labels
            and column not in output
            and row not in x_labels
            and row in output
            and all(label in output or label in x_labels for label in stack)
            and len(set(x_labels)) == len(x_labels)
            and set(output) | set(stack) == (set(x_labels) | set(w_labels)) - {column}
        )
        return cls(x, weight, x_labels, w_labels, output) if plain_product else None

    def run(self) -> Tensor:
        stack, row, column = list(self.w_labels[:-2]), self.w_labels[-2], self.w_labels[-1]
        rest = [label for label in self.x_labels if label not in {*stack, column}]
        x = self.x
        if not stack:
            x = x.permute([self.x_labels.index(label) for label in [*rest, column]])
            return self._order(linear(x, self.weight), [*rest, row])
        if stack[0] in self.x_labels:
            x = x.permute([self.x_labels.index(label) for label in [*stack, *rest, column]])
        else:
            x = x.permute([self.x_labels.index(label) for label in [*rest, column]])
            x = x.unsqueeze(0).expand(self.weight.shape[0], *x.shape)
        lengths = x.shape[1:-1]
        out = stacked_linear(x.reshape(x.shape[0], -1, x.shape[-1]), self.weight)
        out = out.reshape(out.shape[0], *lengths, out.shape[-1])
        if stack[0] not in self.out_labels:  # contracted too, as where heads are joined
            return self._order(out.sum(0), [*rest, row])
        return self._order(out, [*stack, *rest, row])

    def _order(self, out: Tensor, labels: list[str]) -> Tensor:
        return out.permute([labels.index(label) for label in self.out_labels])


def _single(weight: Any, other: Any) -> Any:
    """A stack of one matrix as that matrix, where it broadcasts over what it is multiplied with."""
    is_stack = isinstance(weight, PerturbedWeight) and weight.noise.kernel is None and weight.ndim == 3
    return layer(weight, 0) if is_stack and weight.shape[0] == 1 and other.ndim >= 3 else weight


def _stacks_match(weight: LowRankWeight, other: Tensor) -> bool:
    return weight.noise.kernel is None and weight.ndim == other.ndim == 3 and weight.shape[0] == other.shape[0]
