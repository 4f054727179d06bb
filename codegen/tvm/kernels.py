"""The TVM kernels of the host CPU, as nodes of a graph."""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import fx

from ridgeline.codegen import saved_attention
from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.kernel import (
    Kernel,
    KernelReport,
    argument,
    constant,
    folded,
    hints,
    keyword,
    norm_arguments,
    scheme_of,
)
from ridgeline.codegen.tvm import (
    attention,
    attention_training,
    binary_attention,
    gated,
    group_rational,
    norm,
    norm_rational,
    quantized_linear,
    rotary,
)
from ridgeline.codegen.tvm.isa import host_isa
from ridgeline.cost_model import Target
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.binary_attention import BINARY_ATTENTION
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL
from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.layout import keep_layout
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.ir.rotary import ROTARY


def _place_attention(node: fx.Node, module: fx.GraphModule) -> None:
    attention.register_lowering()
    node.target = attention.OP


def _place_attention_saved(node: fx.Node, module: fx.GraphModule) -> None:
    saved_attention.place(node, module, attention_training.OP)


def _report_attention_saved(node: fx.Node, target: Target) -> KernelReport:
    """Forward and backward; what is shown is the backward's source."""
    query, _, value = (hints(argument(node, i)) for i in range(3))
    dtype, mask = node.meta["val"].dtype, argument(node, 3)
    mask = None if mask is None else mask.meta["val"].dtype
    capped = node.kwargs.get("soft_cap") is not None
    source = functools.partial(
        attention_training.source,
        query[3] + -query[3] % 8,
        value[3] + -value[3] % 8,
        dtype=dtype,
        mask=mask,
        capped=capped,
    )
    source()  # raises where there is no kernel
    return KernelReport(
        ATTENTION.qualified,
        "tvm",
        target.name,
        f"{host_isa()}, {_name(dtype)}, forward and backward, D {query[3]}/{value[3]}",
        source,
    )


