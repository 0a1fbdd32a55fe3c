"""Sparse matrices as inputs, buffers and attributes: one product for all members."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_backend.support import assert_close, make_trainer

MEMBERS = 6
X = torch.linspace(-1, 1, 40).view(5, 8)
GRAPH = (torch.arange(25).view(5, 5) % 3 == 0).float() / 2


class Model(nn.Module):
    def __init__(self, compute: Callable[[Any, Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.of_nodes = nn.Linear(8, 6), nn.Linear(5, 3)
        self.vector = nn.Parameter(torch.randn(5))
        self.compute = compute

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return self.compute(self, x, graph)


COMPUTATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "@": lambda m, x, graph: torch.relu(graph @ m.first(x)) @ m.first.weight,
    "mm of a shared tensor": lambda m, x, graph: m.first(torch.mm(graph, x)),
    "torch.sparse.mm": lambda m, x, graph: torch.sparse.mm(graph, m.first(x)),
    "torch.spmm": lambda m, x, graph: torch.spmm(graph, m.first(x)),
    "vectors": lambda m, x, graph: torch.mv(graph, m.vector) + graph.matmul(m.first(x)[:, 0]),
    "a weight": lambda m, x, graph: graph @ m.of_nodes.weight.T,
    "linear": lambda m, x, graph: m.of_nodes(graph),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"noise": {"*": "dense"}}, {"rank": 2, "chunk_size": 4}, {"compile": {"backend": "eager"}}],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_members_are_multiplied_at_once(name: str, layout: torch.layout, options: dict[str, Any]) -> None:
    graph = GRAPH.to_sparse(layout=layout)
    population = make_trainer(
        Model(COMPUTATIONS[name]), population_size=MEMBERS, sigma=0.3, strict=True, **options
    ).ask()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        for _ in range(2):
            outputs = population(X, graph)
    for member, output in enumerate(outputs):
        with population.member(member) as alone, torch.no_grad():
            assert_close(output, alone(X, graph), 1e-5)
