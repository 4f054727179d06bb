"""Layers that a model holds as codes already: one by one, and those of one input side by side.

    [x W1'; x W2'; ...] = x [W1; W2; ...]'

holds for codes as for plain weights: a row's codes and scales are its own, so that the weights of
layers that are coded alike lie one upon the other. Which of them are alike, what the work of one
product is and how it is put are here; the passes say why.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import argument, constant, keyword
from ridgeline.cost_model import Gemm, Work, work_of
from ridgeline.ir.aliases import writes
from ridgeline.ir.match import Site
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate
from ridgeline.passes.quantization import QuantizedWeight
from ridgeline.passes.side_by_side import SIDE_BY_SIDE, constant_biases, split, stacked

CODED = "coded"
POSITIONS = {
    name: i
    for i, name in enumerate(("x", "packed", "scale", "offset", "bias", "row_scale", "permutation"))
}
WEIGHT = ("packed", "scale", "offset", "row_scale", "permutation")
DEFAULTS = {"codec": "uniform", "group_rows": 1, "terms": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """x: what the layers read; sizes: their N; multiply: the dtype of products to come, None for
    x's own."""

    x: fx.Node
    sizes: tuple[int, ...]
    multiply: torch.dtype | None


def operand(node: fx.Node, name: str) -> fx.Node | None:
    """The node of an operand by the op's name for it, None where it is absent."""
    return argument(node, POSITIONS[name])


def coded_layers(graph: fx.Graph) -> list[fx.Node]:
    """Calls of the op whose weight and bias are constants of the model."""
    calls = graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload)
    return [node for node in calls if _constant(node)]


def one_by_one(graph: fx.Graph) -> list[Site]:
    """A site per layer."""
    return [_site([node], CODED) for node in coded_layers(graph)]


def side_by_side(graph: fx.Graph) -> list[Site]:
    """A site per two or more layers of one input that are coded alike."""
    alike: dict[Any, list[fx.Node]] = {}
    for node in coded_layers(graph):
        if (keyword(node, "group_rows") or 1) == 1:
            alike.setdefault(_form(node), []).append(node)
    return [_site(nodes, SIDE_BY_SIDE) for nodes in alike.values() if len(nodes) > 1]


def weight_of(node: fx.Node) -> QuantizedWeight:
    """The weight of a layer, sharing the model's tensors. Raises QuantizationError where no `Codec`
    describes it."""
    x = operand(node, "x")
    assert x is not None
    settings = {k: keyword(node, k) or default for k, default in DEFAULTS.items()}
    held = {n: None if (t := operand(node, n)) is None else constant(t) for n in WEIGHT}
    return QuantizedWeight(
        **held,
        bits=node.kwargs["bits"],
        group_size=node.kwargs["group_size"],
        in_features=x.meta["val"].shape[-1],
        codec_name=settings.pop("codec"),
        **settings,
    )  # pyright: ignore[reportArgumentType]


def call_of(site: Site, multiply: torch.dtype | None) -> Call:
    """What the rewrite needs to know of a site."""
    sizes = tuple(int(out.meta["val"].shape[-1]) for out in site.outs)
    return Call(site.bind["x"], sizes, multiply)


def before(site: Site) -> Work:
    """The layers as they stand."""
    return sum((work_of(n) for n in site.nodes), Work())


def after(call: Call, site: Site) -> Work:
    """One product of all the layers, formed in `call.multiply`."""
    products = [g for g in before(site).kernels if isinstance(g, Gemm)]
    order = operand(site.outs[0], "permutation")
    shared = 0 if order is None else order.meta["val"].nbytes * (len(products) - 1)
    dtype = call.x.meta["val"].dtype
    whole = dataclasses.replace(
        products[0],
        n=sum(call.sizes),
        bias=any(g.bias for g in products),
        beside_bytes=sum(g.beside_bytes for g in products) - shared,
        dtype=call.multiply or dtype,
        stored=None if call.multiply is None else dtype,
    )
    return Work((whole,))


def copied_bytes(site: Site) -> int:
    """Bytes of the stacked weights, which are held beside the model's own; 0 of one layer."""
    if len(site.outs) == 1:
        return 0
    names = ("packed", "scale", "offset", "row_scale")
    nodes = [operand(out, name) for out in site.outs for name in names]
    return sum(node.meta["val"].nbytes for node in nodes if node is not None)


def constants_of(site: Site) -> str:
    """The precondition that was proven, in words."""
    names = [str(node.target) for out in site.outs if (node := operand(out, "packed")) is not None]
    return f"constants of the model: {', '.join(names)}"


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Let a layer form its products in `multiply`; put one for layers side by side, its slices in
    their places."""
    call: Call = candidate.call
    outs = [copied[out] for out in candidate.site.outs]
    first = min(outs)
    if len(outs) == 1:
        first.update_kwarg("multiply", call.multiply)
        return first
    with module.graph.inserting_before(first):
        parts = {n: [operand(o, n) for o in outs] for n in WEIGHT[:-1]}
        held = {name: stacked(nodes, call.sizes) for name, nodes in parts.items()}
        held["bias"] = stacked([operand(o, "bias") for o in outs], call.sizes)
        held |= {"x": operand(first, "x"), "permutation": operand(first, "permutation")}
        new = module.graph.call_function(
            QUANTIZED_LINEAR.overload,
            tuple(held[name] for name in POSITIONS),
            {**first.kwargs, "multiply": call.multiply},
        )
    value = first.meta["val"]
    new.meta = {**first.meta, "val": value.new_empty((*value.shape[:-1], sum(call.sizes)))}
    split(new, outs, call.sizes)
    return new


def _site(nodes: Sequence[fx.Node], pattern: str) -> Site:
    x = operand(nodes[0], "x")
    assert x is not None
    return Site({"x": x}, {}, tuple(nodes), tuple(nodes), pattern)


def _constant(node: fx.Node) -> bool:
    held = [t for name in WEIGHT if (t := operand(node, name)) is not None]
    return all(t.op == "get_attr" and not writes(t) for t in held) and constant_biases(
        [operand(node, "bias")]
    )


def _form(node: fx.Node) -> tuple[Any, ...]:
    """What layers share that are coded alike: input, settings, kinds of tensors, permutation."""
    kinds = {
        name: (t.meta["val"].dtype, *t.meta["val"].shape[1:])
        for name in WEIGHT[:-1]
        if (t := operand(node, name)) is not None
    }
    order = operand(node, "permutation")
    columns: Tensor | None = None if order is None else constant(order)
    return (
        operand(node, "x"),
        tuple(sorted((k, str(v)) for k, v in node.kwargs.items())),
        tuple(kinds.items()),
        None if columns is None else tuple(columns.tolist()),
    )
