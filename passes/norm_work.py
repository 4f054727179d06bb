"""What a norm costs as the graph stands, and as one operation."""

import dataclasses
from collections.abc import Iterable
from math import prod

import torch
from torch import fx

from ridgeline.cost_model import Norm, Stream, Work
from ridgeline.ir.match import Site
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.sizes import numbers


def norm_work(
    site: Site, rows: fx.Node, read: Iterable[fx.Node], *, center: bool, residual: bool
) -> tuple[Work, Work]:
    """(before, after) of a norm of `rows` that reads the nodes `read`; the result is outs[0].

    Inductor makes one kernel of a norm, its casts and the addition before it, and of pointwise
    neighbours besides. After the rewrite those are kernels of their own: what flows to the norm is
    read again, and what flowed nowhere else is now in memory.
    """
    *lengths, size = _hints(rows)
    dtype = rows.meta["val"].dtype
    before = Norm(prod(lengths), size, dtype, center, residual, library="inductor")
    after: list[Norm | Stream] = [dataclasses.replace(before, library="ridgeline")]
    out, inside = site.outs[0], set(site.nodes)
    for node in filter(_pointwise, read):
        alone = inside.issuperset(node.users)
        if alone or not residual:  # a summand that others read too was there before this kernel
            after.append(Stream(_bytes(node), _bytes(node) * alone, 0, dtype))
    if out.users and all(map(_pointwise, out.users)):
        after.append(Stream(_bytes(out), _bytes(out), 0, dtype))
    return Work((before,)), Work(tuple(after))


def _pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_cast(node)


def _hints(node: fx.Node) -> tuple[int, ...]:
    return numbers(node.meta["val"].shape)


def _bytes(node: fx.Node) -> float:
    return float(prod(_hints(node)) * node.meta["val"].dtype.itemsize)
