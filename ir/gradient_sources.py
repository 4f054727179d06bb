"""From which of a model's own tensors each of its results would have gradients.

sources(v), of a captured graph's value v that holds floating numbers:

    {v}                                for a parameter, buffer or constant
    {}                                 for an input
    {}                                 for detach, zeros_like, new_ones, ...: no gradient passes
    the union over its arguments       for any other operation

and {} for values that hold integers, booleans or Python numbers. A write reaches every value that
shares the memory, from there on. That a model turns gradients off inside its forward does not stand
in a graph that was captured without them.
"""

import operator

import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import sharing, written_by
from ridgeline.ir.program import Program

aten = torch.ops.aten

_DETACHED = (aten.detach.default, aten.detach_.default)

Sources = tuple[tuple[tuple[Tensor, ...], tuple[int, ...]], ...]
"""(tensors, the results that depend on them and on no other), ...; a result that is an input,
parameter or buffer itself, or depends on none, stands nowhere."""


def gradient_sources(program: Program) -> Sources:
    """The sources of a program's results, as it was captured."""
    graph = program.module.graph
    held: dict[int, tuple[int, Tensor]] = {}  # by id, as it may have several names
    found: dict[fx.Node, int] = {}  # value -> a bit for each of `held`
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(program.module)
            bits = 1 << held.setdefault(id(tensor), (len(held), tensor))[0]
        else:
            bits = 0 if _ends(node) else _union(found, node.all_input_nodes)
        found[node] = bits if _differentiable(node.meta.get("val")) else 0
        for written in written_by(node) if bits else ():
            for value in sharing(written, apart=_DETACHED):
                if value in found and _differentiable(value.meta.get("val")):
                    found[value] |= bits
    results: dict[int, list[int]] = {}
    for i, value in enumerate(graph.output_node().args[0][: program.results]):
        if isinstance(value, fx.Node) and found[value] and not _is_own(value):
            results.setdefault(found[value], []).append(i)
    return tuple(
        (tuple(tensor for i, tensor in held.values() if bits >> i & 1), tuple(at))
        for bits, at in results.items()
    )


def _union(found: dict[fx.Node, int], nodes: list[fx.Node]) -> int:
    bits = 0
    for node in nodes:
        bits |= found[node]
    return bits


def _differentiable(value: object) -> bool:
    """Does it hold floating or complex numbers, or, as a split's result, something that does?"""
    if isinstance(value, list | tuple):
        return any(map(_differentiable, value))
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _ends(node: fx.Node) -> bool:
    """Is its result without a gradient to its arguments, though all hold floating numbers?"""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return node.target in _DETACHED or name.endswith("_like") or name.startswith("new_")


def _is_own(node: fx.Node) -> bool:
    """Is it an input, parameter or buffer itself, perhaps after writes in place?"""
    while node.op == "call_function":
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        written = list(written_by(node))
        if len(written) != 1 or len(returns) != 1:
            return False
        alias = returns[0].alias_info
        if alias is None or not alias.is_write:
            return False
        (node,) = written
    return True
