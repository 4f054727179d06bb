"""How a value holds a rank's share of heads, channels or vocabulary, and what may stand beside it.

The law, and who follows it through a graph: `channels`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.normalize import is_cast
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.rows import COPIES, argument, same_size

aten = torch.ops.aten
FILLS = (
    *("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "scalar_tensor"),
    *("empty", "empty_like"),
)
"""New memory, the same for all indices until it is written."""
_EXPANDS = (aten.expand.default, aten.expand_as.default)
_ON_TOKENS = (
    *(aten.slice.Tensor, aten.index.Tensor, aten.index_select.default, aten.roll.default),
    *(aten.cat.default, aten.index_copy.default, aten.index_copy_.default, aten.narrow.default),
    *COPIES,
)
"""What is done to a cache before new tokens are added: dimensions stay where they are."""
_ELEMENT_BY_ELEMENT = frozenset(
    (
        *("where", "masked_fill", "clamp", "copy", "fill", "to", "lerp"),
        *("hardswish", "log_sigmoid"),
    )
)
"""Pointwise, although torch does not tag them so."""


class Across(Exception):
    """An operation needs what other ranks hold; says what it does, for the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Share:
    """Dimension `dim` is [outer, own] read as one: own indices of which this rank holds its part.

    cuts: numbers of indices that belong together, as the channels of a head: into runs of that
        length the dimension may be cut, and its part is still a part of what one process has.
    packed: how many shares lie one after the other (q | k | v).
    weight: how it is split, of weights; path: the layer that it comes from.
    """

    dim: int
    outer: sympy.Expr = sympy.S.One
    cuts: frozenset[int] = frozenset()
    packed: int = 1
    weight: str = ""
    path: str = ""

    def at(self, dim: int) -> "Share":
        return replace(self, dim=dim)


class Shares:
    """held: node -> its share; caches: inputs that were found to hold one, from call to call;
    reader: the operation whose rule is asked."""

    reader: fx.Node

    def __init__(self, caches: dict[fx.Node, Share]) -> None:
        self.caches = caches
        self.held: dict[fx.Node, Share] = dict(caches)

    def alike(self, operands: Iterable[fx.Node], rank: int, *, fills: bool = True) -> Share | None:
        """The share of the result of an operation on each index, operands aligned on the right.

        rank: of the result. fills: whether sizes of 1 are repeated, as pointwise operations do.

        Raises:
            Across: the operands are shared out in different ways, or one has values of its own for
                the indices of this rank.
        """
        own = [x for x in operands if isinstance(x.meta.get("val"), Tensor)]
        found = [(x, self.held[x]) for x in own if x in self.held]
        if not found:
            return None
        first, share = found[0]
        from_right, size = share.dim - len(shape_of(first)), shape_of(first)[share.dim]
        for x, other in found[1:]:
            same = other.dim - len(shape_of(x)) == from_right and other.packed == share.packed
            if not same or not same_size(other.outer, share.outer):
                raise Across("joins values that are shared out along different dimensions")
            if not same_size(shape_of(x)[other.dim], size):
                raise Across("repeats this rank's part")
        for x in own:
            if x not in self.held and not self.fits(x, from_right, size, share, fills=fills):
                raise Across("reads another value, which is no part, for each index of a part")
        cuts = frozenset.intersection(*(other.cuts for _, other in found))
        weight = share.weight if len(own) == 1 else ""
        return replace(share, dim=rank + from_right, cuts=cuts, weight=weight)

    def fits(
        self, x: fx.Node, from_right: int, size: sympy.Expr, share: Share, *, fills: bool
    ) -> bool:
        """Is `x` the same for all indices, or a cache that holds this rank's part?"""
        shape = shape_of(x)
        if len(shape) < -from_right:
            return True
        dim = len(shape) + from_right
        if fills and shape[dim] == 1:
            return not (size == 1 and _cut_to_one(x, dim))
        if (cache := _cache(x, dim)) is not None and same_size(shape[dim], size):
            self.caches.setdefault(cache, replace(share, dim=dim, weight=""))
            return True
        return same_size(shape[dim], size) and uniform(x, dim, self.reader)


def pointwise(node: fx.Node) -> bool:
    target = node.target
    if target in COPIES or is_cast(node):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._opname.rstrip("_")
    return torch.Tag.pointwise in target.tags or name in _ELEMENT_BY_ELEMENT


def sees(node: fx.Node) -> bool:
    """Is the result the memory of an operand, by another name?"""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(x.alias_info is not None for x in returns)


def _written(x: fx.Node, reader: fx.Node, *, seen: bool = False) -> bool:
    """Is a place of the memory of `x` written before `reader` reads it by its old name? seen: `x`
    is a view of what is read. What is written whole is read by the name of the write."""
    for user in x.users:
        if user.args and user.args[0] is x and sees(user) and user < reader:
            writes = user.target._schema.is_mutable
            if writes and (seen or not pointwise(user)):
                return True
            if _written(user, reader, seen=seen or not writes):
                return True
    return False


def uniform(x: fx.Node, dim: int, reader: fx.Node) -> bool:
    """Is it known that all indices along `dim` have one value when `reader` reads `x`?"""
    if shape_of(x)[dim] == 1:
        return True
    if x.op != "call_function":
        return False
    if getattr(x.target, "_opname", "") in FILLS:
        return not _written(x, reader)
    if x.target in _EXPANDS and len(shape_of(x)) - dim > len(shape_of(x.args[0])):
        return True
    sources = _sources(x, dim)
    return bool(sources) and all(uniform(y, d, reader) for y, d in sources)


def _cut_to_one(x: fx.Node, dim: int) -> bool:
    """Does the size of 1 come from a longer dimension, or from a count of this rank's?"""
    if x.op != "call_function":
        return False
    if x.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return True
    cuts = (aten.slice.Tensor, aten.narrow.default)
    if x.target in cuts and shape_of(x.args[0])[dim] != 1:
        return True
    return any(_cut_to_one(y, d) for y, d in _sources(x, dim))


def _sources(x: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
    """The operands that dimension `dim` comes from, and their dimensions; none where unknown."""
    rank = len(shape_of(x))
    if x.target is aten.unsqueeze.default:
        new = x.args[1] % rank
        return [] if dim == new else [(x.args[0], dim - (dim > new))]
    if x.target is aten.transpose.int:
        swapped = {x.args[1] % rank: x.args[2] % rank, x.args[2] % rank: x.args[1] % rank}
        return [(x.args[0], swapped.get(dim, dim))]
    if x.target is aten.permute.default:
        return [(x.args[0], x.args[1][dim] % rank)]
    if pointwise(x) or x.target in (*_EXPANDS, aten.slice.Tensor):
        read = x.all_input_nodes if pointwise(x) else x.args[:1]
        tensors = [y for y in read if isinstance(y.meta.get("val"), Tensor)]
        aligned = [(y, len(shape_of(y)) - rank + dim) for y in tensors]
        return [(y, d) for y, d in aligned if d >= 0]
    return []


def _cache(x: fx.Node, dim: int) -> fx.Node | None:
    """The input that `x` is, but for operations on its tokens."""
    size = shape_of(x)[dim]
    while x.op == "call_function" and (x.target in _ON_TOKENS or is_cast(x)):
        x = argument(x, 0, "self")
        if not isinstance(x, fx.Node):
            x = x[0]
        shape = shape_of(x)
        if len(shape) <= dim or not same_size(shape[dim], size):
            return None
    return x if x.op == "placeholder" else None
