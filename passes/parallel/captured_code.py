"""A captured graph in lines that are equal on all ranks where their code is.

    operation(operands, each by what made it and a digest of its line, and literals) in module

So lines do not depend on the order in which they stand: a model may iterate over a set of names,
which each process does in an order of its own.

Graphs of parts of one size are one graph. Where a rank has one key-value head and another has two,
or one channel more, what follows from that is not compared: sizes, views, copies, and slices, which
are in no graph where they take all. Never compared: the row at which a rank's part of the
vocabulary begins. A weight or constant that all ranks hold whole is told by samples of its numbers.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import constant
from ridgeline.ir.provenance import operator, said
from ridgeline.passes.base import location
from ridgeline.passes.parallel.layouts import VOCABULARY, Part, holds_tensor
from ridgeline.passes.parallel.rows import COPIES, VIEWS
from ridgeline.passes.parallel.signature import SAMPLED, digest_of

_UNEQUAL = (*COPIES, *VIEWS, torch.ops.aten.slice.Tensor)


def code_of(graph: fx.Graph, splits: Mapping[str, Part], equal: bool) -> list[tuple[str, str]]:
    """(what is compared, the node as it is named in errors), in the order of the graph.

    splits: name of a weight -> how it is split; a rank's own are not read. equal: all ranks hold as
    many heads and channels.
    """
    lines: list[tuple[str, str]] = []
    names: dict[fx.Node, str] = {}
    vocabulary = {n.rpartition(".")[0] for n, part in splits.items() if part.how == VOCABULARY}
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"input {len(names)}"
            continue
        if node.op == "call_function" and node.target in (COPIES if equal else _UNEQUAL):
            names[node] = names[node.args[0]]
            continue
        if not (equal or holds_tensor(node) or node.op in ("get_attr", "output")):
            names[node] = "size"
            continue
        path = location(node).rpartition(":")[0]
        if node.op == "get_attr":
            text = names[node] = str(node.target)
            if node.target not in splits and isinstance(value := constant(node), Tensor):
                text = f"{text} {digest_of([('', value)], SAMPLED)}"
        else:
            text = f"{_called(node)}({_arguments(node, names, equal, path in vocabulary)})"
            digest = hashlib.sha256(f"{text} {path}".encode()).hexdigest()[:8]
            names[node] = f"{operator(node.target)} {digest}"
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                # Who reads it from here on reads what was written.
                names[node.args[0]] = names[node]
        where = f" in {path}" if path else ""
        lines.append((f"{text}{where}", f"{said(node)}{where}"))
    return lines


def _arguments(node: fx.Node, names: Mapping[fx.Node, str], equal: bool, starts: bool) -> str:
    """starts: whether integers may say where this rank's rows begin."""
    sizes = set() if equal else _sizes(node.target)

    def told(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(told, value))}]"
        if isinstance(value, torch.device):
            return value.type  # each rank has one of its own
        return "row" if starts and type(value) is int else repr(value)

    given = [*enumerate(node.args), *node.kwargs.items()]
    return ", ".join("size" if key in sizes else told(value) for key, value in given)


def _called(node: fx.Node) -> str:
    """An overload, or a function of Python's by its name."""
    if isinstance(node.target, str | torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", type(node.target).__name__)


def _sizes(target: Any) -> set[int | str]:
    """Of an operation's arguments, by place and by name, those that are sizes."""
    schema = getattr(target, "_schema", None)
    known = enumerate(schema.arguments if schema else ())
    return {key for i, a in known if _is_size(a.real_type) for key in (i, a.name)}


def _is_size(kind: Any) -> bool:
    """A number that may be symbolic, an optional one, or a list of them."""
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() == "SymIntType"
