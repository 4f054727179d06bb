"""Rational functions of a graph, whatever spells them: for the passes that fuse one with a layer.

A site is a `ridgeline::group_rational`, which `ridgeline.nn.GroupRational` calls, or a division
whose two sides `ridgeline.ir.rational_terms` reads as polynomials, so that Horner's rule, explicit
powers and KAT's stacked powers are one pattern. The form is what the graph computes, never another.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ridgeline.codegen.kernel import keyword
from ridgeline.cost_model import Stream, Work, work_of
from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.op import Op
from ridgeline.ir.provenance import said
from ridgeline.ir.rational_terms import Rational, read_quotient
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate
from ridgeline.passes.dataflow import VIEWS, stranger

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COPIES = (aten.contiguous.default, aten.clone.default)
_MOST_BETWEEN = 4
"""Operations that may stand between a rational function and a layer it could be one kernel with."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::group_rational`, as nodes of the program.

    split: x is [..., G, C / G] and not yet [..., C].
    """

    x: fx.Node
    numerator: fx.Node
    denominator: fx.Node
    form: str
    groups: int
    split: bool


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A rational function: its arguments, the nodes that compute it, and the one they make."""

    call: Call
    nodes: tuple[fx.Node, ...]
    out: fx.Node

    @property
    def terms(self) -> int:
        """Coefficients of one group."""
        matrices = (self.call.numerator, self.call.denominator)
        return sum(int(n.meta["val"].shape[1]) for n in matrices)

    @property
    def one_loop(self) -> bool:
        """Is it spelled in operations on elements alone, of which Inductor makes one loop, together
        with what they read?"""
        return self.out.target is not GROUP_RATIONAL.overload and not self._called

    @property
    def work(self) -> Work:
        """What an inference takes of it as the graph stands: a loop, and the calls beside it."""
        if self.out.target is GROUP_RATIONAL.overload:
            return work_of(self.out)
        return sum((work_of(n) for n in self._called), Work()) + self.work_of_one_call

    @property
    def work_of_one_call(self) -> Work:
        """What an inference takes of it as one operation."""
        x = self.call.x.meta["val"]
        held = [n.meta["val"] for n in (self.call.numerator, self.call.denominator)]
        elements = math.prod(numbers(x.shape))
        moved = elements * x.dtype.itemsize
        read = moved + sum(t.numel() * t.dtype.itemsize for t in held)
        return Work((Stream(read, moved, 2 * self.terms * elements, x.dtype, chain="rational"),))

    @property
    def _called(self) -> list[fx.Node]:
        """Products and copies, which Inductor makes no loop of."""
        return [n for n in self.nodes if not _in_a_loop(n) and work_of(n).kernels]


def _in_a_loop(node: fx.Node) -> bool:
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or is_cast(node) or node.target in _FILLED


_FILLED = (aten.ones_like.default, aten.zeros_like.default, aten.ones.default, aten.zeros.default)


def rational_functions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Found]]:
    """Every rational function of the graph, after the node by which `rational_at` finds it."""
    for target in (GROUP_RATIONAL.overload, aten.div.Tensor):
        for node in graph.find_nodes(op="call_function", target=target):
            if isinstance(found := rational_at(node), Found):
                yield node, found


