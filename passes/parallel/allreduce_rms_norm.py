"""All-reduce, residual add and norm -> reduce-scatter, both on a shard of the tokens, all-gather.

With p_r the partial sums of W ranks, x the residual, T tokens and n = ceil(T / W):

    h = x + sum_r p_r;  y = norm(h)                                  on all T rows, on every rank
    h_r = x_r + reduce_scatter(p)_r;  y = all_gather(norm(h_r))      on n rows, on each

A norm is row by row, so both are equal in real arithmetic; what is sent is the same, and the norm
costs 1 / W. The residual stays a shard from layer to layer: only what other operations read is
gathered. T rows are padded with zeros to W n. Row-wise work between the sum and the norm (views,
casts, a bias, Gemma's weight offset, a norm before the residual) goes along.

What lies on the shard is fp32 (fp64 for fp64 models), the residual too, and is rounded to the
model's dtype where it is gathered: roundings that the model makes on the way are left out.

A transport whose reduce-scatter is an all-reduce with the rest thrown away (gloo) gets an
all-to-all and a local sum in fp32 in its place.
Source: Gond et al., TokenWeave, 2025 (arXiv:2505.11329), section 3.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.rules.common import insert, is_cast
from ridgeline.ir.symbolic import shape_of
from ridgeline.ir.token_rows import SUM_PARTS, TOKEN_ROWS, wide
from ridgeline.passes.parallel.layouts import DECLARED, Layout
from ridgeline.passes.parallel.rows import VIEWS, is_row_reduction
from ridgeline.passes.parallel.token_region import Region, vector_like

aten = torch.ops.aten
functional = torch.ops._c10d_functional
NAME = "allreduce_rms_norm"


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks: their group's name, how many, which one this is; by_parts: see above."""

    group: str
    world: int
    rank: int
    by_parts: bool


def shard_tokens(module: fx.GraphModule, region: Region, place: Place) -> None:
    """Rewrite the region in place; the all-reduces that it began with are gone."""
    _Rewriter(module.graph, region, place).run()
    module.graph.lint()
    module.recompile()


