"""What the passes that quantise linear layers share: sites, candidates, refinement, rewriting.

`quantized_linear` and `shift_add_linear` put one operation, `ridgeline::quantized_linear`, in the
places of the same layers; they differ in the codecs and products that they offer. Layers that read
one input (query, key and value; gate and up) are proposed each for itself and side by side:
[x W1'; x W2'] = x [W1; W2]', one product whose result is sliced.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ridgeline.codegen.kernel import buffer
from ridgeline.cost_model import Work, work_of
from ridgeline.ir.aliases import writes
from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.ir.provenance import said
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.quantization import Codec, QuantizationError, QuantizedWeight
from ridgeline.passes.quantized_forms import Layer, Products, error_of, forms
from ridgeline.passes.side_by_side import constant_biases, constant_weight, split, stacked

aten = torch.ops.aten

SMALLEST = 64
"""Layers with fewer inputs or outputs than this stay: their weights are no traffic to speak of."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def linear_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """linear with and without bias; the other spellings are normalised to these."""
    example = {"x": torch.empty(2, 3, 8), "weight": torch.empty(5, 8)}
    anchor = aten.linear.default
    return (
        trace(linear_bias, anchor, **example, bias=torch.empty(5)),
        trace(linear, anchor, **example),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What the rewrite needs; quantized: the weights of all layers, one upon the other, once the
    candidate is prepared."""

    layers: tuple[Layer, ...]
    codec: Codec
    multiply: torch.dtype | None
    quantized: QuantizedWeight | None = None


Offer = Callable[[Sequence[Layer], Setting], "Sequence[tuple[Codec, Products]] | Reject"]
"""The codecs that a pass offers for some layers, with their products; or why it has none."""


def propose_forms(
    rewrite: Pass, offer: Offer, site: Site, setting: Setting
) -> list[Candidate] | Reject:
    """Check that the weights are constants worth quantising; propose each form of them."""
    layers: list[Layer] = []
    for out in site.outs:
        layer = _layer(out, setting)
        if isinstance(layer, Reject):  # where it stands beside others, its own site says so
            return layer if len(site.outs) == 1 else []
        layers.append(layer)
    if len(layers) > 1 and not _stackable(layers):
        return []
    x = site.outs[0].args[0]
    assert isinstance(x, fx.Node)
    if not setting.observed.finite(x):
        return Reject(
            f"{said(x)} is infinite or NaN on the example inputs",
            x,
            "capture with inputs on which the model is finite",
        )
    offered = offer(layers, setting)
    if isinstance(offered, Reject):
        return offered if len(layers) == 1 else []
    try:
        found = list(forms(layers, offered, setting))
    except QuantizationError as error:  # a Hessian that is none
        return Reject(str(error), site.outs[0]) if len(layers) == 1 else []
    before = sum((work_of(n) for n in site.nodes), Work())
    beside = f", {len(layers)} layers side by side" if len(layers) > 1 else ""
    return [
        Candidate(
            rewrite=rewrite,
            site=site,
            call=Call(tuple(layers), form.codec, form.multiply),
            before=before,
            after=form.work,
            variant=form.variant + beside,
            error=form.error,
            memory_bytes=form.memory_bytes,
            preconditions=(
                "constants of the model: "
                + ", ".join(f"{layer.name} {tuple(layer.weight.shape)}" for layer in layers),
            ),
        )
        for form in found
    ]


