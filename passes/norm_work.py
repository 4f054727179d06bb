"""What a norm costs as the graph stands, and as one operation."""

import dataclasses
from collections.abc import Iterable
from math import prod

import torch
from torch import fx

from ridgeline.cost_model import Norm, Stream, Work
from ridgeline.ir.match import Site
from ridgeline.ir.normalize import is_cast


def norm_work(
    site: Site, rows: fx.Node, read: Iterable[fx.Node], *, center: bool, residual: bool
) -> tuple[Work, Work]:
    """(before, after) of a norm of `rows` that reads the nodes `read`; the result is outs[0].

    Inductor makes one kernel of a norm, its casts and the addition before it, and of pointwise
    neighbours besides: what flows between those and the norm is in memory only after the rewrite.
    """
    *lengths, size = _hints(rows)
    dtype = rows.meta["val"].dtype
    before = Norm(prod(lengths), size, dtype, center, residual, library="inductor")
    out, inside = site.outs[0], set(site.nodes)
    passed = [node for node in read if _pointwise(node) and inside.issuperset(node.users)]
    if out.users and all(map(_pointwise, out.users)):
        passed.append(out)
    through = (Stream(_bytes(node), _bytes(node), 0, dtype) for node in passed)
    return Work((before,)), Work((dataclasses.replace(before, library="ridgeline"), *through))


def _pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_cast(node)


def _hints(node: fx.Node) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape)


def _bytes(node: fx.Node) -> float:
    return float(prod(_hints(node)) * node.meta["val"].dtype.itemsize)
