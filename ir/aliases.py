"""Which values share memory, and where a program writes it.

A captured graph keeps the model's in-place operations. A value is then more than its expression:
what it holds depends on when it is read. Two values may share memory when a chain of views joins
them; this is read off the operators' schemas (``Tensor(a) self`` is viewed, ``Tensor(a!) self``
written). An operator whose schema cannot be trusted counts as viewing, or writing, all it takes.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Composite operators whose schema names no alias and whose result is new memory all the same.
# Others of the kind may return an argument itself, as dropout does when it is off.
_NEW_MEMORY = {
    *(aten.linear, aten.matmul, aten.softmax, aten.log_softmax, aten.layer_norm, aten.rms_norm),
    *(aten.group_norm, aten.scaled_dot_product_attention, aten.conv1d, aten.conv2d, aten.conv3d),
    *(aten.embedding, aten.cross_entropy_loss, aten.one_hot, aten.cumsum, aten.where, aten.square),
    *(aten.ones_like, aten.zeros_like, aten.full_like, aten.pad, aten.silu, aten.gelu, aten.diff),
    *(aten.multiply, aten.divide, aten.true_divide, aten.subtract, aten.special_expit),
    *(aten.cat, aten.concat, aten.stack, aten.repeat_interleave, aten.std, aten.var, aten.outer),
}
_READS_ONLY = (getattr, torch.sym_min, torch.sym_max, torch.sym_not, torch._C._set_grad_enabled)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


@functools.cache
def _effects(target: torch._ops.OpOverload) -> tuple[tuple[str, bool, bool], ...]:
    """(argument, may the result view it, is it written) of each argument of an operator."""
    schema = target._schema
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )
    named = any(r.alias_info is not None for r in schema.returns)
    trusted = named or not composite or target.overloadpacket in _NEW_MEMORY
    infos = [(a.name, a.alias_info) for a in schema.arguments]
    return tuple(
        (name, info is not None or not trusted, info is not None and info.is_write)
        for name, info in infos
    )


def _arguments(node: fx.Node, effect: int) -> Iterator[fx.Node]:
    """The arguments that the result may view (effect 1), or that are written (effect 2)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        reads = target in _READS_ONLY or getattr(target, "__name__", "") == "getitem"
        if effect == 1 or not reads:
            yield from node.all_input_nodes
        return
    for position, described in enumerate(_effects(target)):
        if not described[effect]:
            continue
        given = position < len(node.args)
        value = node.args[position] if given else node.kwargs.get(described[0])
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, fx.Node):
                yield each


def views(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose memory the result of `node` may share."""
    if node.target is aten.einsum.default and len(node.args[1]) > 1:
        return  # of one operand it may be a view; of several it is a product
    if getattr(node.target, "overloadpacket", None) in (aten.to, aten.type_as):
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        if before is not None and after is not None and before.dtype != after.dtype:
            return  # memory has one dtype
    if node.op == "call_function" and _holds_tensors(node.meta.get("val")):
        yield from (a for a in _arguments(node, 1) if _holds_tensors(a.meta.get("val")))


def written_by(node: fx.Node) -> set[fx.Node]:
    """The arguments that the operation may write."""
    if node.op != "call_function":
        return set()
    return {a for a in _arguments(node, 2) if _holds_tensors(a.meta.get("val"))}


def sharing(node: fx.Node, apart: Collection[Any] = ()) -> set[fx.Node]:
    """Every value that may share memory with that of `node`, which is one of them.

    apart: operators whose results are counted as memory of their own.
    """
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in found:
            continue
        found.add(at)
        stack.extend(views(at) if at.target not in apart else ())
        stack.extend(u for u in at.users if u.target not in apart and at in views(u))
        if at.op == "get_attr":
            stack.extend(at.graph.find_nodes(op="get_attr", target=at.target))
    return found


def writes(node: fx.Node) -> list[fx.Node]:
    """The operations, anywhere in the graph, that may write what `node` holds."""
    return [
        user
        for value in sharing(node)
        for user in value.users
        if user.op != "output" and value in written_by(user)
    ]


def written_between(nodes: Iterable[fx.Node], last: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(value, write) where moving the work of `nodes` down to `last` would read changed memory.

    Each of `nodes` reads its arguments where it stands, and the rewritten code where `last` stands:
    a write in between, to an argument or to the result, is seen by one of the two alone.
    """
    nodes = list(nodes)
    first = min(nodes, default=last)
    between: set[fx.Node] = set()
    node = first.next
    while first < last and node is not last:
        if written_by(node):
            between.add(node)
        node = node.next
    for node in nodes if between else ():
        for value in (node, *node.all_input_nodes):
            for write in between.intersection(writes(value)):
                if node < write:
                    return value, write
    return None


def mutates(graph: fx.Graph) -> bool:
    """Does any operation of the graph write memory that others may read?"""
    return any(written_by(node) for node in graph.nodes)
