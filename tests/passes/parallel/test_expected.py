"""A graph that sends in a way that the transport was not timed for has no predicted time."""

import pytest
import torch
from torch import fx

from ridgeline.cost_model import load_target
from ridgeline.cost_model.transport import KINDS, Transport
from ridgeline.passes.parallel.expected import expected_seconds

functional = torch.ops._c10d_functional


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        ((functional.all_reduce.default, "sum", "group"), True),
        ((functional.broadcast.default, 0, "group"), False),
    ],
)
def test_of_one_collective(sent: tuple, known: bool) -> None:
    transport = Transport(2, dict.fromkeys(KINDS, 1e-3), dict.fromkeys(KINDS, 1e-9))
    graph = fx.Graph()
    x = graph.placeholder("x")
    target, *arguments = sent
    y = graph.call_function(target, (x, *arguments))
    x.meta["val"] = y.meta["val"] = torch.empty(10, 100, device="meta")
    graph.output(graph.call_function(functional.wait_tensor.default, (y,)))
    seconds = expected_seconds(graph, transport, load_target("native"))
    assert seconds == (pytest.approx(1e-3 + 4000e-9) if known else None)