def _report_attention(node: fx.Node, target: Target) -> KernelReport:
    query, key, value = (hints(argument(node, i)) for i in range(3))
    dtype, mask, sinks = node.meta["val"].dtype, argument(node, 3), argument(node, 4)
    causal = node.kwargs.get("diagonal") is not None
    decode = query[2] * (query[1] // key[1]) <= attention.DECODE_ROWS
    source = functools.partial(
        attention.source,
        query[3] + -query[3] % 8,  # the kernels take multiples of 8; others are padded per call
        value[3] + -value[3] % 8,
        dtype=dtype,
        mask=None if mask is None else mask.meta["val"].dtype,
        sinks=None if sinks is None else sinks.meta["val"].dtype,
        capped=node.kwargs.get("soft_cap") is not None,
        role="decode" if decode else "tiled",
    )
    return KernelReport(
        ATTENTION.qualified,
        "tvm",
        target.name,
        f"{host_isa()}, {_name(dtype)}, {'decoding' if decode else 'tiled'},"
        f" D {query[3]}/{value[3]}, {query[1]} heads on {key[1]}"
        f"{', causal' if causal else ''}{', masked' if mask is not None else ''}"
        f"{', sinks' if sinks is not None else ''}"
        f"{', capped' if node.kwargs.get('soft_cap') is not None else ''}",
        source,
    )


def _place_binary_attention(node: fx.Node, module: fx.GraphModule) -> None:
    binary_attention.register_lowering()
    node.target = binary_attention.OP


def _report_binary_attention(node: fx.Node, target: Target) -> KernelReport:
    query, key, value = (argument(node, i) for i in range(3))
    code = torch.promote_types(query.meta["val"].dtype, key.meta["val"].dtype)
    depth, width = hints(query)[3], hints(value)[3]
    dtype = value.meta["val"].dtype
    source = functools.partial(binary_attention.source, depth, width, code=code, value=dtype)
    source()  # raises where there is no kernel
    heads = hints(query)[1]
    said = f"{host_isa()}, {_name(dtype)}, codes of {_name(code)}, D {depth}/{width}, {heads} heads"
    return KernelReport(BINARY_ATTENTION.qualified, "tvm", target.name, said, source)


_WEIGHT = ("offset", "row_scale", "permutation")
"""Optional tensors of a quantised weight, beside its codes and scale."""


def _weight(node: fx.Node) -> tuple[fx.Node, fx.Node | None, dict[str, Any]]:
    """(x, bias, the weight's tensors and settings as `quantized_linear_layout.pack` takes them)."""
    x, packed, scale, offset, bias, *more = (argument(node, i) for i in range(7))
    operands = [t for t in (packed, scale, offset, *more) if t is not None]
    if any(t.op != "get_attr" for t in operands):
        raise UnsupportedProblem(
            "the codes are an input of the graph; kernels lay constants out once: call"
            " ridgeline.optimize on the model instead"
        )
    optional = zip(_WEIGHT, (offset, *more), strict=True)
    held = {"packed": constant(packed), "scale": constant(scale)}
    held |= {name: None if t is None else constant(t) for name, t in optional}
    names = ("codec", "terms", "group_rows", "bits", "group_size")
    settings = {name: node.kwargs[name] for name in names if name in node.kwargs}
    return x, bias, held | settings | {"in_features": hints(x)[-1]}


def _spec(node: fx.Node) -> quantized_linear.KernelSpec:
    x, bias, weight = _weight(node)
    dtype = x.meta["val"].dtype
    return quantized_linear.kernel_spec(
        quantized_linear.described(**weight),
        activation=dtype,
        multiply=keyword(node, "multiply") or dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
    )


def _place_linear(node: fx.Node, module: fx.GraphModule) -> None:
    """Repack the canonical codes for this CPU, once per weight, and call the kernel's op."""
    x, bias, weight = _weight(node)
    spec, packed = _spec(node), argument(node, 1)
    held = functools.cache(lambda: quantized_linear.pack(**weight))
    parts = ["codes", "scale", *(part for part in _WEIGHT if weight[part] is not None)]
    with node.graph.inserting_before(node):
        operands = {
            part: folded(module, packed, f"tvm_{part}", lambda part=part: getattr(held(), part))
            for part in parts
        }
    codes, scale, offset, row_scale, permutation = map(operands.get, ("codes", "scale", *_WEIGHT))
    quantized_linear.register_lowering()
    node.target = quantized_linear.OP
    node.args = (x, codes, scale, offset, bias, row_scale, permutation, str(spec))
    node.kwargs = {}


def _report_linear(node: fx.Node, target: Target) -> KernelReport:
    spec = _spec(node)
    scheme = scheme_of(argument(node, 3)) if spec.codec == "uniform" else spec.codec
    rows = math.prod(hints(argument(node, 0))[:-1])
    many = ", decoded first" if quantized_linear.decodes_first(spec, rows) else ""
    shared = f" of {spec.group_rows} rows" if spec.group_rows > 1 else ""
    products = "fixed-point" if spec.multiply == "int16" else spec.multiply
    return KernelReport(
        QUANTIZED_LINEAR.qualified,
        "tvm",
        target.name,
        f"{spec.isa}, {spec.bits}-bit {scheme} g{spec.group_size}{shared},"
        f" {spec.out_features}x{spec.in_features}, {products} products{many}",
        functools.partial(quantized_linear.source, spec, rows=rows),
    )


def _norm(node: fx.Node) -> norm.NormKernel:
    rows, parameters, center = norm_arguments(node)
    weight, bias = (None if p is None else p.meta["val"].dtype for p in parameters)
    return norm.norm_kernel(
        hints(rows[0])[-1],
        rows[0].meta["val"].dtype,
        weight=weight,
        bias=bias,
        residual=len(rows) > 1,
        center=center,
    )


def _place_norm(node: fx.Node, module: fx.GraphModule) -> None:
    kernel = _norm(node)
    rows, parameters, _ = norm_arguments(node)
    norm.register_lowering()
    node.target = norm.NORM if len(rows) == 1 else norm.ADD_NORM
    shift = keyword(node, "shift") or 0.0
    node.args = (*rows, *parameters, keyword(node, "eps"), shift, str(kernel))
    node.kwargs = {}


def _report_norm(node: fx.Node, target: Target) -> KernelReport:
    kernel = _norm(node)
    said = {"weight": kernel.weight, "bias": kernel.bias}
    parameters = "".join(f", {name} {d}" for name, d in said.items() if d != "none")
    return KernelReport(
        node.target._schema.name,  # pyright: ignore[reportFunctionMemberAccess]
        "tvm",
        target.name,
        f"rows of {kernel.size}, {kernel.dtype}{parameters}",
        functools.partial(norm.source, kernel),
    )


def _stays(node: fx.Node, module: fx.GraphModule) -> None:
    """Nothing to place: the kernel is registered for the operation itself."""


def _report_group_rational(node: fx.Node, target: Target) -> KernelReport:
    x, numerator, denominator = (hints(argument(node, i)) for i in range(3))
    groups = max(numerator[0], denominator[0])
    dtype, form = node.meta["val"].dtype, node.kwargs.get("form", FORMS[0])
    source = functools.partial(
        group_rational.source,
        x[-1],
        groups=groups,
        m=numerator[1] - 1,
        n=denominator[1],
        dtype=dtype,
        form=form,
        numerators=numerator[0],
        denominators=denominator[0],
    )
    return KernelReport(
        GROUP_RATIONAL.qualified,
        "tvm",
        target.name,
        f"{host_isa()}, {_name(dtype)}, degrees {numerator[1] - 1}/{denominator[1]}, {form},"
        f" {groups} groups of {x[-1] // groups}",
        source,
    )


def _report_norm_rational(node: fx.Node, target: Target) -> KernelReport:
    weight, bias = (argument(node, i) for i in (1, 2))
    numerator, denominator = (hints(argument(node, i)) for i in (3, 4))
    size, dtype = hints(node)[-1], node.meta["val"].dtype
    form = node.kwargs.get("form", FORMS[0])
    source = functools.partial(
        norm_rational.source,
        size,
        dtype=dtype,
        weight=None if weight is None else weight.meta["val"].dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
        m=numerator[1] - 1,
        n=denominator[1],
        form=form,
    )
    source()  # raises where there is no kernel
    said = f"rows of {size}, {_name(dtype)}, degrees {numerator[1] - 1}/{denominator[1]}, {form}"
    return KernelReport(LAYER_NORM_RATIONAL.qualified, "tvm", target.name, said, source)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place_gated(node: fx.Node, module: fx.GraphModule) -> None:
    gated.register_lowering()
    node.target = gated.OP


def _report_gated(node: fx.Node, target: Target) -> KernelReport:
    activation, dtype = node.kwargs["activation"], node.meta["val"].dtype
    source = functools.partial(gated.source, activation, dtype)
    source()  # raises where there is no kernel
    said = f"{host_isa()}, {_name(dtype)}, {activation}"
    return KernelReport(GATED_ACTIVATION.qualified, "tvm", target.name, said, source)


def _place_rotary(node: fx.Node, module: fx.GraphModule) -> None:
    """The kernel writes queries and keys side by side: the outputs become views of that."""
    rotary.register_lowering()
    aten = torch.ops.aten
    q, k = (argument(node, i).meta["val"] for i in range(2))
    heads, key_heads = int(q.shape[1]), int(k.shape[1])
    packed = q.new_empty((q.shape[0], q.shape[2], heads + key_heads, q.shape[3]))
    bounds = (0, heads), (heads, heads + key_heads)
    for item in list(node.users):
        start, end = bounds[item.args[1]]
        with node.graph.inserting_before(item):
            part = node.graph.call_function(aten.slice.Tensor, (node, 2, start, end))
            part.meta["val"] = packed[:, :, start:end]
            view = node.graph.call_function(aten.transpose.int, (part, 1, 2))
            view.meta["val"] = packed[:, :, start:end].transpose(1, 2)
        item.replace_all_uses_with(view)
        keep_layout(view, item)
        node.graph.erase_node(item)
    node.target, node.meta["val"] = rotary.OP, packed


def _report_rotary(node: fx.Node, target: Target) -> KernelReport:
    q, k, cos, _ = (hints(argument(node, i)) for i in range(4))
    dtype, angle = (argument(node, i).meta["val"].dtype for i in (0, 2))
    interleaved = node.kwargs["interleaved"]
    source = functools.partial(
        rotary.source, q[3], cos[2], interleaved=interleaved, dtype=dtype, angle=angle
    )
    source()  # raises where there is no kernel
    form = "neighbours" if interleaved else "halves"
    said = f"{host_isa()}, {_name(dtype)}, {form}, R {cos[2]} of D {q[3]}, {q[1]} and {k[1]} heads"
    return KernelReport(ROTARY.qualified, "tvm", target.name, said, source)


_RATIONAL = Kernel(
    GROUP_RATIONAL.qualified,
    "tvm",
    frozenset({"cpu"}),
    _stays,
    _report_group_rational,
)

KERNELS = (
    Kernel(
        ATTENTION.qualified,
        "tvm",
        frozenset({"cpu"}),
        _place_attention,
        _report_attention,
        Kernel(
            ATTENTION.qualified,
            "tvm",
            frozenset({"cpu"}),
            _place_attention_saved,
            _report_attention_saved,
        ),
    ),
    Kernel(QUANTIZED_LINEAR.qualified, "tvm", frozenset({"cpu"}), _place_linear, _report_linear),
    dataclasses.replace(_RATIONAL, training=_RATIONAL),
    *(
        Kernel(op.qualified, "tvm", frozenset({"cpu"}), _place_norm, _report_norm)
        for op in (RMS_NORM, ADD_RMS_NORM, LAYER_NORM, ADD_LAYER_NORM)
    ),
    Kernel(LAYER_NORM_RATIONAL.qualified, "tvm", frozenset({"cpu"}), _stays, _report_norm_rational),
    Kernel(
        BINARY_ATTENTION.qualified,
        "tvm",
        frozenset({"cpu"}),
        _place_binary_attention,
        _report_binary_attention,
    ),
    Kernel(GATED_ACTIVATION.qualified, "tvm", frozenset({"cpu"}), _place_gated, _report_gated),
    Kernel(ROTARY.qualified, "tvm", frozenset({"cpu"}), _place_rotary, _report_rotary),
)
