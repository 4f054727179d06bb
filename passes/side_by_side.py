"""Linear layers that read one input, as one product:

    [x W1'; x W2'; ...] = x [W1; W2; ...]'

Query, key and value; gate and up; the keys and values that every decoder layer makes of one encoder
output. What finds them and what puts the slices of one product in their places is here; the passes
say what becomes of the weights.
"""

from collections.abc import Sequence

import torch
from torch import fx

from ridgeline.ir.aliases import writes
from ridgeline.ir.match import Reject, Site

aten = torch.ops.aten
SIDE_BY_SIDE = "side_by_side"


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """The sites of several layers that read one input."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        readers.setdefault(node.args[0], []).append(node)
    sites = [
        Site({"x": x}, {}, tuple(layers), tuple(layers), SIDE_BY_SIDE)
        for x, layers in readers.items()
        if len(layers) > 1
    ]
    return sites, []


def constant_weight(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The get_attr node behind a weight, and whether it is read transposed."""
    if node.op == "get_attr":
        return node, False
    if node.target is aten.t.default and node.args[0].op == "get_attr":
        return node.args[0], True
    return None, False


def constant_biases(biases: Sequence[fx.Node | None]) -> bool:
    """Are those that there are constants of the model?"""
    return all(b.op == "get_attr" and not writes(b) for b in biases if b is not None)


def stacked(nodes: Sequence[fx.Node | None], sizes: Sequence[int]) -> fx.Node | None:
    """cat of constants at the graph's current point, zeros [size] where there is none; None where
    there is none at all. A lowered program holds the result (`ridgeline.passes.fold`)."""
    given = next((n for n in nodes if n is not None), None)
    if given is None:
        return None
    graph, value = given.graph, given.meta["val"]
    parts = []
    for node, size in zip(nodes, sizes, strict=True):
        part = node
        if part is None:
            options = {"dtype": value.dtype, "device": value.device}
            part = graph.call_function(aten.zeros.default, ([size],), options)
            part.meta["val"] = value.new_zeros(size)
        parts.append(part)
    whole = graph.call_function(aten.cat.default, (parts,))
    whole.meta["val"] = torch.cat([part.meta["val"] for part in parts])
    return whole


def split(whole: fx.Node, outs: Sequence[fx.Node], sizes: Sequence[int]) -> None:
    """Let the users of each of `outs` read its slice of `whole` [..., sum(sizes)]."""
    start = 0
    for out, size in zip(outs, sizes, strict=True):
        with out.graph.inserting_before(out):
            part = out.graph.call_function(aten.slice.Tensor, (whole, -1, start, start + size))
        part.meta = {**out.meta, "val": whole.meta["val"][..., start : start + size]}
        out.replace_all_uses_with(part)
        start += size