class _Rewriter:
    """Each node of the region gets its counterpart of n rows, right before it."""

    def __init__(self, graph: fx.Graph, region: Region, place: Place) -> None:
        self.graph, self.region, self.place = graph, region, place
        self.shard: dict[fx.Node, fx.Node] = {}
        self.entered: dict[tuple[fx.Node, Any], fx.Node] = {}
        first = region.seeds[0].args[0]
        self.dtype = wide(first.meta["val"].dtype)
        self.sizes = _Sizes(first, first.args[0], place.world)

    def run(self) -> None:
        seeds, exits = set(self.region.seeds), set(self.region.exits)
        for node in self.region.nodes:
            self.shard[node] = self.scattered(node) if node in seeds else self.moved(node)
            if node in exits:
                whole = self.gathered(node)
                for reader in self.region.readers(node):
                    reader.replace_input_with(node, whole)
        # Dead code elimination would keep the waits, and with them the sums: torch takes them for
        # side effects.
        for node in reversed(self.region.nodes):
            before = node.args[0]
            self.graph.erase_node(node)
            if node in seeds:
                self.graph.erase_node(before)

    def scattered(self, wait: fx.Node) -> fx.Node:
        """This rank's rows of a sum."""
        reduce = wait.args[0]
        place, sizes = self.place, self.sizes
        rows = self.padded(self.flat(reduce.args[0], reduce), reduce)
        if place.by_parts:
            counts = [sizes.share] * place.world
            sent = self.put(
                reduce, functional.all_to_all_single.default, rows, counts, counts, place.group
            )
            sent.meta[DECLARED] = Layout.PARTIAL_SUM
            parts = self.put(wait, functional.wait_tensor.default, sent)
            return self.put(wait, SUM_PARTS.overload, parts, place.world)
        sent = self.put(
            reduce, functional.reduce_scatter_tensor.default, rows, "sum", place.world, place.group
        )
        sent.meta[DECLARED] = Layout.SHARDED_BY_TOKEN
        rows = self.put(wait, functional.wait_tensor.default, sent)
        return self.cast(rows, wide(rows.meta["val"].dtype), wait)

    def moved(self, node: fx.Node) -> fx.Node:
        """The same operation on this rank's rows."""
        if node.target in VIEWS or self.narrows(node):
            return self.shard[node.args[0]]
        args = list(fx.node.map_arg(node.args, lambda n: self.operand(n, node)))
        if is_row_reduction(node) and len(args) > 1 and isinstance(node.args[1], list):
            if node.target not in _OVER_SHAPE:
                args[1] = [-1]
        elif is_row_reduction(node) and len(args) > 1 and isinstance(node.args[1], int):
            args[1] = -1
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.operand(n, node))
        return self.put(node, node.target, *args, **kwargs)

    def operand(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """What stands for `value` where the reader works on a shard."""
        if value in self.shard:
            return self.shard[value]
        if not isinstance(value.meta["val"], Tensor):
            return value
        if vector_like(value):
            if value.meta["val"].dim() > 1:
                value = self.put(reader, aten.reshape.default, value, [-1])
            dtype = value.meta["val"].dtype
            weighs = value.meta["val"].dim() and dtype.is_floating_point
            return self.cast(value, wide(dtype), reader) if weighs else value
        lead = self.sizes.lead(reader)
        key = (value, tuple(map(str, lead)))
        if key not in self.entered:
            width = value.meta["val"].shape[-1]
            every = self.put(reader, aten.expand.default, value, [*lead, width])
            rows, share = self.flat(every, reader), self.sizes.share
            start = self.sizes.times(self.place.rank, share)
            entry = self.put(reader, TOKEN_ROWS.overload, rows, start, share)
            entry.meta[DECLARED] = Layout.SHARDED_BY_TOKEN
            self.entered[key] = entry
        return self.entered[key]

    def gathered(self, node: fx.Node) -> fx.Node:
        """All rows of a value, in the shape that its readers expect."""
        place = self.place
        shard = self.cast(self.shard[node], node.meta["val"].dtype, node)
        sent = self.put(
            node,
            functional.all_gather_into_tensor.default,
            self.put(node, aten.contiguous.default, shard),
            place.world,
            place.group,
        )
        rows = self.put(node, functional.wait_tensor.default, sent)
        if not self.sizes.full:
            rows = self.put(node, aten.slice.Tensor, rows, 0, 0, self.sizes.tokens)
        width = node.meta["val"].shape[-1]
        return self.put(node, aten.view.default, rows, [*self.sizes.lead(node), width])

    def flat(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """[..., K] -> [tokens, K]."""
        width = value.meta["val"].shape[-1]
        return self.put(before, aten.reshape.default, value, [self.sizes.tokens, width])

    def padded(self, rows: fx.Node, before: fx.Node) -> fx.Node:
        """With rows of zeros after the last, W n in all."""
        if self.sizes.full:
            return rows
        return self.put(before, TOKEN_ROWS.overload, rows, 0, self.sizes.padded)

    def narrows(self, node: fx.Node) -> bool:
        """Is it a cast to what a shard's dtype holds already?"""
        return is_cast(node) and wide(node.meta["val"].dtype) == self.dtype

    def cast(self, value: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        same = value.meta["val"].dtype == dtype
        return value if same else self.put(before, aten.to.dtype, value, dtype)

    @staticmethod
    def put(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return insert(before, target, *args, **kwargs)


_OVER_SHAPE = (aten.rms_norm.default, aten.layer_norm.default, aten.native_layer_norm.default)
"""Their second argument is a shape, not dimensions."""


class _Sizes:
    """tokens, rows that a rank holds (`share`) and all ranks (`padded`), as numbers or nodes.

    full: it is known that the ranks' rows are the tokens, with none of padding.
    """

    def __init__(self, before: fx.Node, like: fx.Node, world: int) -> None:
        self.before, self.like = before, like
        self.dims = [self._dim(d) for d in range(like.meta["val"].dim() - 1)]
        self.tokens: Any = self.dims[0]
        for dim in self.dims[1:]:
            self.tokens = self.times(self.tokens, dim)
        above = self._call(operator.add, self.tokens, world - 1)
        self.share = self._call(operator.floordiv, above, world)
        self.padded = self.times(self.share, world)
        self.full = self.padded == self.tokens

    def times(self, a: Any, b: Any) -> Any:
        return self._call(operator.mul, a, b)

    def lead(self, node: fx.Node) -> list[Any]:
        """All sizes of the node's tensor but the last."""
        sizes = node.meta["val"].shape[:-1]
        if len(sizes) == 1:
            return [self.tokens]
        known = dict(zip(map(str, shape_of(self.like)), self.dims, strict=False))
        return [s if isinstance(s, int) else known[str(s.node.expr)] for s in sizes]

    def _dim(self, dim: int) -> Any:
        size = self.like.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        return insert(self.before, aten.sym_size.int, self.like, dim, value=size)

    def _call(self, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        """A number where both are, else a node that computes it in each run."""
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return function(a, b)
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)]
        return insert(self.before, function, a, b, value=function(*values))