def rational_at(node: fx.Node) -> Found | Reject | None:
    """The rational function that ends in a call of the operation, or in a division; None where that
    is an ordinary division, a Reject where it is nearly one."""
    if node.target is GROUP_RATIONAL.overload:
        x, numerator, denominator = node.args
        groups = max(int(n.meta["val"].shape[0]) for n in (numerator, denominator))  # pyright: ignore
        form = keyword(node, "form") or FORMS[0]
        call = Call(x, numerator, denominator, form, groups, False)  # pyright: ignore[reportArgumentType]
        return Found(call, (node,), node)
    reader = read_quotient(node)
    found = reader.found
    if reader.columns < 2:
        return None
    if isinstance(found, str):
        return Reject(
            f"the quotient {said(node)} is no rational function: {found}",
            node,
            "write it in a form that ridgeline.ir.group_rational lists, or use"
            " ridgeline.nn.GroupRational",
        )
    groups = max(int(n.meta["val"].shape[0]) for n in (found.numerator, found.denominator))
    placed = _placed(found, node, groups)
    if isinstance(placed, Reject):
        return placed
    call, around, out = placed
    dtypes = {n.meta["val"].dtype for n in (call.x, out)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return Reject(
            f"{said(call.x)} and {said(out)} have dtypes {sorted(map(str, dtypes))}; one of"
            " float32, bfloat16, float16 is needed",
            out,
            "cast the coefficients to the activations' dtype",
        )
    interior = (reader.nodes | around) - {call.x, call.numerator, call.denominator}
    if problem := stranger(interior, (out,)):
        return problem
    return Found(call, tuple(n for n in node.graph.nodes if n in interior), out)


def above(node: fx.Node, target: object) -> tuple[fx.Node | None, fx.Node | None]:
    """(the nearest call of `target` that `node` is, or is made of by operations on one tensor; the
    last of those operations, None where there is none between)."""
    between = None
    for _ in range(_MOST_BETWEEN + 1):
        if node.target is target:
            return node, between
        if not _of_one_tensor(node):
            break
        between, node = node, node.all_input_nodes[0]
    return None, None


def below(found: Found, target: object) -> tuple[fx.Node | None, fx.Node | None, list[fx.Node]]:
    """`above` for a call of `target` that reads the rational function's whole channels as its first
    argument, and the views on the way to those."""
    node, views, between = found.out, [], None
    for _ in range(_MOST_BETWEEN + 1):
        users = [u for u in node.users if u.target is target and u.args[0] is node]
        if users:
            return users[0], between, views
        reader = next(iter(node.users), node)
        if len(node.users) != 1 or not _of_one_tensor(reader):
            break
        joins = reader.target in _VIEWS and shape_of(reader) == shape_of(found.call.x)
        if joins and between is None and not found.call.split:
            views.append(reader)
        else:
            between = between or reader
        node = reader
    return None, None, []


_VIEWS = (*VIEWS, aten.flatten.using_ints)


def _of_one_tensor(node: fx.Node) -> bool:
    """A cast, view, copy, dropout or elementwise function of one tensor?"""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    known = node.target in (*_VIEWS, *_COPIES, aten.dropout.default) or is_cast(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return len(tensors) == 1 and tensors == node.all_input_nodes[:1] and (known or pointwise)


def stands_between(between: fx.Node, first: fx.Node, second: fx.Node) -> Reject:
    """Why a layer and a rational function that are not neighbours are no one kernel."""
    return Reject(
        f"{said(between)} stands between {said(first)} and {said(second)}",
        between,
        f"let the two follow each other, without {said(between)} between them",
    )


def whole_channels(found: Found, layer: fx.Node, apart: bool = False) -> Reject | None:
    """A refusal where the layer works on one group's channels at a time; apart: does it read them
    so, after a function of whole ones?"""
    if not found.call.split and not apart:
        return None
    return Reject(
        f"{said(layer)} and {said(found.out)} meet with the groups apart; the kernels take rows of"
        " all channels",
        layer,
        "let the layer see all channels, and split groups for the rational function alone",
    )


def put(
    candidate: Candidate,
    copied: Mapping[fx.Node, fx.Node],
    op: Op,
    operands: Sequence[fx.Node | None],
    attributes: dict[str, Any],
    shape: Sequence[Any],
) -> fx.Node:
    """Put one call of `op`, whose result is [..., C] of this shape, where the site's output is
    computed; that may be [..., G, C / G]."""
    out = copied[candidate.site.outs[0]]
    with out.graph.inserting_before(out):
        args = tuple(None if n is None else copied[n] for n in operands)
        new = out.graph.call_function(op.overload, args, attributes)
        new.meta = {**out.meta, "val": out.meta["val"].new_empty(shape)}
        set_in_place(new, out)
    return new


def set_in_place(new: fx.Node, out: fx.Node) -> None:
    """Let `new`, a rational function of whole channels [..., C], stand for `out`, which may be
    [..., G, C / G]."""
    result = new
    shape = out.meta["val"].shape
    if len(shape) > new.meta["val"].dim():
        args = (new, -1, [shape[-2], shape[-1]])
        result = new.graph.call_function(aten.unflatten.int, args)
        result.meta = dict(out.meta)
    out.replace_all_uses_with(result)


def _placed(
    found: Rational, div: fx.Node, groups: int
) -> tuple[Call, set[fx.Node], fx.Node] | Reject:
    """The call, the views around it that fall away, and the node that it replaces."""
    base = found.x
    sizes, rows = shape_of(base), {int(n.meta["val"].shape[0]) for n in _matrices(found)}
    call = Call(base, found.numerator, found.denominator, found.form, groups, False)
    unfit = Reject(
        f"{said(base)} of shape {sizes} does not split into {groups} groups of adjacent channels",
        base,
        "view the activations as [..., groups, channels / groups]",
    )
    if not rows <= {1, groups}:
        return unfit
    if groups == 1:
        return call, set(), div
    if len(sizes) == 2 and sizes[0] == groups and _has_rows(div):
        return _turned(call, div) or unfit
    if len(sizes) < 2 or sizes[-2] != groups or not sizes[-1].is_Integer:
        return unfit
    inner = base.args[0] if base.target in VIEWS else None
    whole = inner is not None and shape_of(inner) == [*sizes[:-2], groups * sizes[-1]]
    if whole:
        return dataclasses.replace(call, x=inner), {base}, div
    return dataclasses.replace(call, split=True), set(), div


def _matrices(found: Rational) -> tuple[fx.Node, fx.Node]:
    return found.numerator, found.denominator


def _has_rows(div: fx.Node) -> bool:
    """Is each side a product over stacked powers, so that the first dimension is the group?"""
    return all(side.target is aten.squeeze.dim for side in div.args)


def _turned(call: Call, div: fx.Node) -> tuple[Call, set[fx.Node], fx.Node] | None:
    """x [..., C] -> [..., G, C/G] -> [G, ..., C/G] -> [G, N], and the way back below `div`."""
    around = {call.x}
    up = _through(call.x.args[0] if call.x.target in VIEWS else None, around)
    if up is None or up.target is not aten.permute.default:
        return None
    split = up.args[0]
    rank = len(shape_of(split))
    lead = list(range(rank - 2))
    if list(up.args[1]) != [rank - 2, *lead, rank - 1] or split.target not in VIEWS:
        return None
    x, sizes = split.args[0], shape_of(split)
    turned = [sizes[-2], *sizes[:-2], sizes[-1]]
    if sizes[-2] != call.groups or shape_of(x) != [*sizes[:-2], sizes[-2] * sizes[-1]]:
        return None
    around |= {up, split}
    opened = _only_user(div, VIEWS)
    if opened is None or shape_of(opened) != turned:
        return None
    back = _only_user(opened, (aten.permute.default,))
    if back is None or list(back.args[1]) != [*(i + 1 for i in lead), 0, rank - 1]:
        return None
    around |= {div, opened, back}
    copied = _only_user(back, _COPIES)
    if copied is not None:
        around.add(copied)
    out = _only_user(copied or back, VIEWS)
    if out is None or shape_of(out) != shape_of(x):
        return None
    around.add(out)
    return dataclasses.replace(call, x=x), around, out


def _through(node: fx.Node | None, around: set[fx.Node]) -> fx.Node | None:
    """The node behind a copy."""
    if node is not None and node.target in _COPIES:
        around.add(node)
        return node.args[0]
    return node


def _only_user(node: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None
