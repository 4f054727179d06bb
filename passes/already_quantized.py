"""Layers that a model holds quantised before any pass runs: the plan names them in its notes."""

from torch import Tensor, fx

from ridgeline.codegen.kernel import constant, keyword, scheme_of
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import location
from ridgeline.passes.plan_text import places


def already_quantized(graph: fx.Graph) -> list[str]:
    """A sentence per codec: how many layers hold it, at how many bits per weight, and where."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload):
        found.setdefault(_codec(node), []).append(node)
    return [_sentence(codec, nodes) for codec, nodes in found.items()]


def _codec(node: fx.Node) -> str:
    scheme = keyword(node, "codec") or "uniform"
    if scheme == "uniform":
        scheme = scheme_of(node.args[3] if len(node.args) > 3 else None)  # pyright: ignore[reportArgumentType]
    return f"{keyword(node, 'bits')}-bit {scheme} g{keyword(node, 'group_size')}"


def _sentence(codec: str, nodes: list[fx.Node]) -> str:
    held = weights = 0
    for node in nodes:
        x, packed, *_ = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(packed, fx.Node)
        weights += int(packed.meta["val"].shape[0]) * int(x.meta["val"].shape[-1])
        bias = node.args[4] if len(node.args) > 4 else None
        tensors = [
            constant(n) for n in node.all_input_nodes if n.op == "get_attr" and n is not bias
        ]
        held += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    count = f"{len(nodes)} layers" if len(nodes) > 1 else "1 layer"
    where = places(location(node) for node in nodes)
    bits = 8 * held / weights
    return f"already quantised: {count} as {codec}, {bits:.3g} bits per weight: {where}"
