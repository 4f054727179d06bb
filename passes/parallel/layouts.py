"""How a value lies over the ranks, as a part of its metadata: ``node.meta["layout"]``.

    REPLICATED         every rank holds the whole value
    PARTIAL_SUM        the value is the sum of what the ranks hold
    SHARDED_BY_TOKEN   rank r holds rows [r n, (r + 1) n) of [tokens, ...], n = ceil(tokens / W)
    LOCAL              each rank holds something of its own: its heads, channels, vocabulary

    linear(x, W split by column)            -> LOCAL
    linear(LOCAL, W split by row)           -> PARTIAL_SUM, which a bias must not be added to
    all_reduce, reduce_scatter, all_gather  PARTIAL_SUM -> REPLICATED, -> SHARDED_BY_TOKEN, and back
    row by row (`rows`)                     SHARDED_BY_TOKEN with values that have no tokens
    linear in its operand                   PARTIAL_SUM -> PARTIAL_SUM

Anything else that reads a partial sum or a token shard would compute with a value that is not
there: `propagate` raises LayoutError, when the graph is compiled. What may read a LOCAL value is a
matter of the dimension that is shared out: `channels`. Source: the same distinction as DTensor's
placements Replicate, Partial and Shard.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.ir.token_rows import SUM_PARTS, TOKEN_ROWS
from ridgeline.passes.parallel.rows import COPIES, VIEWS, is_row_wise, keeps_rows

aten = torch.ops.aten
functional = torch.ops._c10d_functional

COLUMN, ROW, VOCABULARY = "column", "row", "vocabulary"
"""How a weight is split: by what it writes, by what it reads, by rows that ids look up."""
DECLARED = "declared_layout"
"""Metadata by which a pass says what a node that it put there makes: the rows that `token_rows`
takes, or a collective sends, may be this rank's tokens or not."""
_PRODUCTS = (
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default),
    *(aten.bmm.default, aten.einsum.default),
)
_MOVES = (
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default),
    *(aten.expand.default, aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default),
    *VIEWS,
    *COPIES,
)
_JOINS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.split.Tensor, operator.getitem),
    aten.split_with_sizes.default,
)
"""Linear in all their operands together."""
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)


class Layout(Enum):
    REPLICATED = "replicated"
    PARTIAL_SUM = "a partial sum"
    SHARDED_BY_TOKEN = "a shard of the tokens"
    LOCAL = "this rank's own"


@dataclass(frozen=True, slots=True)
class Part:
    """How a weight is split.

    how: COLUMN, ROW or VOCABULARY. dim: the dimension of which this rank holds its part; None where
        others have split it, whose graph is right as it is. cuts, packed, path: as of `Share`.
    """

    how: str
    dim: int | None = None
    cuts: frozenset[int] = frozenset()
    packed: int = 1
    path: str = ""


class LayoutError(RidgelineError):
    """An operation that reads a value which this rank does not hold."""


def propagate(
    graph: fx.Graph, splits: Mapping[str, Part], results: int | None = None
) -> dict[fx.Node, Layout]:
    """Write each value's layout to its metadata; node -> layout.

    splits: name of an attribute or input -> how it is split; others are replicated. Where nothing
        is declared, what a collective sums is taken for this rank's own.
    results: how many of the outputs, the first, are the model's result; the others are this rank's
        caches. None: all.

    Raises:
        LayoutError: naming the node that reads what is not there.
    """
    layouts: dict[fx.Node, Layout] = {}
    summed = {} if splits else _summed(graph)
    for node in graph.nodes:
        if node.op == "output":
            _check_results(node, layouts, results, _readers(summed))
            continue
        node.meta["split"] = _split_of(node, splits)
        layout = _layout(node, layouts)
        if node in summed and layout is Layout.REPLICATED:
            layout = Layout.LOCAL
        layouts[node] = node.meta["layout"] = layout
    return layouts


def _summed(graph: fx.Graph) -> dict[fx.Node, None]:
    """The values, seen through views and copies, that are made here and that collectives sum."""
    found: dict[fx.Node, None] = {}
    sends = (functional.all_reduce, functional.reduce_scatter_tensor)
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) in sends:
            value = node.args[0]
            while value.target in (*VIEWS, *COPIES) or is_cast(value):
                found[value] = None
                value = value.args[0]
            if value.op == "call_function" and not _of_collectives(value):
                found[value] = None
    return found


