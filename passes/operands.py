"""Nodes that bring the operands of attention to [batch, heads, length, features]."""

import operator
from typing import Any

import torch
from torch import fx

from ridgeline.ir.normalize import can_hold, is_cast
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_REPEATS = (aten.expand.default, aten.repeat.default, aten.contiguous.default, aten.clone.default)
_SAME_ORDER = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)


def put(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call at the graph's current point, with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node


def four_dimensions(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[B,S,D] -> [B,1,S,D], and one matrix -> [1,1,S,D]."""
    while node.meta["val"].dim() < 4:
        node = put(graph, aten.unsqueeze.default, node, 1 if node.meta["val"].dim() == 3 else 0)
    return node


def one_batch(graph: fx.Graph, operands: list[fx.Node]) -> list[fx.Node]:
    """A batch of 1 beside a larger one is read again for each element; nothing is copied."""
    sizes = [node.meta["val"].shape[0] for node in operands]
    source = next((i for i, n in enumerate(operands) if shape_of(n)[0] != 1), 0)
    if all(shape_of(n)[0] == shape_of(operands[source])[0] for n in operands):
        return operands
    size: Any = sizes[source]
    if not isinstance(size, int):
        size = graph.call_function(aten.sym_size.int, (operands[source], 0))
        size.meta["val"] = sizes[source]
    widened = []
    for node in operands:
        if shape_of(node)[0] == 1:
            rest = [-1] * 3
            wide = graph.call_function(aten.expand.default, (node, [size, *rest]))
            wide.meta["val"] = node.meta["val"].expand(sizes[source], *rest)
            node = wide
        widened.append(node)
    return widened


def length_difference(graph: fx.Graph, query: fx.Node, key: fx.Node) -> fx.Node:
    """Sk - Sq as a node."""
    sizes = []
    for node in (key, query):
        size = graph.call_function(aten.sym_size.int, (node, 2))
        size.meta["val"] = node.meta["val"].shape[2]
        sizes.append(size)
    difference = graph.call_function(operator.sub, tuple(sizes))
    difference.meta["val"] = sizes[0].meta["val"] - sizes[1].meta["val"]
    return difference


def narrowest(node: fx.Node) -> fx.Node:
    """What a node repeats or widens: the entries themselves."""
    while node.target in _REPEATS or (
        is_cast(node) and can_hold(node.meta["val"].dtype, node.args[0].meta["val"].dtype)
    ):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def one_dimension(graph: fx.Graph, node: fx.Node, size: int) -> fx.Node:
    """The entries of a node, or its one entry repeated, as a tensor [size]."""
    inner = node
    while inner.target in _SAME_ORDER:
        inner = inner.args[0]  # pyright: ignore[reportAssignmentType]
    if inner.meta["val"].dim() == 1:
        node = inner
    if node.meta["val"].dim() != 1:
        node = put(graph, aten.reshape.default, node, [node.meta["val"].numel()])
    return (
        node if node.meta["val"].shape[0] == size else put(graph, aten.expand.default, node, [size])
    )
