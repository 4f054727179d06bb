"""Two halves of the tokens in turn: one half's collectives run beside the other's computation.

The graph is cut at its waits into segments s_0, ..., s_n, each of which begins by waiting for what
the one before has sent. With the sequences of a batch in halves a and b:

    a.s_0  b.s_0  a.s_1  b.s_1  ...  a.s_n  b.s_n

so between a send and its wait lies a segment of the other half. Sends are in one order on all
ranks. A half's sequences read and extend their own cache, in the order of the segments. Only a
graph is woven whose batch is free and in which no operation mixes sequences; routing to experts
does, and so do sums over the batch. Source: Gond et al., TokenWeave, 2025 (arXiv:2505.11329),
section 4, with a split between sequences in place of one within a sequence.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from ridgeline.ir.aliases import mutates
from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import said
from ridgeline.ir.sizes import number
from ridgeline.ir.symbolic import shape_of, size_expression
from ridgeline.passes.parallel.rows import argument

functional = torch.ops._c10d_functional
NAME = "token_weave"
SMALLEST = 4
"""Sequences of a batch that is split: halves of one sequence leave nothing to run beside."""
_ROUTING = (
    *("topk", "sort", "argsort", "nonzero", "bincount", "histc", "index_add", "scatter_add"),
    *("index_put", "scatter", "_grouped_mm", "one_hot"),
)


def batch_of(graph: fx.Graph) -> sympy.Symbol | None:
    """The size symbol of the batch: the first free first dimension of an input."""
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim():
            size = shape_of(node)[0]
            if size.is_Symbol:
                return size
    return None


def refusal(module: fx.GraphModule) -> Reject | None:
    """Why the graph cannot be woven; None where it can."""
    graph = module.graph
    end = graph.output_node()
    waits = graph.find_nodes(op="call_function", target=functional.wait_tensor.default)
    if not waits:
        return Reject("nothing is sent, so there is nothing to run beside", end)
    batch = batch_of(graph)
    if batch is None:
        return Reject(
            "the batch is one sequence, whose tokens read one another", end, "use larger batches"
        )
    hint = next(
        number(n.meta["val"].shape[0])
        for n in graph.find_nodes(op="placeholder")
        if isinstance(n.meta.get("val"), Tensor) and batch in shape_of(n)
    )
    if hint < SMALLEST:
        return Reject(f"{hint} sequences are fewer than {SMALLEST}", end, "use larger batches")
    if mutates(graph):
        return Reject("the graph writes its inputs in place", end, "use a cache that grows")
    for node in graph.nodes:
        if reject := _mixes(node, batch):
            return reject
    return None


def _mixes(node: fx.Node, batch: sympy.Symbol) -> Reject | None:
    """Does the node join sequences, or hold them otherwise than one after the other?"""
    if node.op == "output":
        for value in node.all_input_nodes:
            shape = shape_of(value) if isinstance(value.meta.get("val"), Tensor) else []
            if shape[:1] != [batch]:
                return Reject(f"{said(value)}, a result, is not one part a sequence", value)
        return None
    here = _has(node, batch)
    if node.op == "placeholder":
        first, *others = shape_of(node) if here else (batch,)
        if first == batch and not any(batch in size.free_symbols for size in others):
            return None
        return Reject(f"{said(node)} has the batch in another dimension than the first", node)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not any(_has(n, batch) for n in node.all_input_nodes):
        return None
    if node.target._opname.rstrip("_") in _ROUTING:
        return Reject(f"{said(node)} routes tokens by what others are, as experts do", node)
    attention = node.target is torch.ops.aten.scaled_dot_product_attention.default
    draws = argument(node, 4, "dropout_p") if attention else True
    if draws and torch.Tag.nondeterministic_seeded in node.target.tags:
        return Reject(f"{said(node)} draws random numbers for the whole batch", node)
    sizes = not isinstance(node.meta.get("val"), Tensor | list | tuple)
    if not here and not sizes:
        return Reject(f"{said(node)} reduces the sequences of the batch to one value", node)
    return None


def _has(node: fx.Node, batch: sympy.Symbol) -> bool:
    """Does a size of the node's tensors depend on the batch?"""
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else (value,)
    return any(
        batch in size_expression(size).free_symbols
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for size in tensor.shape
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One call of the cut graph; done: the values that nobody reads afterwards."""

    node: fx.Node
    done: tuple[fx.Node, ...]


class Woven:
    """The graph, run on two halves of the batch in turn. It takes and gives what the graph does."""

    def __init__(self, module: fx.GraphModule) -> None:
        batch = batch_of(module.graph)
        placeholders = module.graph.find_nodes(op="placeholder")
        self.split = tuple(_has(node, batch) for node in placeholders)
        waited = 0
        place: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            waited += node.target is functional.wait_tensor.default
            place[node] = waited
        self.cut = split_module(module, module, place.__getitem__, keep_original_order=True)
        nodes = list(self.cut.graph.nodes)
        last: dict[fx.Node, fx.Node] = {n: node for node in nodes for n in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {}
        for value, reader in last.items():
            done.setdefault(reader, []).append(value)
        self.steps = [_Step(n, tuple(done.get(n, ()))) for n in nodes if n.op != "placeholder"]
        self.inputs = [n for n in nodes if n.op == "placeholder"]

    @property
    def segments(self) -> int:
        return sum(step.node.op == "call_module" for step in self.steps)

    @torch.no_grad()
    def __call__(self, *flat: Any) -> list[Tensor]:
        """flat: as the graph takes them. The batch's first half is the smaller one."""
        size = next(x.shape[0] for x, split in zip(flat, self.split, strict=True) if split)
        if size < 2:
            return list(self.cut(*flat))
        middle = size // 2
        halves = [self._inputs(flat, 0, middle), self._inputs(flat, middle, size)]
        results: list[Sequence[Tensor]] = []
        for step in self.steps:
            for values in halves:
                if step.node.op == "output":
                    results.append(fx.node.map_arg(step.node.args[0], values.__getitem__))
                else:
                    values[step.node] = self._called(step.node, values)
                for value in step.done:
                    values.pop(value, None)
        return [torch.cat(pair) for pair in zip(*results, strict=True)]

    def _inputs(self, flat: Sequence[Any], start: int, end: int) -> dict[fx.Node, Any]:
        held = (x[start:end] if split else x for x, split in zip(flat, self.split, strict=True))
        return dict(zip(self.inputs, held, strict=True))

    def _called(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.cut)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        function: Callable[..., Any] = (
            self.cut.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        )
        return function(*args, **kwargs)
