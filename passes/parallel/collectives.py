"""Collectives in normal form, each written in one way, and a list of them to compare and to count.

    dist.all_reduce(x)                 copy_(x, wait(all_reduce(x))); readers of x read the sum,
                                       where nothing else reads the memory of x
    wait -> view -> view -> add        the views go along with the sum
    equal all-gathers                  one, as of DTensor's, which gathers for each projection
    sum of x_r W_rᵀ + b / W            b is added once, to the sum over the W ranks, as of DTensor's
    ops that have gradients            those without, which send the same
    ops in place (`all_reduce_`)       as dist.all_reduce(x): copy_(x, wait(all_reduce(x)))

Other functional collectives (`torch.distributed._functional_collectives`) are
`torch.ops._c10d_functional`, and so in this form from the start.
"""

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed import distributed_c10d

from ridgeline.ir.aliases import sharing, writes, written_between
from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import KEPT, said
from ridgeline.ir.rules.common import insert
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.rows import COPIES, VIEWS, keeps_rows

aten = torch.ops.aten
functional = torch.ops._c10d_functional
_AUTOGRAD = "_c10d_functional_autograd"
_MERGED = (functional.all_gather_into_tensor.default, functional.wait_tensor.default)
_PURE = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.slice.Tensor),
    *(aten.split.Tensor, aten.cat.default, torch.ops.aten.permute.default),
)


def is_collective(node: fx.Node) -> bool:
    """A call that sends something, and not the wait for it."""
    overload = isinstance(node.target, torch._ops.OpOverload)
    sends = overload and node.target.namespace in ("_c10d_functional", _AUTOGRAD)
    return sends and node.target is not functional.wait_tensor.default


def group_of(collective: fx.Node) -> str:
    """The name of the group that a collective is over: the argument that its schema calls so."""
    names = [argument.name for argument in collective.target._schema.arguments]
    at = names.index("group_name")
    return collective.args[at] if at < len(collective.args) else collective.kwargs["group_name"]


def collectives(graph: fx.Graph) -> list[str]:
    """One line a collective, in the order in which they are called: name, arguments, shape."""
    lines = []
    for node in graph.nodes:
        if is_collective(node):
            sent = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            plain = [a for a in node.args[1:] if isinstance(a, str | int)]
            told = [f"{'x'.join(map(str, shape_of(x)))} {x.meta['val'].dtype}" for x in sent]
            lines.append(f"{node.target._opname} {plain} {', '.join(told)}")
    return lines


def count(graph: fx.Graph) -> Counter[str]:
    """How often each kind of collective is called."""
    return Counter(n.target._opname for n in graph.nodes if is_collective(n))


def normal_form(module: fx.GraphModule) -> int:
    """Bring the collectives of a graph into the form above; how many all-gathers are left out."""
    for node in list(module.graph.nodes):
        if is_collective(node) and node.target.namespace == _AUTOGRAD:
            packet = getattr(functional, node.target._opname)
            node.target = getattr(packet, node.target._overloadname)
        if is_collective(node) and _functional_of(node) is not None:
            node = _out_of_place(node)
        if node.target in (aten.copy.default, aten.copy_.default):
            _sum_in_place(node)
        if _is_wait(node) and node.all_input_nodes:  # one that is gone reads nothing
            _bias_after_sum(node)
    gone = merge_equal(module.graph)
    module.graph.lint()
    module.recompile()
    return gone


def merge_equal(graph: fx.Graph) -> int:
    """Merge all-gathers of the same value, and what is made of them alike; how many are gone."""
    gone = 0
    known: dict[tuple[object, ...], fx.Node] = {}
    gathered: set[fx.Node] = set()
    for node in list(graph.nodes):
        behind = any(n in gathered for n in node.all_input_nodes)
        if node.target not in _MERGED and not (behind and _is_part(node)):
            continue
        if node.target is functional.wait_tensor.default and not behind:
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = known.setdefault(key, node)
        if first is not node and _is_written(first, node):
            first = known[key] = node
        gathered.add(first)
        if first is not node:
            gone += node.target is functional.all_gather_into_tensor.default
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    return gone


def _is_written(first: fx.Node, node: fx.Node) -> bool:
    """Would one value in place of both be another: is what is read written in between, or a result
    at any time?"""
    waits = [u for n in (first, node) for u in n.users if _is_wait(u)]
    results = any(writes(value) for value in (first, node, *waits))
    return results or written_between([first], node) is not None


