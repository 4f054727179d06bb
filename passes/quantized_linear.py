"""A linear layer with a constant weight -> `ridgeline::quantized_linear` (MARLIN-style).

Law: see `ridgeline.ir.quantized_linear`. Approximate: proposed only under a tolerance, in several
forms per layer (bits, group, scheme, and for fp32 models the dtype of the products), from which
the chooser takes one or none. A form that holds the weight without loss has error 0. Source:
Frantar et al., MARLIN; Badri and Shaji, HQQ; Frantar et al., GPTQ.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ridgeline.codegen.kernel import attribute
from ridgeline.cost_model import Gemm, Work, work_of
from ridgeline.ir.aliases import writes
from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.ir.quantized_linear import MANY_ROWS, QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.quantization import Codec, QuantizedWeight

aten = torch.ops.aten

CODECS = (
    Codec(bits=4, group_size=128, scheme="symmetric"),
    Codec(bits=4, group_size=64, scheme="zero_point"),
    Codec(bits=4, group_size=32, scheme="minimum"),
    Codec(bits=8, group_size=32, scheme="symmetric"),
)
"""From the fewest bits per weight to the most."""

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
    """What the rewrite needs: the weight's name, its codec, and the dtype of the products."""

    weight_name: str
    codec: Codec
    quantized: QuantizedWeight
    multiply: torch.dtype | None


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check that the weight is a constant worth quantising; propose each form of it."""
    weight_node, transposed = _constant(site.bind["weight"])
    out = site.outs[0]
    if weight_node is None:
        return Reject(
            f"the weight is {site.bind['weight'].name}, computed at run time",
            out,
            "use a parameter or buffer as weight",
        )
    if site.bind["x"].meta["val"].dim() < 2:
        return Reject("the input is a single vector", out, "give it a batch dimension")
    if setting.training:
        return Reject(
            "the weight is being trained", out, "call model.eval() before ridgeline.optimize"
        )
    if changing := writes(weight_node):
        return Reject(
            f"{changing[0].name} ({changing[0].target}) changes the weight in every call",
            changing[0],
            "keep the weight constant in forward",
        )
    name = str(weight_node.target)
    weight = setting.weights.parameter(weight_node, transposed)
    out_features, in_features = weight.shape
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        return Reject(f"the weight is {weight.dtype}", out, "use float32, bfloat16 or float16")
    if min(out_features, in_features) < SMALLEST:
        return Reject(
            f"the weight is {out_features}x{in_features}; too small to gain from fewer bits",
            out,
            f"nothing to do: it takes {SMALLEST} inputs and outputs",
        )
    if setting.tolerance <= 0:
        return Reject(
            "approximate, and tolerance is 0", out, "pass tolerance > 0, such as tolerance=0.02"
        )
    return _forms(site, setting, name, weight)


def _constant(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The get_attr node behind the weight, and whether it is read transposed."""
    if node.op == "get_attr":
        return node, False
    if node.target is aten.t.default and node.args[0].op == "get_attr":
        return node.args[0], True
    return None, False


def _forms(site: Site, setting: Setting, name: str, weight: Tensor) -> list[Candidate]:
    x = setting.observed(site.bind["x"])
    before = sum((work_of(n) for n in site.nodes), Work())
    candidates = []
    for codec in CODECS:
        quantized = setting.weights.rounded(name, weight, codec)
        error = _output_error(x, weight, quantized.dequantize())
        for multiply in _products(x.dtype, setting):
            rounding = _rounding_error(x, weight) if multiply is not None else 0.0
            candidates.append(
                Candidate(
                    rewrite=QUANTIZED,
                    site=site,
                    call=Call(name, codec, quantized, multiply),
                    before=before,
                    after=_work(site, weight, codec, multiply or x.dtype),
                    variant=_variant(codec, multiply),
                    error=(error**2 + rounding**2) ** 0.5,
                    memory_bytes=quantized.nbytes - weight.nbytes,
                    preconditions=(f"{name} is a constant of shape {tuple(weight.shape)}",),
                )
            )
        if error == 0.0:  # codecs after this one hold more bytes and gain nothing
            break
    return candidates


