"""How the values of a graph lie over two parts of its tokens: what each part may be computed from.

With n tokens of which part a holds the first m and part b the others, a dimension of a value is

    rows    the part's own tokens, [0, m) or [m, n)
    keys    what a causal model lets the part read: all tokens up to its last, after `base` others
    (none)  nothing of the tokens

    all_reduce, row by row, x Wᵀ, views        rows -> rows
    cat([past, k]), index_copy(cache, i, k)    rows -> keys: part b goes on from what a has written
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

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import mutates, sharing, writes
from ridgeline.ir.masks import closed_beyond
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import element, index_symbol, shape_of, size_expression
from ridgeline.passes.parallel.collectives import is_collective
from ridgeline.passes.parallel.rows import COPIES, NORMS, argument, same_size

aten = torch.ops.aten
functional = torch.ops._c10d_functional
RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default),
)
MOVES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default)
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
APPENDS = (aten.cat.default, aten.index_copy.default)
_PIECES = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_OVER = (
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
    *(aten.var.correction, aten.std.correction, aten.softmax.int, aten._softmax.default),
)
_ROUTING = (
    *("topk", "sort", "argsort", "nonzero", "bincount", "histc", "index_add", "scatter_add"),
    *("index_put", "scatter", "_grouped_mm", "one_hot"),
)


@dataclass(frozen=True, slots=True)
class Along:
    """One dimension. base: keys that lie before the tokens'. state, of scores: whether keys beyond
    the part are closed by a mask, and whether a softmax made weights of them."""

    kind: Literal["rows", "keys"]
    base: sympy.Expr = sympy.S.Zero
    state: Literal["open", "closed", "weights"] = "open"


ROWS = Along("rows")
Dims = dict[int, Along]


class Parts:
    """dims: node -> its dimensions that are of tokens, for all that each part computes for itself;
    late: what is computed once, after both, with the reason where it begins. What is in neither
    depends on no sum over the ranks, and is computed once, before both."""

    def __init__(self, graph: fx.Graph, symbol: sympy.Symbol) -> None:
        """symbol: the size of the dimension that is split, the first after the batch or it."""
        self.symbol = symbol
        self.dims: dict[fx.Node, Dims] = {}
        self.late: dict[fx.Node, str] = {}
        self.open: dict[fx.Node, str] = {}
        self.blocked: Reject | None = None
        for node in graph.nodes:
            if node.op == "call_function" and (is_collective(node) or self._follows(node)):
                self._put(node)
        self.blocked = self._blocked(graph)

    def own(self, value: Any) -> Dims | None:
        """The dimensions of a value that is computed in parts; None of every other."""
        return self.dims.get(value) if isinstance(value, fx.Node) else None

    def _follows(self, node: fx.Node) -> bool:
        tensors = _tensors(node)
        return bool(tensors) and any(n in self.dims or n in self.late for n in node.all_input_nodes)

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
        if handler := _HANDLERS.get(target):
            return handler(self, node)
        if is_collective(node) or target is functional.wait_tensor.default:
            return self._sent(node)
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return f"{said(node)} writes memory in place"
        if is_pointwise(node):
            return self.elementwise(node)
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

    def elementwise(self, node: fx.Node) -> Dims | str:
        sizes, dims = shape_of(node), Dims()
        operands = [n for n in node.all_input_nodes if _tensors(n)]
        for d, along in self._labels(operands, len(sizes)):
            known = dims.setdefault(d, along)
            if known.kind != along.kind or known.base != along.base:
                return _mixes(node)
            if known.state != along.state:
                dims[d] = replace(known, state="open")
        for operand in operands:
            if not self._fits(operand, sizes, dims):
                return f"{said(node)} reads {said(operand)}, whose tokens lie otherwise"
        if not (is_cast(node) or node.target in COPIES):
            dims = {d: replace(along, state="open") for d, along in dims.items()}
        return self._masked(node, dims)

    def _labels(self, operands: list[fx.Node], rank: int) -> Iterator[tuple[int, Along]]:
        for operand in operands:
            lead = rank - len(shape_of(operand))
            for d, along in (self.own(operand) or {}).items():
                yield d + lead, along

    def _fits(self, operand: fx.Node, sizes: list[sympy.Expr], dims: Dims) -> bool:
        """Is each dimension that is of tokens one of the operand's, or 1, or cut from it?"""
        shape, own = shape_of(operand), self.own(operand)
        lead = len(sizes) - len(shape)
        for d in dims:
            if d < lead or shape[d - lead] == 1 or (own is not None and d - lead in own):
                continue
            if own is not None or not same_size(shape[d - lead], sizes[d]):
                return False
        return True

    def _masked(self, node: fx.Node, dims: Dims) -> Dims:
        """Scores to which a mask is added that closes what the part does not hold."""
        last = len(shape_of(node)) - 1
        scores = dims.get(last)
        if node.target is not aten.add.Tensor or scores is None or scores.kind != "keys":
            return dims
        masks = [n for n in node.all_input_nodes if self.own(n) is None]
        if dims.get(last - 1) == ROWS and len(masks) == 1 and not node.kwargs:
            self.open[node] = f"{said(node)} {closed_beyond(masks[0], scores.base)}"
            if not closed_beyond(masks[0], scores.base):
                dims[last] = replace(scores, state="closed")
        return dims

    def linear(self, node: fx.Node) -> Dims | str:
        x, *weights = node.args
        dims, last = self.own(x), len(shape_of(x)) - 1
        if dims is None or last in dims or not all(map(self._of_none, weights)):
            return f"{said(node)} sums over tokens"
        return dims

    def _of_none(self, value: Any) -> bool:
        """Has the value nothing of the tokens, such as a weight?"""
        if not isinstance(value, fx.Node):
            return True
        return self.own(value) is None and self.symbol not in shape_of(value)

    def product(self, node: fx.Node) -> Dims | str:
        a, b = node.args[:2]
        rank = len(shape_of(node))
        left, right = self._from_right(a), self._from_right(b)
        if min(len(shape_of(a)), len(shape_of(b))) < 2:
            return f"{said(node)} multiplies vectors"
        if not all(self.own(n) is not None or self._of_none(n) for n in (a, b)):
            return _mixes(node)
        inner, other = left.pop(-1, None), right.pop(-2, None)
        weighed = inner is not None and other is not None and inner.state == "weights"
        if not ((inner is None and other is None) or (weighed and inner.kind == "keys")):
            return f"{said(node)} sums over tokens"
        dims = {d: along for d, along in (left | right).items() if d != -1}
        columns = right.get(-1)
        if columns is not None:
            dims[-1] = columns if -2 not in left else Along("keys", columns.base)
        if any(left[d] != right[d] for d in left.keys() & right.keys()):
            return _mixes(node)
        return {d + rank: along for d, along in dims.items()}

    def _from_right(self, value: fx.Node) -> Dims:
        rank = len(shape_of(value))
        return {d - rank: along for d, along in (self.own(value) or {}).items()}

    def attention(self, node: fx.Node) -> Dims | str:
        query, keys = node.args[0], node.args[1:3]
        rows, read = self._from_right(query), [self._from_right(k) for k in keys]
        rank = len(shape_of(node))
        if -1 in rows or any(-1 in dims for dims in read):
            return f"{said(node)} sums over tokens"
        if -2 not in rows and rows and all(dims == rows for dims in read):  # sequences of a batch
            return {d + rank: along for d, along in rows.items()}
        if rows != {-2: ROWS} or not all(set(dims) == {-2} for dims in read):
            crosses = rows == {-2: ROWS} and all(map(self._of_none, keys))
            return {rank - 2: ROWS} if crosses else _mixes(node)
        base = read[0][-2].base
        if read[1][-2].base != base:
            return _mixes(node)
        reason = self._reads_ahead(node, base)
        return f"{said(node)} {reason}" if reason else {rank - 2: ROWS}

    def _reads_ahead(self, node: fx.Node, base: sympy.Expr) -> str:
        """Why a row may read keys of tokens after it; "" where it is proven that none does."""
        mask = argument(node, 3, "attn_mask")
        if argument(node, 5, "is_causal"):
            return ""  # j <= i, and base is not negative
        if mask is None:
            return "lets tokens read those after them"
        return closed_beyond(mask, base) if self.own(mask) is None else "has a mask of activations"

    def over(self, node: fx.Node) -> Dims | str:
        """A reduction, softmax or norm over dimensions that are not of tokens, or of weights."""
        dims, rank = self.own(node.args[0]), len(shape_of(node.args[0]))
        given = argument(node, 1, "dim")
        if node.target in NORMS:
            over = set(range(rank - len(given), rank))
        else:
            given = given if isinstance(given, list | tuple) else [given]
            over = {d % rank for d in given if d is not None} or set(range(rank))
        softmax = node.target in (aten.softmax.int, aten._softmax.default)
        if dims is None or any(self.own(n) is not None for n in node.all_input_nodes[1:]):
            return f"{said(node)} is not known to keep tokens apart"
        result = dict(dims)
        for d in over & dims.keys():
            if not (softmax and dims[d].kind == "keys" and dims[d].state == "closed"):
                return self.open.get(node.args[0], f"{said(node)} reads all tokens at once")
            result[d] = replace(dims[d], state="weights")
        if softmax or node.target in NORMS or argument(node, 2, "keepdim"):
            return result
        return {d - sum(o < d for o in over): along for d, along in result.items()}

    def moved(self, node: fx.Node) -> Dims | str:
        """A view: each dimension of tokens is one of the result's."""
        dims = self.own(node.args[0]) or {}
        places = {d: moved_to(node, d) for d in dims}
        if None in places.values():
            return f"{said(node)} joins or parts the tokens"
        return {places[d]: along for d, along in dims.items()}  # type: ignore[misc]

    def piece(self, node: fx.Node) -> Dims | str:
        """A slice, or pieces, along a dimension that is not of tokens."""
        dims, rank = self.own(node.args[0]) or {}, len(shape_of(node.args[0]))
        place = 2 if node.target in _PIECES else 1
        dim = (argument(node, place, "dim") or 0) % rank
        if dim in dims:
            return f"{said(node)} takes some tokens of all"
        if node.target is aten.select.int:
            return {d - (d > dim): along for d, along in dims.items()}
        return dims

    def same(self, node: fx.Node) -> Dims | str:
        return self.own(node.args[0]) or {}

    def appended(self, node: fx.Node) -> Dims | str:
        """cat: along the tokens they come after others, as in a cache; else side by side."""
        values = [v for v in node.args[0] if shape_of(v) != [0]]
        rank = len(shape_of(node))
        dim = (argument(node, 1, "dim") or 0) % rank
        owned = [v for v in values if self.own(v) is not None]
        if not any(dim in self.dims[v] for v in owned):
            sizes = shape_of(node)
            dims = {d: along for v in owned for d, along in self.dims[v].items()}
            fits = all(self._fits(v, sizes, dims) for v in values)
            fits = fits and all(self.dims[v] == dims for v in owned)
            return dims if fits else _mixes(node)
        if owned != values[-1:] or self.dims[owned[0]] != {dim: ROWS}:
            return _mixes(node)
        base = sum((shape_of(v)[dim] for v in values[:-1]), sympy.Integer(0))
        return {dim: Along("keys", base)}

    def written(self, node: fx.Node) -> Dims | str:
        """index_copy: tokens in their slots of a cache of fixed length, one after the other."""
        cache, dim, index, rows = node.args
        dim %= len(shape_of(cache))
        if self.own(rows) != {dim: ROWS} or any(self.own(n) is not None for n in (cache, index)):
            return _mixes(node)
        base = first_slot(index)
        if base is None:
            return f"{said(node)} writes to slots that are not known to follow one another"
        return {dim: Along("keys", base)}

    def written_in_place(self, node: fx.Node) -> Dims | str:
        cache = node.args[0]
        elsewhere = [u for v in sharing(cache) for u in v.users if u is not node and u > node]
        own = _descendants(node)
        later = [u for u in elsewhere if u not in own]
        if later:
            return f"{said(later[0])} reads the cache beside what {said(node)} gives"
        return self.written(node)

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


