"""Normal form: one spelling for what means the same, before any pattern is matched.

Rules (`ridgeline.ir.rules`) look at one node and rewrite it in place or say no. Those of `EXACT`
change no bit of any result; the others are equal in real arithmetic. Every rule removes a spelling
that no rule brings back, so the loop ends.
"""

import torch
from torch import fx

from ridgeline.ir.aliases import mutates, sharing, writes
from ridgeline.ir.rules.biases import BIASES
from ridgeline.ir.rules.common import can_hold, insert, is_cast, reads_changed_memory
from ridgeline.ir.rules.exact import EXACT
from ridgeline.ir.rules.linear import LINEAR
from ridgeline.ir.rules.products import PRODUCTS
from ridgeline.ir.rules.rows import ROWS
from ridgeline.ir.rules.scores import SCORES
from ridgeline.ir.rules.sinks import SINKS
from ridgeline.ir.rules.views import merge_views
from ridgeline.ir.symbolic import shape_of

__all__ = ["can_hold", "is_cast", "normalize"]

aten = torch.ops.aten
REASSOCIATING = (*EXACT, *PRODUCTS, *LINEAR, *ROWS, *SCORES, *BIASES, *SINKS)
"""Their results may hold what the exact rules know, so these are among them."""


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
            merge_views(module.graph)
            module.graph.eliminate_dead_code()  # what a rule left unread is a user no more
    module.recompile()
    return module


def _out_of_place(node: fx.Node) -> bool:
    """x.masked_fill_(...) -> x.masked_fill(...), where x is a new value that nobody else reads."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.name.endswith("_"):
        return False
    x = node.args[0] if node.args else None
    plain = getattr(aten, target._schema.name.removeprefix("aten::")[:-1], None)
    if not isinstance(x, fx.Node) or x.op != "call_function" or plain is None:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    overload = getattr(plain, target._overloadname, None)
    if overload is None or random or not _is_alone(x, node):
        return False
    new = insert(node, overload, *node.args, **node.kwargs)
    before, after = x.meta["val"], new.meta["val"]
    if (before.dtype, shape_of(x)) != (after.dtype, shape_of(new)):
        node.graph.erase_node(new)
        return False
    node.replace_all_uses_with(new)
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    node.graph.erase_node(node)
    return True


def _is_alone(x: fx.Node, write: fx.Node) -> bool:
    """Nothing but writes of x, and the new values that x is the only view of, shares its memory."""
    others = sharing(x) - {x, write} - set(writes(x))
    passed_on = all(v.op == "call_function" and len(v.users) == 1 for v in others)
    return passed_on and others.isdisjoint(x.users)
