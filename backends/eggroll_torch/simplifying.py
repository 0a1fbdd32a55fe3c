"""Recorded forward passes without the operations that do nothing: what an interpreter would spend its time on.

What a chunk is computed with is written for any number of draws, rows and axes. In a record these are numbers, and
most slices, permutations and views give what they were given.
"""

import functools
import itertools

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["simplify"]

_aten = torch.ops.aten
_VIEWS = {
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}


def simplify(graph: GraphModule) -> None:
    """Takes views out of a graph of `make_fx` that are what they view, and views of views.

    The numbers are the same to the bit, and what is written to a view reaches the same memory.
    """
    for node in graph.graph.nodes:
        if node.target not in _VIEWS:
            continue
        sources = [node.args[0]]  # what it views, what that views, and so on
        while sources[-1].target in _VIEWS:
            sources.append(sources[-1].args[0])
        same = next((source for source in sources if _is_same(node, source)), None)
        if same is not None:
            node.replace_all_uses_with(same)
            continue
        whole = list(itertools.takewhile(functools.partial(_views_all_of, node), sources))
        if len(whole) > 1:
            # Whatever was done in between, it is the same numbers in one order, in another shape.
            node.target, node.args, node.kwargs = _aten.view.default, (whole[-1], list(node.meta["val"].shape)), {}
    for node in reversed(graph.graph.nodes):
        if node.target in _VIEWS and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _views_all_of(node: Node, source: Node) -> bool:
    value, other = node.meta.get("val"), source.meta.get("val")
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return False
    return value.is_contiguous() and other.is_contiguous() and value.numel() == other.numel()


def _is_same(node: Node, source: Node) -> bool:
    value, other = node.meta.get("val"), source.meta.get("val")
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return False
    of_value, of_other = ((t.shape, t.stride(), t.storage_offset()) for t in (value, other))
    return of_value == of_other
