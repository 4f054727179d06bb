"""Stacked constants, held instead of computed in every call."""

import functools
import re

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import buffer, constant
from ridgeline.ir.aliases import writes
from ridgeline.passes.weights import WeightStore

aten = torch.ops.aten


@torch.no_grad()
def fold_stacks(module: fx.GraphModule, weights: WeightStore) -> None:
    """Put a buffer in place of each cat of the model's constants. The graphs of one `optimize`
    share it, and `weights` watches the constants for changes."""
    for node in module.graph.find_nodes(op="call_function", target=aten.cat.default):
        parts: list[fx.Node] = node.args[0]
        values = [_value(part) for part in parts]
        sources = [n for part in parts for n in (part, *part.all_input_nodes) if n.op == "get_attr"]
        if not sources or any(v is None for v in values) or node.args[1:] not in ((), (0,)):
            continue
        name = " ".join(map(_spelt, parts))
        tensors = {str(n.target): constant(n) for n in sources}
        whole = weights.held(name, tensors, functools.partial(torch.cat, values))
        name = "ridgeline_" + re.sub(r"\W+", "_", name)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(buffer(module, name, whole, node))
    module.graph.eliminate_dead_code()
    module.recompile()


def _spelt(part: fx.Node) -> str:
    """A constant by the model's own name for it."""
    if part.op == "get_attr":
        return str(part.target)
    name = "zeros" if part.target is aten.zeros.default else "t"
    return f"{name} {', '.join(map(_spelt, part.all_input_nodes)) or part.args[0]}"


def _value(part: fx.Node) -> Tensor | None:
    """A weight, its transpose or zeros; None for what is known only in a call."""
    if part.op == "get_attr":
        return None if writes(part) else constant(part).detach()
    if part.target is aten.t.default:
        inner = _value(part.args[0])
        return None if inner is None else inner.t()
    if part.target is aten.zeros.default:
        value = part.meta["val"]
        return torch.zeros(part.args[0], dtype=value.dtype, device=value.device)
    return None
