"""Channels that the ranks share out, and operations that would need all of them at once.

    y = sum over ranks of x_r W_rᵀ        x_r [..., K_r], this rank's channels of x [..., K]

What is computed element by element of such an x_r is the rank's part of what one process computes;
a mean, norm or softmax over its last dimension is another number, because it lacks the others'
channels. Heads are not meant: they are whole on a rank, and lie in dimensions of their own.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from ridgeline.ir.normalize import is_cast
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.rows import COPIES, NORMS, VIEWS, argument

_OVER_A_DIMENSION = frozenset(
    (
        *("mean", "sum", "prod", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"),
        *("norm", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "cumsum"),
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "topk", "kthvalue", "sort"),
    )
)


def reads_across(inputs: Iterable[fx.Node]) -> fx.Node | None:
    """An operation that reads the channels of a row as if they were all there; None without one.

    inputs: what row-parallel products read, [..., K_r].
    """
    for value in _channelwise(inputs):
        for node in (value, *value.users):
            if _over_last(node):
                return node
    return None


def _channelwise(inputs: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """`inputs`, and what is joined to them by operations on each channel."""
    stack: list[fx.Node] = list(inputs)
    seen: set[fx.Node] = set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        stack += [n for n in value.all_input_nodes if _same_channels(n, value)]
        stack += [n for n in value.users if _same_channels(value, n)]


def _same_channels(before: fx.Node, after: fx.Node) -> bool:
    if not all(isinstance(n.meta.get("val"), Tensor) for n in (before, after)):
        return False
    had, has = shape_of(before), shape_of(after)
    if not had or not has or had[-1] != has[-1]:
        return False
    target = after.target
    if target in VIEWS:
        return len(had) >= len(has) and had[-2:-1] != [1]  # [..., 1, d] may be one head
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pointwise or target in COPIES or is_cast(after)


def _over_last(node: fx.Node) -> bool:
    """Is it a norm, or a reduction or scan over the last dimension of what it reads?"""
    if node.target in NORMS:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    if getattr(packet, "__name__", "") not in _OVER_A_DIMENSION:
        return False
    rank = node.args[0].meta["val"].dim()
    for place, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == "dim":
            given = argument(node, place, "dim")
            given = parameter.default_value if given is None else given
            dims = given if isinstance(given, list | tuple) else [given]
            return not dims or any(d is None or d % rank == rank - 1 for d in dims)
    return node.args[0].meta["val"].dim() > 0 and len(node.all_input_nodes) == 1  # over all
