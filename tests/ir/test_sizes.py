"""Free sizes as numbers."""

import torch
from torch import Tensor, nn

from ridgeline.ir.capture import capture
from ridgeline.ir.sizes import captured_sizes, number, numbers, sizes_at


class _Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x[:, ::2]) + 1


def test_every_symbol_has_the_value_it_was_captured_with() -> None:
    """Half of a size is an expression, whose symbol has a value of its own."""
    with torch.no_grad():
        program = capture(_Halves().eval(), (torch.randn(2, 7, 3),)).program
    graph = program.module.graph
    found = captured_sizes(graph)
    assert sorted(found.values()) == [2, 7]
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert numbers(relu.meta["val"].shape) == (2, 4, 3)
    graph.erase_node(graph.output_node())
    for node in reversed([n for n in graph.nodes if n is not relu]):
        if node > relu:
            graph.erase_node(node)
    alone = captured_sizes(graph)
    assert alone == found
    with sizes_at({symbol: 3 * value for symbol, value in found.items()}):
        assert numbers(relu.meta["val"].shape) == (6, 11, 3)
        assert number(5) == 5
