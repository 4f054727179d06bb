"""Graphs as text, json and dot."""

import json

import torch
from torch import nn

from ridgeline.ir.capture import capture
from ridgeline.tools.dump import dot, nodes, render_graph, text, typed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x).relu()


def graph() -> torch.fx.GraphModule:
    with torch.no_grad():
        return capture(Net().eval(), (torch.zeros(3, 5),), {}).program.module


def test_typed_names_dtype_and_shape():
    assert typed(torch.zeros(2, 64)) == "f32[2,64]"
    assert typed((torch.zeros(1, dtype=torch.bool), 3)) == "(bool[1], 3)"


def test_text_has_a_typed_line_per_operation():
    module = graph()
    operations = [n for n in module.graph.nodes if n.op == "call_function"]
    printed = text(module, "net")
    assert printed.startswith("net(")
    for node in operations:
        assert f"  %{node.name} = " in printed
    assert ",7]" in printed  # a batch of example inputs is a symbol
    assert printed.splitlines()[-1].startswith("  return ")


def test_nodes_are_plain_data_with_edges_that_exist():
    plain = json.loads(json.dumps(nodes(graph())))
    names = {node["name"] for node in plain}
    assert all(set(node["inputs"]) <= names for node in plain)
    linear = next(node for node in plain if "linear" in node["target"])
    assert linear["module"].endswith("up")
    assert ":" in linear["source"]


def test_dot_has_every_node_and_edge():
    module = graph()
    printed = dot(module, "net")
    for node in module.graph.nodes:
        assert f'"{node.name}" [label=' in printed
        for source in node.all_input_nodes:
            assert f'"{source.name}" -> "{node.name}";' in printed
    assert printed.rstrip().endswith("}")


def test_json_carries_the_plan():
    content = json.loads(render_graph(graph(), "json", "net", {"target": "a100"}))
    assert content["plan"] == {"target": "a100"}
    assert content["program"] == "net"
