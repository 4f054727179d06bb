"""Rules that change no bit of any result: copies that nobody sees, one name for one call."""

import math

import torch
from torch import fx

from ridgeline.ir.rules.calls import explicit_layer_norm, explicit_rms_norm, plain_power
from ridgeline.ir.rules.common import Rule, copy_is_unseen, forward, insert, packet_of
from ridgeline.ir.symbolic import shape_of, strides_of

aten = torch.ops.aten

_NEW = (aten.new_zeros, aten.new_ones, aten.new_full)
_FILLS = {
    **{aten.new_zeros: 0, aten.new_ones: 1, aten.new_full: None},
    **{aten.zeros_like: 0, aten.ones_like: 1, aten.full_like: None},
}
_NAMES = {
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.moveaxis.int: aten.movedim.int,
    aten.moveaxis.intlist: aten.movedim.intlist,
    aten.bmm.default: aten.matmul.default,
    aten.mm.default: aten.matmul.default,
    aten.absolute.default: aten.abs.default,
    aten.special_expit.default: aten.sigmoid.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
}


_SIZED_LIKE = {
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
}


def _plain_name(node: fx.Node) -> bool:
    """One name for one operation: x.true_divide(y) -> x.div(y), bmm -> matmul."""
    if node.target not in _NAMES:
        return False
    node.target = _NAMES[node.target]
    return True


def _slice_from_narrow(node: fx.Node) -> bool:
    """narrow(x, dim, start, length) -> slice(x, dim, start, start + length)."""
    if node.target is not aten.narrow.default:
        return False
    x, dim, start, length = node.args
    if not (isinstance(start, int) and isinstance(length, int)) or start < 0:
        return False
    node.target, node.args = aten.slice.Tensor, (x, dim, start, start + length)
    return True


def _where_scalar_first(node: fx.Node) -> bool:
    """where(c, number, x) -> where(not c, x, number)."""
    if node.target is not aten.where.ScalarSelf:
        return False
    condition, number, x = node.args
    node.target = aten.where.ScalarOther
    node.args = (insert(node, aten.logical_not.default, condition), x, number)
    return True


def _plain_transpose(node: fx.Node) -> bool:
    """x.mT, x.T of a matrix and a permute that swaps two dimensions -> transpose."""
    if node.target in (aten.mT.default, aten.numpy_T.default, aten.t.default):
        rank = node.args[0].meta["val"].dim()
        if rank < 2 or (node.target is not aten.mT.default and rank != 2):
            return False
        if node.target is aten.t.default and node.args[0].op == "get_attr":
            return False  # a weight read transposed; the linear rules know this form
        node.target, node.args = aten.transpose.int, (node.args[0], rank - 2, rank - 1)
        return True
    if node.target is not aten.permute.default:
        return False
    dims = [d % len(node.args[1]) for d in node.args[1]]
    moved = [i for i, d in enumerate(dims) if i != d]
    if len(moved) != 2:
        return False
    node.target, node.args = aten.transpose.int, (node.args[0], *moved)
    return True


def _permute_from_movedim(node: fx.Node) -> bool:
    """movedim(x, from, to) -> permute, its dimensions told apart by their strides."""
    if node.target not in (aten.movedim.int, aten.movedim.intlist):
        return False
    x, *move = node.args
    before = torch.empty([2] * x.meta["val"].dim())
    strides = before.movedim(*move).stride()
    node.target = aten.permute.default
    node.args = (x, [before.stride().index(stride) for stride in strides])
    return True


def _transposed_twice(node: fx.Node) -> bool:
    """transpose(transpose(x, a, b), a, b) -> x: another view of the same memory."""
    inner = node.args[0] if node.target is aten.transpose.int else None
    if not isinstance(inner, fx.Node) or inner.target is not aten.transpose.int:
        return False
    if sorted(inner.args[1:]) != sorted(node.args[1:]):
        return False
    node.replace_all_uses_with(inner.args[0])
    node.graph.erase_node(node)
    return True


def _drop_assertion(node: fx.Node) -> bool:
    """A statement about metadata that capture has already established."""
    if node.target is not aten._assert_tensor_metadata.default:
        return False
    node.graph.erase_node(node)
    return True


def _drop_identity(node: fx.Node) -> bool:
    """x.to(x.dtype), clones, dropout that is off, full slices, expands to the same shape, x * 1."""
    packet, args = packet_of(node), node.args
    if not args or not isinstance(args[0], fx.Node):
        return False
    before, after = args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = (
        shape_of(args[0]) == shape_of(node)
        and before.dtype == after.dtype
        and before.device == after.device
        and strides_of(args[0]) == strides_of(node)
    )
    if not same:
        return False
    if packet in (aten.to, aten.type_as) and not _asks_for_a_copy(node):
        return forward(node)
    if packet is aten.dropout:
        return (args[1] == 0 or args[2] is False) and forward(node)
    if packet in (aten.expand, aten.alias):
        return forward(node)
    if packet is aten.slice:
        start, step = (args[i] if len(args) > i else None for i in (2, 4))
        return start in (0, None) and step in (1, None) and forward(node)
    if packet is aten.contiguous:
        return forward(node)
    copies = packet in (aten.lift_fresh_copy, aten._to_copy, aten.to, aten.clone) or (
        packet is aten.mul and args[1] == 1
    )
    return copies and copy_is_unseen(node) and forward(node)


