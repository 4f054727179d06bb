"""Normal form: one spelling for what means the same, before any pattern is matched.

Each rule looks at one node and rewrites it in place or says no. Rules of the first list change no
bit of any result; those of the second move a constant factor within an attention score (equal in
real arithmetic) and look only at what feeds a softmax. Every rule removes a spelling that no rule
brings back, so the loop ends.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import fx

from ridgeline.ir.aliases import mutates, sharing, writes, written_between
from ridgeline.ir.calls import explicit_layer_norm, plain_power
from ridgeline.ir.masks import ABSORBING, scalar_value
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
Rule = Callable[[fx.Node], bool]

_CASTS = (aten.to, aten._to_copy, aten.type_as)
_NEW = (aten.new_zeros, aten.new_ones, aten.new_full)
_FILLS = {
    **{aten.new_zeros: 0, aten.new_ones: 1, aten.new_full: None},
    **{aten.zeros_like: 0, aten.ones_like: 1, aten.full_like: None},
}
_SCORE_STEPS = (aten.add.Tensor, aten.mul.Tensor, aten.where.self, aten.masked_fill.Scalar)


def normalize(module: fx.GraphModule) -> fx.GraphModule:
    """Bring the graph of `module` into normal form, in place; returns the same module.

    Nodes must carry fake tensors in ``meta["val"]`` (captured programs do).
    """
    for node in list(module.graph.nodes):
        _out_of_place(node)
    in_place = mutates(module.graph)
    for rules in (EXACT, REASSOCIATING):
        changed = True
        while changed:
            changed = False
            for node in list(module.graph.nodes):
                if node.op != "call_function" or node._erased:
                    continue
                if rules is EXACT or not (in_place and reads_changed_memory(node)):
                    changed |= any(rule(node) for rule in rules)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _out_of_place(node: fx.Node) -> bool:
    """x.masked_fill_(...) -> x.masked_fill(...), where x is a new value that nothing views."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.name.endswith("_"):
        return False
    x = node.args[0] if node.args else None
    plain = getattr(aten, target._schema.name.removeprefix("aten::")[:-1], None)
    if not isinstance(x, fx.Node) or x.op != "call_function" or plain is None:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    overload = getattr(plain, target._overloadname, None)
    if overload is None or random or sharing(x) != {x, node} | set(writes(x)):
        return False
    new = _insert(node, overload, *node.args, **node.kwargs)
    before, after = x.meta["val"], new.meta["val"]
    if (before.dtype, shape_of(x)) != (after.dtype, shape_of(new)):
        node.graph.erase_node(new)
        return False
    node.replace_all_uses_with(new)
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    node.graph.erase_node(node)
    return True


def reads_changed_memory(node: fx.Node) -> bool:
    """May a rule at `node`, which reads up to two steps back, move a read across a write?"""
    near = list(node.all_input_nodes)
    near += [n for i in node.all_input_nodes for n in i.all_input_nodes]
    return written_between(near, node) is not None


def is_cast(node: fx.Node) -> bool:
    """A change of floating dtype and nothing else."""
    return (
        getattr(node.target, "overloadpacket", None) in _CASTS
        and node.args[0].meta["val"].is_floating_point()
        and node.meta["val"].is_floating_point()
        and node.args[0].meta["val"].device == node.meta["val"].device
    )


def _forward(node: fx.Node) -> bool:
    """The node equals its first argument: let its users read that."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
    return True


def _insert(node: fx.Node, target, *args, value: torch.Tensor | None = None, **kwargs) -> fx.Node:
    """A new call before `node`, with its provenance; its fake `value` is computed if not given."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    if value is None:

        def fake(x):
            return x.meta["val"] if isinstance(x, fx.Node) else x

        with getattr(node.meta["val"], "fake_mode", contextlib.nullcontext()):
            value = target(*fx.node.map_arg(args, fake), **fx.node.map_arg(kwargs, fake))
    new.meta["val"] = value
    return new