def other_form(graph: fx.Graph) -> Reject | None:
    """Why a graph is in no normal form: a result that is written to memory which is read by another
    name too, or a collective of several tensors."""
    for node in graph.nodes:
        if is_collective(node) and not isinstance(node.args[0], fx.Node):
            return Reject(
                f"{said(node)} sends several tensors at once", node, "send each by itself"
            )
        if node.target is aten.copy_.default and _is_wait(node.args[1]):
            reason = f"{said(node)} writes what was sent to an input, a view or a part of a value"
            return Reject(reason, node, "use the functional form, y = all_reduce(x)")
    return None


def _is_wait(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is functional.wait_tensor.default


def _is_part(node: fx.Node) -> bool:
    return node.target in _PURE or getattr(node.target, "__name__", "") == "getitem"


def _functional_of(collective: fx.Node) -> Any:
    """What sends the same as a collective that writes to its one operand, and leaves it."""
    name = collective.target._opname
    if not name.endswith("_") or not isinstance(collective.args[0], fx.Node):
        return None
    return getattr(functional, name[:-1]).default


def _out_of_place(collective: fx.Node) -> fx.Node:
    """all_reduce_(x) -> copy_(x, wait(all_reduce(x))), which is returned and for which nobody
    waits."""
    into = collective.args[0]
    sent = insert(collective, _functional_of(collective), *collective.args, **collective.kwargs)
    done = insert(collective, functional.wait_tensor.default, sent)
    write = insert(collective, aten.copy_.default, into, done, value=collective.meta["val"])
    collective.replace_all_uses_with(write)
    collective.graph.erase_node(collective)
    for wait in [user for user in write.users if _is_wait(user)]:
        wait.replace_all_uses_with(write)
        wait.graph.erase_node(wait)
    return write


def _sum_in_place(node: fx.Node) -> None:
    """copy(x, wait): the sum is read where x would be, from here on."""
    into, sum_ = node.args[:2]
    if not (isinstance(into, fx.Node) and _is_wait(sum_)):
        return
    before, after = into.meta.get("val"), sum_.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return
    if before.dtype != after.dtype or shape_of(into) != shape_of(sum_):
        return
    if node.target is aten.copy_.default:
        if not _is_own(into, sum_, node):
            return
        into.replace_all_uses_with(sum_, delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(sum_)
    node.graph.erase_node(node)


def _is_own(into: fx.Node, sum_: fx.Node, write: fx.Node) -> bool:
    """Is the memory of `into` nobody else's, nor read after `write` by a name from before it?"""
    for value in sharing(into):
        if value.op != "call_function":  # memory of the caller's, which is to be written
            return False
        if value is not into and value < write and any(user > write for user in value.users):
            return False
    again = any(later > write for later in writes(into))
    return not again or len(sum_.users) == 1


def _bias_after_sum(wait: fx.Node) -> None:
    """sum over W ranks of rows of linear(x, w, b / W) -> sum of linear(x, w), + b."""
    send = wait.args[0]
    if send.target not in (functional.all_reduce.default, functional.reduce_scatter_tensor.default):
        return
    product = _source_of_rows(send)
    if product is None or product.target is not aten.linear.default or len(product.args) < 3:
        return
    share = product.args[2]
    if not isinstance(share, fx.Node) or share.target is not aten.div.Tensor:
        return
    bias, parts = share.args
    if send.args[1] != "sum" or parts != distributed_c10d._get_group_size_by_name(group_of(send)):
        return
    product.args = product.args[:2]
    if not share.users:
        share.graph.erase_node(share)
    total = insert(wait.next, aten.add.Tensor, wait, bias)
    total.meta.update({k: wait.meta[k] for k in KEPT if k in wait.meta})
    wait.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _source_of_rows(send: fx.Node) -> fx.Node | None:
    """The value whose whole rows, in another order, are all that is sent; nobody else reads it."""
    node = send.args[0]
    while len(node.users) == 1:
        if node.target in COPIES or (node.target in VIEWS and keeps_rows(node.args[0], node)):
            node = node.args[0]
        elif node.target is aten.cat.default and (split := _split_of_rows(node)) is not None:
            node = split.args[0]
        else:
            return node
    return None


def _split_of_rows(joined: fx.Node) -> fx.Node | None:
    """The split, along another dimension than the last, whose parts `joined` puts one after the
    other."""
    parts = joined.args[0]
    split = parts[0].args[0] if parts[0].target is operator.getitem else None
    if split is None or split.target is not aten.split.Tensor or set(split.users) != set(parts):
        return None
    dim = split.args[2] if len(split.args) > 2 else 0
    rank = split.args[0].meta["val"].dim()
    along = joined.args[1] if len(joined.args) > 1 else 0
    return None if rank - 1 in (dim % rank, along % rank) else split
