"""How long a graph should take on this machine: the cost model's kernels and the group's transport.

    now = 0, link = 0                    seconds at which this rank, and the link, are free
    compute   now += c w                 c = ranks · threads / cores, where they are too many
    send      link = max(now, link) + t  and now = link where the transport has no core of its own
    wait      now = max(now, end of its send)

w: `estimate` of the operation, t: `Transport`, both measured on this machine. The graph is taken in
its order, one rank of equal ones. Left out: what Inductor fuses.
"""

import os

import torch
from torch import fx

from ridgeline.cost_model import Target, estimate, work_of
from ridgeline.cost_model.transport import KINDS, Transport
from ridgeline.ir.sizes import numbers
from ridgeline.passes.parallel.collectives import is_collective

_WAIT = torch.ops._c10d_functional.wait_tensor.default


def expected_seconds(graph: fx.Graph, transport: Transport, target: Target) -> float | None:
    """Seconds of one call at the sizes that were captured; None where the graph sends in a way that
    the transport was not timed for."""
    if any(is_collective(node) and node.target._opname not in KINDS for node in graph.nodes):
        return None
    cores = os.cpu_count() or 1
    crowd = max(1.0, transport.world * target.threads / cores)
    spare = cores > transport.world * target.threads
    now = link = 0.0
    ends: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if is_collective(node):
            link = ends[node] = max(now, link) + _sending(node, transport)
            now = now if spare else link
        elif node.target is _WAIT:
            now = max(now, ends.get(node.args[0], 0.0))
        elif node.op == "call_function":
            now += crowd * estimate(work_of(node), target).seconds
    return max(now, link)


def _sending(node: fx.Node, transport: Transport) -> float:
    """Of the larger of what goes in and what comes out: the whole value."""
    values = node.args[0].meta["val"], node.meta["val"]
    size = max(v.dtype.itemsize * torch.Size(numbers(v.shape)).numel() for v in values)
    return transport.seconds(node.target._opname, size)