def _drop_assertion(node: fx.Node) -> bool:
    """A statement about metadata that capture has already established."""
    if node.target is not aten._assert_tensor_metadata.default:
        return False
    node.graph.erase_node(node)
    return True


def _drop_identity(node: fx.Node) -> bool:
    """x.to(x.dtype), dropout that is off, full slices, expands to the same shape, x * 1."""
    packet, args = getattr(node.target, "overloadpacket", None), node.args
    if not args or not isinstance(args[0], fx.Node):
        return False
    before, after = args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = (
        shape_of(args[0]) == shape_of(node)
        and before.dtype == after.dtype
        and before.device == after.device
    )
    if not same:
        return False
    if packet in (aten.to, aten.type_as):
        return not node.kwargs.get("copy", False) and _forward(node)
    if packet is aten.dropout:
        return (args[1] == 0 or args[2] is False) and _forward(node)
    if packet in (aten.expand, aten.alias):
        return _forward(node)
    if packet is aten.slice:
        start, step = (args[i] if len(args) > i else None for i in (2, 4))
        return start in (0, None) and step in (1, None) and _forward(node)
    if packet is aten.contiguous:
        return before.is_contiguous() and _forward(node)
    copies = packet in (aten.lift_fresh_copy, aten._to_copy) or (
        packet is aten.mul and args[1] == 1
    )
    return copies and _copy_is_unseen(node) and _forward(node)


def _copy_is_unseen(node: fx.Node) -> bool:
    """Neither the copy nor what it copies is ever written, in the program or by its caller."""
    given_out = any(user.op == "output" for value in sharing(node) for user in value.users)
    return not (given_out or writes(node) or writes(node.args[0]))


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
    packet = getattr(node.target, "overloadpacket", None)
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
    full = _insert(
        *(node, aten.full.default, sizes, number),
        dtype=value.dtype,
        device=value.device,
        pin_memory=False,
        value=value,
    )
    node.replace_all_uses_with(full)
    node.graph.erase_node(node)
    return True


def _plain_softmax(node: fx.Node) -> bool:
    """softmax(x, dim, dtype) -> softmax(to(x, dtype), dim)."""
    if node.target is not aten.softmax.int or len(node.args) < 3:
        return False
    x, dim, dtype = node.args
    if dtype is not None and x.meta["val"].dtype != dtype:
        x = _insert(node, aten.to.dtype, x, dtype)
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


def _linear_from_addmm(node: fx.Node) -> bool:
    """view(addmm(b, view(x, [-1, K]), W), [..., N]) -> linear(x, Wᵀ, b): transformers' Conv1D."""
    if node.target is not aten.addmm.default or node.kwargs:
        return False
    bias, flat, weight = node.args
    users = list(node.users)
    widened = len(users) == 1 and users[0].target in (aten.view.default, aten.reshape.default)
    if bias.meta["val"].dim() != 1 or weight.op != "get_attr" or not widened:
        return False
    if flat.target not in (aten.view.default, aten.reshape.default) or reads_changed_memory(node):
        return False
    x, out = flat.args[0], users[0]
    in_features, out_features = shape_of(weight)
    if shape_of(out) != [*shape_of(x)[:-1], out_features] or shape_of(x)[-1] != in_features:
        return False
    transposed = _insert(node, aten.t.default, weight)
    linear = _insert(node, aten.linear.default, x, transposed, bias, value=out.meta["val"])
    out.replace_all_uses_with(linear)
    node.graph.erase_node(out)
    node.graph.erase_node(node)
    return True


def _feeds_softmax(node: fx.Node) -> bool:
    """The node has one user, and through score arithmetic that user ends in a softmax."""
    users = list(node.users)
    if len(users) != 1:
        return False
    user = users[0]
    return user.target is aten.softmax.int or (
        (user.target in _SCORE_STEPS or is_cast(user)) and _feeds_softmax(user)
    )


