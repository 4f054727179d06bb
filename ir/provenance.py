"""Which line of the model a node came from, and what the user called it there.

Captured nodes carry ``stack_trace`` (the Python frames of the call), ``nn_module_stack`` (the
modules it was made in) and ``torch_fn`` (the function or method called, before its translation to
ATen). The rules of the normal form hand all three on, so that a reason can name the code as it was
written.
"""

import re
from pathlib import Path

import torch
from torch import fx

KEPT = ("nn_module_stack", "stack_trace", "torch_fn")
"""What a node made by a rule takes over from the node that it replaces."""

_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+)')
_HERE = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)


def source_of(node: fx.Node) -> str:
    """``file:line`` of the innermost frame that is the model's own code.

    Frames of torch count where there is no other, as for `nn.Linear` called by `nn.Sequential`; ""
    for nodes without a trace, such as inputs.
    """
    frames = [m.group("file", "line") for m in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    outside = [f for f in frames if not f[0].startswith((_HERE, "torch/", "<"))]
    own = [f for f in outside if not f[0].startswith(_TORCH)]
    chosen = own or outside
    return ":".join(chosen[-1]) if chosen else ""


def operation(node: fx.Node) -> str:
    """The function or method as the user wrote it, such as masked_fill; else the ATen operator."""
    if node.op != "call_function":
        return {"output": "return", "placeholder": "input"}.get(node.op, node.name)
    kind, _, name = node.meta.get("torch_fn", ("", ""))[1].rpartition(".")
    # `a + b` may be captured as __radd__, and calls of an overload under the overload's name.
    if not name or name.startswith("__") or kind.startswith("OpOverload"):
        return operator(node.target)
    return name.strip("_")


def operator(target: object) -> str:
    """An overload by its plain name: aten.masked_fill.Scalar is masked_fill; add_ writes."""
    schema = getattr(target, "_schema", None)
    if schema:
        return schema.name.partition("::")[2].lstrip("_")
    return getattr(target, "__name__", str(target)).strip("_")


def said(node: fx.Node) -> str:
    """A node in a sentence: ``'masked_fill' at model.py:12``."""
    if node.op == "output":
        return "the model's return value"
    if node.op == "placeholder" or node.op == "get_attr":
        return f"'{node.name}'"
    source = source_of(node)
    return f"'{operation(node)}'" + (f" at {short(source)}" if source else "")


def short(source: str) -> str:
    """``file:line`` with the path below the working directory or site-packages, if it is there."""
    path, _, line = source.rpartition(":")
    if "site-packages/" in path:
        return f"{path.rpartition('site-packages/')[2]}:{line}"
    here = Path.cwd()
    inside = Path(path).is_relative_to(here)
    return f"{Path(path).relative_to(here)}:{line}" if inside else source