def is_pointwise(node: fx.Node) -> bool:
    """Is each element of the result computed from those of the operands at its place?"""
    overload = isinstance(node.target, torch._ops.OpOverload)
    tagged = overload and torch.Tag.pointwise in node.target.tags
    return tagged or is_cast(node) or node.target in COPIES


def moved_to(node: fx.Node, dim: int) -> int | None:
    """The dimension of a view that is dimension `dim` of what it views; None where it is none."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if node.target is aten.permute.default:
        return [d % len(before) for d in node.args[1]].index(dim)
    if node.target is aten.transpose.int:
        a, b = (d % len(before) for d in node.args[1:3])
        return {a: b, b: a}.get(dim, dim)
    if node.target is aten.t.default:
        return len(before) - 1 - dim
    if node.target is aten.expand.default:
        return dim + len(after) - len(before)
    lead = sympy.prod(before[:dim])
    for d, size in enumerate(after):
        if same_size(size, before[dim]) and same_size(sympy.prod(after[:d]), lead):
            return d
    return None


def first_slot(index: fx.Node) -> sympy.Expr | None:
    """c where the index is c, c + 1, ...; of a start that only data says, 0, which it is not below:
    a slot below 0 is an error."""
    known = element(index)
    if known is None and index.target is aten.add.Tensor:
        steps, start = index.args
        if isinstance(start, fx.Node) and not shape_of(start) and element(steps) == index_symbol(0):
            return sympy.Integer(0)
    if known is None or not (known - index_symbol(0)).is_nonnegative:
        return None
    return known - index_symbol(0)


def _mixes(node: fx.Node) -> str:
    return f"{said(node)} reads tokens together with those that others read"


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


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, list | tuple) else (value,)) if _is_tensor(v)]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def sizes_known(graph: fx.Graph) -> dict[sympy.Expr, tuple[fx.Node, int]]:
    """Each free size of the inputs -> an input and its dimension of that size."""
    found: dict[sympy.Expr, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(node.meta["val"].shape if _is_tensor(node.meta["val"]) else ()):
            if size_expression(size).is_Symbol:
                found.setdefault(size_expression(size), (node, dim))
    return found


_HANDLERS: dict[Any, Callable[[Parts, fx.Node], Dims | str]] = {
    ATTENTION: Parts.attention,
    aten.linear.default: Parts.linear,
    aten.cat.default: Parts.appended,
    aten.index_copy.default: Parts.written,
    aten.index_copy_.default: Parts.written_in_place,
    aten.slice.Tensor: Parts.piece,
    aten.select.int: Parts.piece,
    operator.getitem: Parts.same,
    **dict.fromkeys(_PIECES, Parts.piece),
    **dict.fromkeys((*_OVER, *NORMS), Parts.over),
    **dict.fromkeys(PRODUCTS, Parts.product),
    **dict.fromkeys((*RESHAPES, *MOVES), Parts.moved),
}