def _layer(out: fx.Node, setting: Setting) -> Layer | Reject:
    x, read, bias = (*out.args, None)[:3]
    assert isinstance(x, fx.Node)
    assert isinstance(read, fx.Node)
    node, transposed = constant_weight(read)
    if setting.tolerance <= 0 and (node is not None or read.op == "placeholder"):
        return Reject(
            "approximate, and tolerance is 0", out, "pass tolerance > 0, such as tolerance=0.02"
        )
    if read.op == "placeholder":
        return Reject(
            f"the weight is {said(read)}, an input of the graph",
            out,
            "use a parameter or buffer as weight, and call within torch.no_grad()",
        )
    if node is None:
        return Reject(
            f"the weight is {said(read)}, computed at run time",
            out,
            "use a parameter or buffer as weight",
        )
    if x.meta["val"].dim() < 2:
        return Reject("the input is a single vector", out, "give it a batch dimension")
    if setting.training:
        return Reject(
            "the weight is being trained", out, "call model.eval() before ridgeline.optimize"
        )
    if changing := writes(node):
        return Reject(
            f"{said(changing[0])} changes the weight in every call",
            changing[0],
            "keep the weight constant in forward",
        )
    weight = setting.weights.parameter(node, transposed)
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        return Reject(f"the weight is {weight.dtype}", out, "use float32, bfloat16 or float16")
    if min(weight.shape) < SMALLEST:
        return Reject(
            f"the weight is {weight.shape[0]}x{weight.shape[1]}, too small to be worth it: layers"
            f" with fewer than {SMALLEST} inputs or outputs stay as they are",
            out,
        )
    if broken := setting.weights.broken(weight):
        return Reject(
            f"{broken} of the {weight.numel()} weights are infinite or NaN",
            out,
            "repair the checkpoint",
        )
    return Layer(out, str(node.target), weight, bias)  # pyright: ignore[reportArgumentType]


def _stackable(layers: list[Layer]) -> bool:
    """One dtype, and biases that are constants, if any."""
    biases = constant_biases([layer.bias for layer in layers])
    return biases and len({layer.weight.dtype for layer in layers}) == 1


def prepare(candidate: Candidate, setting: Setting) -> Candidate:
    """Refine the codes: against calibration data where they were given, by a search where not."""
    call: Call = candidate.call
    for layer in call.layers:
        setting.weights.refined(layer.name, layer.weight, call.codec)
    names = tuple(layer.name for layer in call.layers)
    return replace(
        candidate,
        call=replace(call, quantized=setting.weights.stacked(names, call.codec)),
        error=error_of(call.layers, call.codec, call.multiply, setting, refined=True),
    )


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::quantized_linear`; its tensors become buffers of `module`."""
    call: Call = candidate.call
    first, quantized = call.layers[0], call.quantized
    assert quantized is not None
    outs = [copied[layer.out] for layer in call.layers]
    stem = "_".join(["ridgeline", *first.name.split("."), *(["and_beside"] * (len(outs) > 1))])
    settings = quantized.settings
    plain = {"codec": "uniform", "group_rows": 1, "terms": 1}  # the schema's defaults stay unsaid
    said_settings = {k: v for k, v in settings.items() if plain.get(k) != v}
    graph = module.graph
    with graph.inserting_before(min(outs)):
        held = {n: buffer(module, f"{stem}_{n}", t, outs[0]) for n, t in quantized.tensors.items()}
        beside = [held.get("row_scale"), held.get("permutation")]
        new = graph.call_function(
            QUANTIZED_LINEAR.overload,
            (
                copied[first.out].args[0],
                *(held.get(name) for name in ("packed", "scale", "offset")),
                _bias(call, copied),
                *(beside if any(beside) else ()),
            ),
            {**said_settings, "multiply": call.multiply},
        )
    new.meta = dict(outs[0].meta)
    if len(outs) == 1:
        outs[0].replace_all_uses_with(new)
        return new
    sizes = [layer.weight.shape[0] for layer in call.layers]
    value = outs[0].meta["val"]
    new.meta["val"] = value.new_empty((*value.shape[:-1], sum(sizes)))
    split(new, outs, sizes)
    return new


def _bias(call: Call, copied: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The bias of all layers, zeros where one has none."""
    nodes = [None if layer.bias is None else copied[layer.bias] for layer in call.layers]
    if len(nodes) == 1:
        return nodes[0]
    return stacked(nodes, [layer.weight.shape[0] for layer in call.layers])
