"""What follows a kernel's linear layer in a recorded forward pass becomes a part of it: a bias, then an activation.

A compiler takes the kernels' operations as they are, so each of the two would be one more pass over a layer's output.
The kernel does them before it writes, in float32: what is narrow is rounded once, and not after every step.
"""

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

__all__ = ["with_epilogues"]

aten = torch.ops.aten

# Names, for where no kernels run there are no such operations.
_LINEAR = {"eggroll::linear_of_members", "eggroll::linear_of_members_drawn"}
_DENSE = "eggroll::dense_of_members"
# How each of them draws, by argument.
_HOW = "precision", "rng"
# What the kernels call an activation, by its operation and the argument `approximate` of that.
_ACTIVATIONS: dict[Any, str] = {
    (aten.relu.default, None): "relu",
    (aten.relu_.default, None): "relu",
    (aten.gelu.default, None): "gelu",
    (aten.gelu.default, "none"): "gelu",
    (aten.gelu.default, "tanh"): "gelu_tanh",
    (aten.silu.default, None): "silu",
    (aten.silu_.default, None): "silu",
    (aten.tanh.default, None): "tanh",
    (aten.tanh_.default, None): "tanh",
}
# All numbers of a tensor along other axes: in the same order, or in any.
_VIEWS = {
    *(aten.view.default, aten._unsafe_view.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
_ORDERS = _VIEWS | {aten.permute.default, aten.transpose.int, aten.t.default}


def with_epilogues(record: GraphModule) -> GraphModule:
    """The record, changed in place: its linear layers do what follows them, if nobody sees what was before that."""
    for node in record.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.name in _LINEAR:
            _take_bias(node)
            _take_activation(node)
    record.recompile()
    return record


def _take_bias(linear: Node) -> None:
    given, found = _arguments(linear), _only_reader(linear, _VIEWS)
    if found is None or given["bias"] is not None or given["activation"] is not None:
        return
    out, reader = found
    others = [node for node in reader.all_input_nodes if node is not out]
    written = reader.args[0] if reader.target is aten.add_.Tensor else out
    if reader.target not in {aten.add.Tensor, aten.add_.Tensor} or reader.kwargs or written is not out or not others:
        return
    (added,) = others
    bias = _bias(added, out, linear, reader)
    if bias and not _writes(linear, reader):
        _take(linear, bias, out, reader)
        while not added.users and added.op != "placeholder":
            before = added.all_input_nodes[0]
            linear.graph.erase_node(added)
            added = before


def _take_activation(linear: Node) -> None:
    given, found = _arguments(linear), _only_reader(linear, _ORDERS)
    if found is None or given["activation"] is not None:
        return
    out, reader = found
    if name := _ACTIVATIONS.get((reader.target, reader.kwargs.get("approximate"))):
        _take(linear, {"activation": name}, out, reader)


def _take(linear: Node, arguments: dict[str, Any], out: Node, reader: Node) -> None:
    linear.args, linear.kwargs = (), _arguments(linear) | arguments
    reader.replace_all_uses_with(out)
    reader.graph.erase_node(reader)


def _only_reader(node: Node, views: set[OpOverload]) -> tuple[Node, Node] | None:
    """The last of the views of a node, and what reads it, where each has but one reader."""
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.target not in views:
            return node, reader
        node = reader
    return None


def _bias(added: Node, out: Node, linear: Node, reader: Node) -> dict[str, Any]:
    """What to give a layer instead of adding `added` to its output, if that is possible: a bias, and its noise."""
    bias = added.all_input_nodes[0] if added.target in _VIEWS else added
    value, shape = bias.meta["val"], tuple(out.meta["val"].shape)
    members, _, features = linear.meta["val"].shape
    own = members, *(1 for _ in shape[1:-1]), features
    aligned = {(features,): (features,), (members, features): own}.get(tuple(value.shape))
    if shape != (members, *shape[1:-1], features) or tuple(added.meta["val"].shape) != aligned:
        return {}
    if value.dtype != out.meta["val"].dtype:
        return {}
    taken: dict[str, Any] = {"bias": bias}
    if isinstance(bias.target, OpOverload) and bias.target._schema.name == _DENSE:
        noisy, given = _arguments(bias), _arguments(linear)
        taken = {"bias": noisy["weight"], "bias_keys": noisy["keys"], "bias_scales": noisy["scales"]}
        taken |= {name: noisy[name] for name in _HOW}
        alike = "keys" not in given or all(given[name] == taken[name] for name in _HOW)
        if not alike or _writes(bias, reader):
            return {}
    nodes = (value for value in taken.values() if isinstance(value, Node))
    return taken if all(node.op == "placeholder" for node in nodes) else {}  # others may not be there yet


def _writes(start: Node, end: Node) -> bool:
    """Whether anything between two nodes writes to a tensor, which may be a bias."""
    node = start.next
    while node is not end:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            return True
        node = node.next
    return False


def _arguments(node: Node) -> dict[str, Any]:
    """By name; a record leaves out what is the default."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given = zip((argument.name for argument in schema), node.args, strict=False)
    return defaults | dict(given) | node.kwargs
