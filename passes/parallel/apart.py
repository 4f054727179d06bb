"""A graph in two parts: what each computes for itself, one part after the other.

    before   what depends on no sum over the ranks, whole; parts read their rows of it
    part a   the first m of n tokens, or sequences         m = ceil(n / (2 tile)) tile + ahead
    part b   the others, which read a's keys and values, and write to caches after it
    after    what reads all at once: results are joined, [a | b]

Every sum over the ranks is sent once for each part, a's all before b's, until `in_turn` puts them
in turn.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.provenance import KEPT
from ridgeline.ir.symbolic import shape_of, size_expression
from ridgeline.passes.parallel.along import ROWS
from ridgeline.passes.parallel.collectives import is_collective
from ridgeline.passes.parallel.part_rules import (
    APPENDS,
    ATTENTION,
    PRODUCTS,
    RESHAPES,
    is_pointwise,
    moved_to,
)
from ridgeline.passes.parallel.parts import Parts, sizes_known
from ridgeline.passes.parallel.rows import argument
from ridgeline.passes.parallel.token_region import PART

aten = torch.ops.aten
END = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Where n tokens, or sequences, are cut: after the first ceil(n / (2 tile)) tile + ahead.

    symbol: n in the graph; place: an input, counted, and its dimension of that size.
    """

    what: Literal["tokens", "sequences"]
    symbol: sympy.Symbol
    place: tuple[int, int]
    tile: int = 1
    ahead: int = 0

    def first(self, count: Any, call: Callable[..., Any] = lambda f, a, b: f(a, b)) -> Any:
        """The size of part a."""
        tiles = call(operator.add, count, 2 * self.tile - 1)
        half = call(operator.mul, call(operator.floordiv, tiles, 2 * self.tile), self.tile)
        return call(operator.add, half, self.ahead) if self.ahead else half

    def sizes(self, count: int) -> tuple[int, int]:
        first = self.first(count)
        return first, count - first

    def holds(self, inputs: Any) -> bool:
        """Does a call with these flat inputs have two parts? Of one token each they are none:
        compiled code takes a size of 1 for another."""
        index, dim = self.place
        return min(self.sizes(inputs[index].shape[dim])) > 1


def apart(module: fx.GraphModule, parts: Parts, cut: Cut) -> fx.GraphModule:
    """A graph module with the weights of `module`, and the same inputs and outputs, in parts."""
    graph = _Apart(module.graph, parts, cut).run()
    new = fx.GraphModule(module, graph)
    new.meta = dict(module.meta)
    graph.lint()
    return new