def _constant_factor(node) -> float | None:
    """c when the node is x * c or x / c with a literal c."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    x, c = node.args
    if not isinstance(x, fx.Node) or not isinstance(c, int | float) or c == 0:
        return None
    return float(c) if node.target is aten.mul.Tensor else 1.0 / float(c)


def _drop_zero(node: fx.Node) -> bool:
    """scores + 0 -> scores; elsewhere it turns -0 into 0, which a softmax does not tell apart."""
    zero = node.target is aten.add.Tensor and node.args[1] == 0
    same = zero and node.args[0].meta["val"].dtype == node.meta["val"].dtype
    return bool(same) and _feeds_softmax(node) and _forward(node)


def _scale_by_multiplication(node: fx.Node) -> bool:
    """scores / c -> scores * (1/c)."""
    if node.target is not aten.div.Tensor or not _feeds_softmax(node):
        return False
    factor = _constant_factor(node)
    if factor is None:
        return False
    node.target, node.args = aten.mul.Tensor, (node.args[0], factor)
    return True


def _hoist_scale(node: fx.Node) -> bool:
    """(q * c) @ k -> (q @ k) * c, and the same on k's side, through its transpose."""
    if node.target is not aten.matmul.default or not _feeds_softmax(node):
        return False
    for position, operand in enumerate(node.args):
        maker, transposed = operand, False
        if maker.target is aten.transpose.int:
            maker, transposed = maker.args[0], True
        factor = _constant_factor(maker)
        if factor is None:
            continue
        bare = maker.args[0]
        if transposed:
            bare = _insert(node, aten.transpose.int, bare, *operand.args[1:])
        user = next(iter(node.users))
        node.args = tuple(bare if i == position else a for i, a in enumerate(node.args))
        scaled = _insert(user, aten.mul.Tensor, node, factor, value=node.meta["val"])
        user.replace_input_with(node, scaled)
        return True
    return False


def _merge_factors(node: fx.Node) -> bool:
    """(scores * a) * b -> scores * (a b)."""
    outer = _constant_factor(node)
    inner = _constant_factor(node.args[0]) if outer is not None else None
    if inner is None or not _feeds_softmax(node) or len(node.args[0].users) != 1:
        return False
    node.target, node.args = aten.mul.Tensor, (node.args[0].args[0], inner * outer)
    return True


def _additive_mask(node: fx.Node) -> bool:
    """masked_fill(s, m, f) and where(m, s, f) -> s + where(...), for a fill that absorbs any s."""
    if node.target is aten.masked_fill.Scalar:
        scores, excluded, fill = node.args
        keep_first = False
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        excluded, scores, fill = node.args[0], node.args[1], scalar_value(node.args[2])
        keep_first = True
    else:
        return False
    if fill is None or fill > ABSORBING or not _feeds_softmax(node):
        return False
    if scalar_value(scores) is not None or scores.meta["val"].dtype != node.meta["val"].dtype:
        return False  # a constant beside the fill is a mask already, not masked scores
    keep = excluded if keep_first else _insert(node, aten.logical_not.default, excluded)
    zero = _insert(node, aten.scalar_tensor.default, 0.0, dtype=scores.meta["val"].dtype)
    mask = _insert(node, aten.where.ScalarOther, keep, zero, fill)
    node.target, node.args = aten.add.Tensor, (scores, mask)
    return True


EXACT: tuple[Rule, ...] = (
    _drop_assertion,
    _drop_identity,
    _plain_dims,
    plain_power,
    _plain_fill,
    _plain_softmax,
    _explicit_attention,
    explicit_layer_norm,
    _linear_from_addmm,
)
REASSOCIATING: tuple[Rule, ...] = (
    _drop_zero,
    _scale_by_multiplication,
    _hoist_scale,
    _merge_factors,
    _additive_mask,
)
