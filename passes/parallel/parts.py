"""How the values of a graph lie over two parts of its tokens: what each part may be computed from.

With n tokens of which part a holds the first m and part b the others, a dimension of a value is

    rows    the part's own tokens, [0, m) or [m, n)
    keys    what a causal model lets the part read: all tokens up to its last, after `base` others
    (none)  nothing of the tokens

    all_reduce, row by row, x Wᵀ, views        rows -> rows
    cat([past, k]), index_copy(cache, i, k)    rows -> keys: part b goes on from what a has written;
                                               of sequences rows -> rows
    q kᵀ                                       rows, rows -> rows and keys, of scores
    + mask, proven to close keys beyond i      scores -> closed scores, whose softmax are weights
    weights v                                  rows and keys, keys -> rows
    attention(q, k, v, mask)                   all of these in one

A part is then what the whole graph gives for its rows: a key that a part lacks is one that its rows
do not read. What reads all tokens in another way (a mean over them, routing to experts) comes
after both parts; where a sum over the ranks comes after that, the graph cannot be split. Sequences
of a batch are parts in the same way, with rows only. Source: Gond et al., TokenWeave, 2025
(arXiv:2505.11329), section 4.
"""

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import mutates, sharing, writes
from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of, size_expression
from ridgeline.passes.parallel.along import ROWS, Dims, Known, tensors
from ridgeline.passes.parallel.collectives import is_collective
from ridgeline.passes.parallel.part_rules import ATTENTION, RULES, elementwise, is_pointwise
from ridgeline.passes.parallel.rows import argument

functional = torch.ops._c10d_functional
_ROUTING = (
    *("topk", "sort", "argsort", "nonzero", "bincount", "histc", "index_add", "scatter_add"),
    *("index_put", "scatter", "_grouped_mm", "one_hot"),
)


class Parts(Known):
    """dims: what each part computes for itself; late: what is computed once, after both, with the
    reason where it begins. What is in neither depends on no sum over the ranks, and is computed
    once, before both. blocked: why the graph cannot be split."""

    def __init__(self, graph: fx.Graph, symbol: sympy.Symbol) -> None:
        """symbol: the size of the dimension that is split, the first after the batch or it."""
        super().__init__(symbol)
        self.late: dict[fx.Node, str] = {}
        self.blocked: Reject | None = None
        for node in graph.nodes:
            if node.op == "call_function" and (is_collective(node) or self._follows(node)):
                self._put(node)
        self.blocked = self._blocked(graph)

    def _follows(self, node: fx.Node) -> bool:
        reads = any(n in self.dims or n in self.late for n in node.all_input_nodes)
        return reads and bool(tensors(node))

    def _put(self, node: fx.Node) -> None:
        if any(n in self.late for n in node.all_input_nodes):
            self.late[node] = ""
            return
        answer = self._dims(node)
        if isinstance(answer, str):
            self.late[node] = answer
        else:
            self.dims[node] = answer

    def _dims(self, node: fx.Node) -> Dims | str:
        target: Any = node.target
        name = getattr(target, "_opname", getattr(target, "__name__", ""))
        if name.rstrip("_") in _ROUTING:
            return f"{said(node)} routes tokens by what others are, as experts do"
        if _draws(node):
            return f"{said(node)} draws random numbers for all tokens"
        if handler := RULES.get(target):
            return handler(self, node)
        if is_collective(node) or target is functional.wait_tensor.default:
            return self._sent(node)
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            cache = " (a cache that is there already, whose count of tokens is its own)"
            return f"{said(node)} writes memory in place{cache if name == 'index_copy_' else ''}"
        if is_pointwise(node):
            return elementwise(self, node)
        return f"{said(node)} is not known to keep tokens apart"

    def _sent(self, node: fx.Node) -> Dims | str:
        value = node.args[0]
        dims = self.own(value)
        if dims is None:
            found = [d for d, s in enumerate(shape_of(value)[:-1]) if s == self.symbol]
            if len(found) != 1:
                return f"{said(node)} sends a value without a dimension of {self.symbol} tokens"
            dims = {found[0]: ROWS}
        whole = (functional.all_reduce.default, functional.wait_tensor.default)
        if 0 in dims and node.target not in whole:
            return f"{said(node)} joins or scatters rows of tokens"
        return dims

    def _blocked(self, graph: fx.Graph) -> Reject | None:
        """Why the graph cannot be split: the operation that a sum over the ranks comes after."""
        sums = [n for n in graph.nodes if n.target is functional.all_reduce.default]
        for node, reason in self.late.items():
            if reason and any(n in self.late for n in _descendants(node).intersection(sums)):
                return Reject(reason, node)
        for node in graph.nodes if mutates(graph) else ():
            if node not in self.dims and (read := self._overwritten(node)):
                return Reject(f"{said(node)} writes in place what {said(read)} reads", node)
        if not sums:
            end = graph.output_node()
            return Reject("nothing is summed over the ranks, so nothing can run beside", end)
        for node in (*self.late, graph.output_node()):
            for value in node.all_input_nodes:
                if len(self.dims.get(value, ())) > 1:
                    return Reject(f"{said(node)} reads {said(value)} of all tokens and keys", value)
        return None

    def _overwritten(self, node: fx.Node) -> fx.Node | None:
        """What is computed in parts, or after them, from memory that `node` writes before both."""
        memory = (sharing(value) for value in node.all_input_nodes if node in writes(value))
        readers = (user for values in memory for value in values for user in value.users)
        return next((user for user in readers if user in self.dims or user in self.late), None)


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        stack += [user for user in at.users if user not in found]
        found.add(at)
    return found


def _draws(node: fx.Node) -> bool:
    draws = argument(node, 4, "dropout_p") if node.target is ATTENTION else True
    tags = getattr(node.target, "tags", ())
    return bool(draws) and torch.Tag.nondeterministic_seeded in tags


def sizes_known(graph: fx.Graph) -> dict[sympy.Expr, tuple[fx.Node, int]]:
    """Each free size of the inputs -> an input and its dimension of that size."""
    found: dict[sympy.Expr, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(
            node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        ):
            if size_expression(size).is_Symbol:
                found.setdefault(size_expression(size), (node, dim))
    return found
