"""Collectives in normal form, each written in one way, and a list of them to compare and to count.

    dist.all_reduce(x)                 copy_(x, wait(all_reduce(x))); readers of x read the sum
    wait -> view -> view -> add        the views go along with the sum
    equal all-gathers                  one, as of DTensor's, which gathers for each projection

Functional collectives (`torch.distributed._functional_collectives`, `torch.ops._c10d_functional`)
and what DTensor's redistribution compiles to are in this form from the start.
"""

from collections import Counter

import torch
from torch import Tensor, fx

from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
functional = torch.ops._c10d_functional
_MERGED = (functional.all_gather_into_tensor.default, functional.wait_tensor.default)
_PURE = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.slice.Tensor),
    *(aten.split.Tensor, aten.cat.default, torch.ops.aten.permute.default),
)


def is_collective(node: fx.Node) -> bool:
    """A call that sends something, and not the wait for it."""
    overload = isinstance(node.target, torch._ops.OpOverload)
    sends = overload and node.target.namespace == "_c10d_functional"
    return sends and node.target is not functional.wait_tensor.default


def collectives(graph: fx.Graph) -> list[str]:
    """One line a collective, in the order in which they are called: name, arguments, shape."""
    lines = []
    for node in graph.nodes:
        if is_collective(node):
            sent = node.args[0].meta["val"]
            plain = [a for a in node.args[1:] if isinstance(a, str | int)]
            sizes = "x".join(map(str, shape_of(node.args[0])))
            lines.append(f"{node.target._opname} {plain} {sizes} {sent.dtype}")
    return lines


def count(graph: fx.Graph) -> Counter[str]:
    """How often each kind of collective is called."""
    return Counter(n.target._opname for n in graph.nodes if is_collective(n))


def normal_form(module: fx.GraphModule) -> int:
    """Bring the collectives of a graph into the form above; how many all-gathers are left out."""
    for node in list(module.graph.nodes):
        if node.target in (aten.copy.default, aten.copy_.default):
            _sum_in_place(node)
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
        gathered.add(first)
        if first is not node:
            gone += node.target is functional.all_gather_into_tensor.default
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    return gone


def _is_part(node: fx.Node) -> bool:
    return node.target in _PURE or getattr(node.target, "__name__", "") == "getitem"


def _sum_in_place(node: fx.Node) -> None:
    """copy(x, wait): the sum is read where x would be, from here on."""
    into, sum_ = node.args[:2]
    if not (isinstance(sum_, fx.Node) and sum_.target is functional.wait_tensor.default):
        return
    before, after = into.meta.get("val"), sum_.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return
    if before.dtype != after.dtype or shape_of(into) != shape_of(sum_):
        return
    if node.target is aten.copy_.default:
        if into.op != "call_function":  # memory of the caller's, which is to be written
            return
        into.replace_all_uses_with(sum_, delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(sum_)
    node.graph.erase_node(node)
