"""Heads, channels and vocabulary that the ranks share out, followed from weight to weight.

    W [N, K] split by column    y = x W_rᵀ        its last dimension holds this rank's part of N
    ... each value in between    which dimension holds the rank's part: its `Share`
    W [N, K] split by row       y_r = x_r W_rᵀ    a partial sum, which `layouts` follows

What computes each index of that dimension by itself, from operands that are shared out alike or
the same for all indices, is the rank's part of what one process computes. What reads indices
together (a mean, norm, softmax, roll or sort along it, a product over it), or has a value of its
own for each (a slope for each head), would compute with what other ranks hold. So an operation
passes if its rule is known (`share_rules`) and the rule allows it; each other one is a LayoutError.

What cannot be seen: numbers that a model's code computes from sizes, such as `h / h.shape[-1]`, are
this rank's sizes and constants when the graph is captured.
"""

from collections.abc import Mapping

from torch import Tensor, fx

from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.layouts import LayoutError, Part
from ridgeline.passes.parallel.share_rules import result_share
from ridgeline.passes.parallel.shares import Across, Share, Shares


def follow(graph: fx.Graph, parts: Mapping[str, Part]) -> dict[fx.Node, Share]:
    """Which dimension of each value holds this rank's part, for values that have one.

    parts: name of an attribute -> how it is split; those without a dimension are not followed.

    Raises:
        LayoutError: naming the operation that reads what other ranks hold.
    """
    caches: dict[fx.Node, Share] = {}
    while True:
        known = len(caches)
        shares = Shares(caches)
        for node in graph.nodes:
            if node.op == "get_attr":
                _hold(node, parts.get(str(node.target)), shares)
            elif node.op == "call_function":
                _compute(node, shares)
        if len(caches) == known:  # else a cache was found that earlier operations may read
            return shares.held


def _hold(node: fx.Node, part: Part | None, shares: Shares) -> None:
    if part is not None and part.dim is not None:
        shares.held[node] = Share(
            part.dim, cuts=part.cuts, packed=part.packed, weight=part.how, path=part.path
        )


def _compute(node: fx.Node, shares: Shares) -> None:
    shared = [n for n in node.all_input_nodes if n in shares.held]
    if not shared or not _makes_tensor(node):
        return
    shares.reader = node
    try:
        share = result_share(node, shares)
    except Across as error:
        read = shares.held[shared[0]]
        raise LayoutError(
            f"{said(node)} ({node.name}) {error}: dimension {read.dim} of {said(shared[0])},"
            f" {shape_of(shared[0])[read.dim]} long here, holds this rank's part of"
            f" '{read.path}'; change the model, or keep that layer on every rank with"
            f" parallelize(model, whole=[{read.path!r}])"
        ) from error
    if share is not None:
        shares.held[node] = share


def _makes_tensor(node: fx.Node) -> bool:
    """No size of a value, and no assertion about it: those of one rank are as good as any."""
    target = str(node.target)
    if "sym_" in target or "_assert_tensor_metadata" in target:
        return False
    value = node.meta.get("val")
    return value is None or isinstance(value, Tensor | list | tuple) or "item" in target