def _of_collectives(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def _readers(summed: Mapping[fx.Node, None]) -> list[tuple[fx.Node, fx.Node]]:
    """(reader, value) of each value that is summed, where something else reads it too."""
    users = [(user, value) for value in summed for user in value.users if user not in summed]
    return [(u, v) for u, v in users if u.op != "output" and not _of_collectives(u)]


def _split_of(node: fx.Node, splits: Mapping[str, Part]) -> str | None:
    """How a weight, seen through views, is split."""
    if node.op in ("get_attr", "placeholder"):
        part = splits.get(str(node.target))
        return None if part is None else part.how
    if node.target in _MOVES or is_cast(node):
        return node.args[0].meta.get("split")
    return None


def _layout(node: fx.Node, layouts: Mapping[fx.Node, Layout]) -> Layout:
    if node.op != "call_function":
        return Layout.LOCAL if node.meta["split"] else Layout.REPLICATED
    read = {layouts[n] for n in node.all_input_nodes if holds_tensor(n)}
    packet = getattr(node.target, "overloadpacket", None)
    if _of_collectives(node):
        return _of_collective(node, packet, read)
    if node.target is TOKEN_ROWS.overload and Layout.SHARDED_BY_TOKEN not in read:
        return node.meta.get(DECLARED) or next(iter(read))
    if node.target is SUM_PARTS.overload:
        return Layout.SHARDED_BY_TOKEN
    if Layout.SHARDED_BY_TOKEN in read:
        return _of_shard(node, layouts)
    if not holds_tensor(node):
        return Layout.REPLICATED  # a size
    if Layout.PARTIAL_SUM in read:
        return _of_partial(node, layouts)
    weights = [n.meta["split"] for n in node.all_input_nodes if n.meta.get("split")]
    if node.target in _PRODUCTS and ROW in weights:
        if _has_bias(node):
            raise LayoutError(
                f"{said(node)} ({node.name}) adds a bias to a partial sum, which would count once"
                " for each rank; add it after the all_reduce"
            )
        return Layout.PARTIAL_SUM
    if node.target is aten.embedding.default and VOCABULARY in weights:
        return Layout.PARTIAL_SUM
    return Layout.LOCAL if Layout.LOCAL in read else Layout.REPLICATED


def _of_collective(node: fx.Node, packet: Any, read: set[Layout]) -> Layout:
    given = next(iter(read), Layout.REPLICATED)
    if packet is functional.wait_tensor:
        return given
    if packet is functional.all_gather_into_tensor:
        if given is Layout.PARTIAL_SUM:
            raise LayoutError(
                f"{said(node)} ({node.name}) gathers partial sums side by side; reduce them first"
            )
        return Layout.REPLICATED
    if given is Layout.SHARDED_BY_TOKEN:
        raise LayoutError(
            f"{said(node)} ({node.name}) sums shards of different tokens; gather them instead"
        )
    scatters = (functional.reduce_scatter_tensor, functional.all_to_all_single)
    if packet in scatters and DECLARED in node.meta:
        return node.meta[DECLARED]
    return Layout.REPLICATED if packet is functional.all_reduce else Layout.LOCAL


def _of_shard(node: fx.Node, layouts: Mapping[fx.Node, Layout]) -> Layout:
    """Row by row, of shards and of values that are the same for every token."""
    moved = node.target in VIEWS and keeps_rows(node.args[0], node)
    if not (moved or is_row_wise(node)):
        raise LayoutError(
            f"{said(node)} ({node.name}) reads {_named(node, layouts, Layout.SHARDED_BY_TOKEN)},"
            " of which this rank holds some tokens only; gather it first"
        )
    for other in node.all_input_nodes:
        if layouts[other] is Layout.SHARDED_BY_TOKEN or not holds_tensor(other):
            continue
        if layouts[other] is not Layout.REPLICATED or any(s != 1 for s in shape_of(other)[:-1]):
            raise LayoutError(
                f"{said(node)} ({node.name}) reads a shard of the tokens together with"
                f" {said(other)}, which is {layouts[other].value} and has all tokens; take this"
                " rank's rows of it, or gather the shard"
            )
    return Layout.SHARDED_BY_TOKEN


def _of_partial(node: fx.Node, layouts: Mapping[fx.Node, Layout]) -> Layout:
    """What is linear in a partial sum is a partial sum, and nothing else may read one."""
    partial = Layout.PARTIAL_SUM
    kinds = [layouts[n] for n in node.all_input_nodes if holds_tensor(n)]
    fills = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    linear = (
        (node.target in _MOVES or is_cast(node))
        or (node.target in _JOINS and set(kinds) == {partial})
        or (node.target in _SCALES and kinds.count(partial) == 1 and kinds[0] is partial)
        or (node.target in fills and not node.args[2])
        or (node.target in _PRODUCTS and kinds.count(partial) == 1 and not _has_bias(node))
    )
    if linear:
        return partial
    raise LayoutError(
        f"{said(node)} ({node.name}) reads {_named(node, layouts, partial)}, which is the whole"
        " only once all ranks' parts are added; all_reduce it first"
    )


def _check_results(
    node: fx.Node,
    layouts: Mapping[fx.Node, Layout],
    results: int | None,
    readers: Sequence[tuple[fx.Node, fx.Node]],
) -> None:
    outputs = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
    for position, value in enumerate(outputs):
        if not isinstance(value, fx.Node) or layouts[value] is Layout.REPLICATED:
            continue
        cache = results is not None and position >= results
        if layouts[value] is Layout.LOCAL and (cache or results is None):
            continue
        for reader, own in readers if layouts[value] is Layout.LOCAL else ():
            raise LayoutError(
                f"{said(reader)} ({reader.name}) reads {said(own)} ({own.name}), which is this"
                " rank's own, as a collective sums it over the ranks; read the sum instead. The"
                f" model returns {said(value)} ({value.name}), which is made of it"
            )
        raise LayoutError(
            f"the model returns {said(value)} ({value.name}), which is {layouts[value].value};"
            " gather or reduce it before it is returned"
        )


def _has_bias(node: fx.Node) -> bool:
    if node.target is aten.addmm.default:
        return True
    return node.target is aten.linear.default and len(node.args) > 2 and node.args[2] is not None


def holds_tensor(node: fx.Node) -> bool:
    """Does the node make a tensor, or several?"""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)
    )


def _named(node: fx.Node, layouts: Mapping[fx.Node, Layout], layout: Layout) -> str:
    return next(said(n) for n in node.all_input_nodes if layouts[n] is layout)
