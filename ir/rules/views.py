"""One view where a graph makes the same view of the same tensor several times.

Models open one table for each of its readers (``cos.unsqueeze(1)`` for queries, again for keys); a
pass that looks for readers of one value must see one. Two equal views share all their
memory, so writes between them change nothing; a view that the program returns stays its own.
"""

import torch
from torch import fx

aten = torch.ops.aten

_VIEWS = frozenset(
    (
        *(aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.transpose.int),
        *(aten.permute.default, aten.view.default, aten.expand.default, aten.t.default),
    )
)
"""Those that never copy."""


def merge_views(graph: fx.Graph) -> None:
    """Let the users of each view read the first one that equals it."""
    returned = set(graph.output_node().all_input_nodes)
    first: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in _VIEWS or node in returned:
            continue
        earlier = first.setdefault((node.target, repr((node.args, node.kwargs))), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
