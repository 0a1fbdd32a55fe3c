"""Products of a sparse matrix, such as that of a graph, with what members compute: one for all of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import member_ops
from ..derivatives import differentiates
from ..member_mode import FUNCTIONS
from ..perturbed import PerturbedWeight, Weight, plain, unwrapped
from ..vectorising import called
from .autocasting import linear


def _is_sparse(x: Tensor) -> bool:
    return not isinstance(x, Weight) and x.layout != torch.strided and x.ndim == 2 and not differentiates()


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    if isinstance(dense, PerturbedWeight) and dense.is_matrix:
        A, B = dense.noise.of_member()
        return (
            called(member_ops.sparse_product, sparse, plain(dense))
            + called(member_ops.sparse_product, sparse, A) @ B.mT
        )
    return called(member_ops.sparse_product, sparse, unwrapped(dense))


def _answer(function: Callable[..., Any]) -> Callable[..., Any]:
    def answer(input, other):
        there_is = _is_sparse(input) and other.layout == torch.strided and other.ndim in (1, 2)
        return _product(input, other) if there_is else function(input, other)

    return answer


for _function in (
    *(torch.matmul, torch.mm, torch.mv, torch.spmm, torch.sparse.mm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.mv),
):
    FUNCTIONS[_function] = _answer(_function)


def _linear(input, weight, bias=None):
    if not _is_sparse(input):
        return linear(input, weight, bias)
    out = _product(input, weight.T)
    return out if bias is None else out + bias


FUNCTIONS[F.linear] = _linear