def _products(dtype: torch.dtype, setting: Setting) -> tuple[torch.dtype | None, ...]:
    """The dtypes in which the products may be formed on this machine."""
    peaks = setting.target.peaks
    faster = peaks.get("bfloat16", 0) > 1.2 * peaks.get("float32", 0)
    if dtype == torch.float32 and setting.target.kind == "cpu" and faster:
        return (None, torch.bfloat16)
    return (None,)


def _output_error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    """‖X (W-Ŵ)ᵀ‖ / ‖X Wᵀ‖ on up to 256 observed rows; exactly 0 for equal weights."""
    wide = weight.float()
    if torch.equal(wide, other):
        return 0.0
    rows = x.detach().float().flatten(0, -2)[:256]
    return _ratio(rows @ (wide - other).T, rows @ wide.T)


def _rounding_error(x: Tensor, weight: Tensor) -> float:
    """What bf16 products do to X Wᵀ: x is rounded, and for many rows W."""
    rows, wide = x.detach().float().flatten(0, -2)[:256], weight.float()
    rounded = wide.bfloat16().float() if len(rows) >= MANY_ROWS else wide
    whole = rows @ wide.T
    return _ratio(rows.bfloat16().float() @ rounded.T - whole, whole)


def _ratio(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _variant(codec: Codec, multiply: torch.dtype | None) -> str:
    products = "" if multiply is None else ", bf16 products"
    return f"{codec.bits}-bit {codec.scheme} g{codec.group_size}{products}"


def _work(site: Site, weight: Tensor, codec: Codec, dtype: torch.dtype) -> Work:
    rows = 1
    for size in site.bind["x"].meta["val"].shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint
    return Work(
        (
            Gemm(
                m=rows,
                n=weight.shape[0],
                k=weight.shape[1],
                dtype=dtype,
                weight_bits=codec.bits,
                group_size=codec.group_size,
                scheme=codec.scheme,
            ),
        )
    )


def prepare(candidate: Candidate, setting: Setting) -> Candidate:
    """Refine the codes: GPTQ where calibration data were given, a search where not."""
    call: Call = candidate.call
    weight = setting.weights.parameter(*_constant(candidate.site.bind["weight"]))
    refined = setting.weights.refined(call.weight_name, weight, call.codec)
    if refined is call.quantized:
        return candidate
    x = setting.observed(candidate.site.bind["x"])
    rounding = _rounding_error(x, weight) if call.multiply is not None else 0.0
    error = _output_error(x, weight, refined.dequantize())
    return replace(
        candidate,
        call=replace(call, quantized=refined),
        error=(error**2 + rounding**2) ** 0.5,
    )


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::quantized_linear`; its tensors become buffers of `module`."""
    call: Call = candidate.call
    site, out = candidate.site, copied[candidate.site.outs[0]]
    prefix = f"ridgeline_{call.weight_name.replace('.', '_')}"
    tensors = {
        "packed": call.quantized.packed,
        "scale": call.quantized.scale,
        "offset": call.quantized.offset,
    }
    graph = module.graph
    constants: dict[str, fx.Node | None] = {}
    with graph.inserting_before(out):
        for part, tensor in tensors.items():
            constants[part] = _buffer(module, f"{prefix}_{part}", tensor, out)
        bias = copied[site.bind["bias"]] if "bias" in site.bind else None
        new = graph.call_function(
            QUANTIZED_LINEAR.overload,
            (copied[site.bind["x"]], *constants.values(), bias),
            {
                "bits": call.codec.bits,
                "group_size": call.codec.group_size,
                "multiply": call.multiply,
            },
        )
    new.meta = dict(out.meta)
    out.replace_all_uses_with(new)
    return new


def _buffer(
    module: fx.GraphModule, name: str, tensor: Tensor | None, like: fx.Node
) -> fx.Node | None:
    if tensor is None:
        return None
    stem, tries = name, 0
    while getattr(module, name, tensor) is not tensor:  # another weight's, or another codec's
        tries += 1
        name = f"{stem}_{tries}"
    if not hasattr(module, name):
        module.register_buffer(name, tensor, persistent=False)
    return attribute(module, name, like)


QUANTIZED = Pass(
    name="quantized_linear",
    op=QUANTIZED_LINEAR,
    exactness="approximate",
    patterns=patterns,
    accepts=accepts,
    prepare=prepare,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