def _asks_for_a_copy(node: fx.Node) -> bool:
    """Is `copy` given as true, by name or by place?"""
    names = [a.name for a in node.target._schema.arguments]  # pyright: ignore[reportAttributeAccessIssue]
    return bool({**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("copy"))


def _plain_dims(node: fx.Node) -> bool:
    """transpose(-1, -2) -> transpose(2, 3), counted from the front; softmax(3) -> softmax(-1),
    mean([2]) -> mean([-1])."""
    if node.target is aten.transpose.int:
        rank = node.meta["val"].dim()
        dims = sorted(d % rank for d in node.args[1:])
    elif node.target is aten.softmax.int:
        rank = max(node.meta["val"].dim(), 1)
        dims = [node.args[1] % rank - rank]
    elif node.target is aten.mean.dim and node.args[1]:
        rank = max(node.args[0].meta["val"].dim(), 1)
        dims = [[d % rank - rank for d in node.args[1]]]
    else:
        return False
    args = (node.args[0], *dims, *node.args[1 + len(dims) :])
    if args == node.args:
        return False
    node.args = args
    return True


def _plain_fill(node: fx.Node) -> bool:
    """x.new_ones(sizes) and ones_like(x) -> full(sizes, 1): x lends dtype and device alone."""
    packet = packet_of(node)
    if packet not in _FILLS:
        return False
    value = node.meta["val"]
    number = _FILLS[packet]
    rest = node.args[1:]
    sizes = rest[0] if packet in _NEW and rest else None
    if packet in (aten.new_full, aten.full_like):
        number = rest[-1]
    if sizes is None:
        if not all(isinstance(s, int) for s in value.shape) or not value.is_contiguous():
            return False
        sizes = list(value.shape)
    if value.dtype == torch.bool and isinstance(number, int | float):
        number = bool(number)
    full = insert(
        *(node, aten.full.default, sizes, number),
        dtype=value.dtype,
        device=value.device,
        pin_memory=False,
        value=value,
    )
    node.replace_all_uses_with(full)
    node.graph.erase_node(node)
    return True


def _plain_likeness(node: fx.Node) -> bool:
    """x.type_as(y), x.to(y), x.expand_as(y): y lends dtype or sizes alone, and is read no more."""
    x, like = (*node.args[:2], None, None)[:2]
    if not isinstance(x, fx.Node) or not isinstance(like, fx.Node):
        return False
    if node.target in (aten.type_as.default, aten.to.other):
        before, after = x.meta["val"], node.meta["val"]
        if node.args[2:] or node.kwargs or before.device != after.device:
            return False
        node.target, node.args = aten.to.dtype, (x, after.dtype)
        return True
    if node.target not in _SIZED_LIKE:
        return False
    sizes = list(node.meta["val"].shape)
    if not all(isinstance(size, int) for size in sizes):
        return False
    node.target, node.args = _SIZED_LIKE[node.target], (x, sizes)
    return True


def _plain_softmax(node: fx.Node) -> bool:
    """softmax(x, dim, dtype) -> softmax(to(x, dtype), dim)."""
    if node.target is not aten.softmax.int or len(node.args) < 3:
        return False
    x, dim, dtype = node.args
    if dtype is not None and x.meta["val"].dtype != dtype:
        x = insert(node, aten.to.dtype, x, dtype)
    node.args = (x, dim)
    return True


def _explicit_attention(node: fx.Node) -> bool:
    """scaled_dot_product_attention with every default written out."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    scale = given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(given["query"].meta["val"].shape[-1])
    args = (
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
    )
    kwargs = {"scale": scale, "enable_gqa": given.get("enable_gqa", False)}
    if (args, kwargs) == (node.args, node.kwargs):
        return False
    node.args, node.kwargs = args, kwargs
    return True


EXACT: tuple[Rule, ...] = (
    _drop_assertion,
    _drop_identity,
    _plain_name,
    _slice_from_narrow,
    _where_scalar_first,
    _permute_from_movedim,
    _plain_transpose,
    _plain_dims,
    _transposed_twice,
    _plain_fill,
    _plain_likeness,
    _plain_softmax,
    _explicit_attention,
    plain_power,
    explicit_layer_norm,
    explicit_rms_norm,
)
