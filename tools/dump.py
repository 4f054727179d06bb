"""A program as text, json or dot, at each stage of the way to code."""

import json
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.provenance import source_of
from ridgeline.passes.base import location

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "bool",
}


def render_graph(module: fx.GraphModule, form: str, title: str, plan: dict[str, Any]) -> str:
    """The graph as `form` (text, json or dot); json carries the plan beside it."""
    if form == "json":
        return json.dumps({"program": title, "nodes": nodes(module), "plan": plan}, indent=2)
    return text(module, title) if form == "text" else dot(module, title)


def typed(value: Any) -> str:
    """``f32[2,s0,64]`` for a tensor, the value itself otherwise."""
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(typed, value))})"
    return str(value)


def text(module: fx.GraphModule, title: str) -> str:
    """One line per node, typed; a line above each run of nodes names the module they came from."""
    graph = module.graph
    inputs = ", ".join(
        f"%{n.name}: {typed(n.meta.get('val'))}" for n in graph.find_nodes(op="placeholder")
    )
    lines, place = [f"{title}({inputs})"], None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            lines.append(f"  return {_argument(node.args[0])}")
            continue
        here = location(node).rpartition(":")[0]
        if here != place:
            lines.append(f"  # {here or 'top level'}")
            place = here
        lines.append(f"  %{node.name} = {_call(node)} : {typed(node.meta.get('val'))}")
    return "\n".join(lines)


def nodes(module: fx.GraphModule) -> list[dict[str, Any]]:
    """Every node as plain data: name, op, target, arguments, value, module path, source line."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": str(node.target),
            "inputs": [n.name for n in node.all_input_nodes],
            "value": typed(node.meta.get("val")),
            "module": location(node).rpartition(":")[0],
            "source": source_of(node),
        }
        for node in module.graph.nodes
    ]


def dot(module: fx.GraphModule, title: str) -> str:
    """Graphviz text; `ridgeline::` nodes are filled."""
    lines = [f'digraph "{title}" {{', '  node [shape=box, fontname="monospace"];']
    for node in module.graph.nodes:
        ours = node.op == "call_function" and str(node.target).startswith("ridgeline")
        style = ', style=filled, fillcolor="lightblue"' if ours else ""
        label = f"{node.name}\\n{_name(node)}\\n{typed(node.meta.get('val'))}"
        lines.append(f'  "{node.name}" [label="{label}"{style}];')
        lines += [f'  "{n.name}" -> "{node.name}";' for n in node.all_input_nodes]
    return "\n".join([*lines, "}"])


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _call(node: fx.Node) -> str:
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items() if v is not None]
    return f"{_name(node)}({', '.join(arguments)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.target if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_argument, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