class _Apart:
    def __init__(self, old: fx.Graph, parts: Parts, cut: Cut) -> None:
        self.old, self.parts, self.cut = old, parts, cut
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, Any] = {}
        self.part: tuple[dict[fx.Node, fx.Node], ...] = ({}, {})
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.at = 0
        self.known = sizes_known(old)
        self.fake_mode = self.known[cut.symbol][0].meta["val"].fake_mode

    def run(self) -> fx.Graph:
        own, late = self.parts.dims, self.parts.late
        for node in self.old.nodes:
            if node.op != "output" and node not in own and node not in late:
                self.before(node)
        like = self.known[self.cut.symbol][0]
        count = self.size(self.cut.symbol, like)
        middle = self.cut.first(count, lambda f, a, b: self.put(like, f, a, b))
        self.bounds = ((0, middle), (middle, END))
        for self.at in (0, 1):
            for node in own:
                new = self.own(node)
                new.meta[PART] = self.at
                self.part[self.at][node] = new
        for node in self.old.nodes:
            if node in late:
                self.whole[node] = self.copied(node)
        end = self.old.output_node()
        self.graph.output(fx.node.map_arg(end.args[0], self.joined)).meta = dict(end.meta)
        return self.graph

    def before(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            expression = size_expression(value)
            if expression.is_Integer or expression in self.known:
                self.whole[node] = self.size(expression, node)
                return
        self.whole[node] = self.graph.node_copy(node, self.joined)
        self.whole[node].meta = dict(node.meta)

    def copied(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, self.joined)
        new.meta = dict(node.meta)
        return new

    def size(self, expression: sympy.Expr, like: fx.Node) -> Any:
        """A size of the inputs, or a number."""
        if expression.is_Integer:
            return int(expression)
        node, dim = self.known[expression]
        return self.length(self.whole[node], dim, like)

    def joined(self, node: fx.Node) -> Any:
        """A value of the graph, whole."""
        dims = self.parts.own(node)
        if dims is None:
            return self.whole[node]
        a, b = self.part[0][node], self.part[1][node]
        rows = next((d for d, along in dims.items() if along == ROWS), None)
        return b if rows is None else self.after(a, b, rows, node)

    def own(self, node: fx.Node) -> fx.Node:
        """The node as the part at hand computes it."""
        target = node.target
        if target in APPENDS:
            return self.appended(node)
        if target in RESHAPES or target is aten.expand.default:
            return self.viewed(node)
        if target is ATTENTION:
            return self.attention(node)
        if target in PRODUCTS:
            left, right = node.args[:2]
            return self.put(node, target, self.operand(left), self.keys_of(right, left, node))
        if is_collective(node) or is_pointwise(node):
            args = fx.node.map_arg(node.args, lambda n: self.cut_to(n, node))
            kwargs = fx.node.map_arg(node.kwargs, lambda n: self.cut_to(n, node))
        else:
            args = fx.node.map_arg(node.args, self.operand)
            kwargs = fx.node.map_arg(node.kwargs, self.operand)
        return self.put(node, target, *args, **kwargs)

    def operand(self, node: fx.Node) -> Any:
        return self.part[self.at].get(node, self.whole.get(node))

    def cut_to(self, value: fx.Node, reader: fx.Node) -> Any:
        """The value as a reader reads it whose dimensions are the value's, from the right."""
        dims, rank = self.parts.dims[reader], _rank(reader)
        if self.parts.own(value) is not None or not isinstance(value.meta["val"], Tensor):
            return self.operand(value)
        new, shape = self.whole[value], shape_of(value)
        for d, along in dims.items():
            own = d - rank + len(shape)
            if own < 0 or shape[own] in (0, 1):
                continue
            if along == ROWS and shape[own] == self.cut.symbol:
                new = self.rows(new, own, value)
            elif along != ROWS:
                new = self.once(value, aten.slice.Tensor, new, own, 0, self.held(reader, d))
        return new

    def held(self, reader: fx.Node, dim: int) -> Any:
        """How many keys the reader's dimension has in this part."""
        for value in reader.all_input_nodes:
            own = dim - _rank(reader) + _rank(value)
            if own in (self.parts.own(value) or {}):
                return self.length(self.operand(value), own, reader)
        raise AssertionError(f"no operand of {reader} has keys")

    def rows(self, value: fx.Node, dim: int, like: fx.Node) -> fx.Node:
        """The part's own rows of a whole value."""
        start, end = self.bounds[self.at]
        return self.once(like, aten.slice.Tensor, value, dim, start, end)

    def appended(self, node: fx.Node) -> fx.Node:
        """Tokens after others: part b's after part a's."""
        dims, rank = self.parts.dims[node], _rank(node)
        last = self.part[0].get(node)
        if node.target is not aten.cat.default:
            cache, dim, index, rows = node.args
            if dim % rank not in dims:  # sequences, which each part writes into rows of its own
                new = self.cut_to(cache, node)
                return self.put(node, node.target, new, dim, self.whole[index], self.operand(rows))
            index = self.rows(self.whole[index], 0, index)
            into = last or self.whole[cache]
            return self.put(node, node.target, into, dim, index, self.operand(rows))
        values, dim = node.args[0], (argument(node, 1, "dim") or 0) % rank
        if dim not in dims:
            new = [self.cut_to(v, node) if _rank(v) == rank else self.whole[v] for v in values]
        elif last is None:
            new = [self.operand(v) for v in values]
        else:
            new = [last, self.operand(values[-1])]
        return self.put(node, aten.cat.default, new, dim)

    def viewed(self, node: fx.Node) -> fx.Node:
        """A view of the part's size."""
        source, *rest = node.args
        new, args = self.operand(source), fx.node.map_arg(rest, lambda n: self.whole[n])
        if rest and isinstance(rest[-1], list | tuple):
            sizes = list(args[-1])
            lead = _rank(node) - len(sizes) if node.target is not aten.unflatten.int else None
            for dim in self.parts.dims[source] if lead is not None else ():
                place = moved_to(node, dim)
                assert place is not None
                sizes[place] = self.length(new, dim, node)
            args = (*args[:-1], sizes)
        return self.put(node, node.target, new, *args, **node.kwargs)

    def keys_of(self, value: fx.Node, query: fx.Node, reader: fx.Node) -> Any:
        """What rows of the query read: with rows of part a before those of part b."""
        dims = self.parts.own(value)
        rows = [d for d, along in (dims or {}).items() if along == ROWS]
        new, asked = self.operand(value), self.parts.own(query) or {}
        reads = any(d >= _rank(query) - 2 for d in asked) and rows and rows[0] >= _rank(value) - 2
        if not reads or self.at == 0:
            return new
        return self.after(self.part[0][value], new, rows[0], value)

    def attention(self, node: fx.Node) -> fx.Node:
        query, key, value = node.args[:3]
        rank, kwargs = _rank(node), dict(node.kwargs)
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal") or False
        q = self.operand(query)
        k, v = (self.keys_of(n, query, node) for n in (key, value))
        dims = self.parts.dims[node]
        if isinstance(mask, fx.Node):
            new, size = self.operand(mask), shape_of(mask)
            lead = rank - len(size)
            for d in dims:
                if d >= lead and size[d - lead] != 1 and self.parts.own(mask) is None:
                    new = self.rows(new, d - lead, mask)
            held = self.parts.own(key) is not None and rank - 2 in dims
            if held and size[-1] != 1 and self.parts.own(mask) is None:
                keys = self.length(k, _rank(key) - 2, node)
                new = self.once(node, aten.slice.Tensor, new, len(size) - 1, 0, keys)
            mask = new
        elif causal and self.at == 1 and rank - 2 in dims:
            mask, causal = self.triangle(node, q, k), False
        rest = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        return self.put(node, ATTENTION, q, k, v, mask, 0.0, causal, **rest)

    def triangle(self, node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """True where key j <= row i, of rows from part b's first on."""
        start = self.bounds[1][0]
        stop = self.put(node, operator.add, start, self.length(query, _rank(node) - 2, node))
        device = {"device": node.meta["val"].device}
        rows = self.once(node, aten.arange.start, start, stop, **device)
        keys = self.length(key, key.meta["val"].dim() - 2, node)
        columns = self.once(node, aten.arange.default, keys, **device)
        rows = self.once(node, aten.unsqueeze.default, rows, 1)
        return self.once(node, aten.le.Tensor, columns, rows)

    def after(self, a: fx.Node, b: fx.Node, dim: int, like: fx.Node) -> fx.Node:
        """Part b's rows after part a's, joined once."""
        key = (a, b, dim)
        if key not in self.made:
            self.made[key] = self.put(like, aten.cat.default, [a, b], dim)
        return self.made[key]

    def length(self, value: fx.Node, dim: int, like: fx.Node) -> Any:
        size = value.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.once(like, aten.sym_size.int, value, dim)

    def once(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The call, made once for equal arguments."""
        key = (target, args, tuple(kwargs.items()))
        if key not in self.made:
            self.made[key] = self.put(like, target, *args, **kwargs)
        return self.made[key]

    def put(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call with the provenance of `like`, and its fake value."""
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in like.meta.items() if k in KEPT}

        def fake(n: fx.Node) -> Any:
            return n.meta["val"]

        with self.fake_mode:
            new.meta["val"] = target(*fx.node.map_arg(args, fake), **fx.node.map_arg(kwargs, fake))
        return new


def _rank(node: fx.Node) -> int:
    return len(shape_of(node))
