"""The Triton kernels of GPUs, as nodes of a graph and as entries of a plan."""

import dataclasses
import functools
import math

import torch
from torch import fx

from ridgeline.codegen import saved_attention
from ridgeline.codegen.kernel import Kernel, KernelReport, argument, hints, norm_arguments
from ridgeline.codegen.triton import attention_training, pointwise
from ridgeline.codegen.triton import ops as ops  # registers the kernels' own ops
from ridgeline.codegen.triton.binary_attention_launch import compile_binary_attention
from ridgeline.codegen.triton.cross_compile import Compiled
from ridgeline.codegen.triton.cuda_text import cuda_of_binary_attention, cuda_of_linear
from ridgeline.codegen.triton.emit import standalone_source
from ridgeline.codegen.triton.group_rational_launch import compile_group_rational
from ridgeline.codegen.triton.linear_nodes import compile_linear_node, place_linear_node
from ridgeline.codegen.triton.linear_rational_launch import compile_linear_rational
from ridgeline.codegen.triton.masks import mask_kind
from ridgeline.codegen.triton.norm_ops import compile_norm
from ridgeline.codegen.triton.problems import compile_attention
from ridgeline.cost_model import Target
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.binary_attention import BINARY_ATTENTION
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL
from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.linear_rational import LINEAR_RATIONAL
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.ir.rotary import ROTARY

_KINDS = frozenset({"cuda", "hip"})


def _place_attention(node: fx.Node, module: fx.GraphModule) -> None:
    node.target = torch.ops.ridgeline.triton_attention.default


def _stays(node: fx.Node, module: fx.GraphModule) -> None:
    """Nothing to place: the kernel is registered for the operation itself."""


def _compile_attention(node: fx.Node, target: Target) -> KernelReport:
    query, key, value = node.args[:3]
    mask, sinks = argument(node, 3), argument(node, 4)
    kind = mask_kind(None if mask is None else mask.meta["val"])
    compiled = compile_attention(
        hints(query),  # pyright: ignore[reportArgumentType]
        hints(key),  # pyright: ignore[reportArgumentType]
        dtype=node.meta["val"].dtype,
        arch=target.arch,
        causal=node.kwargs.get("diagonal") is not None,
        mask=kind,
        mask_dtype=mask.meta["val"].dtype if kind == "added" else None,
        sinks_dtype=None if sinks is None else sinks.meta["val"].dtype,
        capped=node.kwargs.get("soft_cap") is not None,
        value_dim=hints(value)[3],  # pyright: ignore[reportArgumentType]
        multiprocessors=target.cores,
    )
    return _report(ATTENTION.qualified, compiled, target)


def _place_attention_saved(node: fx.Node, module: fx.GraphModule) -> None:
    saved_attention.place(node, module, attention_training.OP)


def _compile_attention_saved(node: fx.Node, target: Target) -> KernelReport:
    """The backward, and the forward, which keeps what it reads, beside it."""
    forward, mask = _compile_attention(node, target), argument(node, 3)
    compiled = attention_training.compile_attention_backward(
        hints(argument(node, 0))[3],
        hints(argument(node, 2))[3],
        dtype=node.meta["val"].dtype,
        arch=target.arch,
        causal=node.kwargs.get("diagonal") is not None,
        mask=mask_kind(None if mask is None else mask.meta["val"]),
        mask_dtype=None if mask is None else mask.meta["val"].dtype,
        capped=node.kwargs.get("soft_cap") is not None,
    )
    backward = _report(ATTENTION.qualified, compiled, target)
    return dataclasses.replace(backward, also=(forward, *forward.also))


def _compile_linear(node: fx.Node, target: Target) -> KernelReport:
    report = _report(QUANTIZED_LINEAR.qualified, compile_linear_node(node, target), target)
    return dataclasses.replace(report, also=cuda_of_linear(node, target))


def _compile_group_rational(node: fx.Node, target: Target) -> KernelReport:
    x, numerator, denominator = (hints(argument(node, i)) for i in range(3))
    groups = max(numerator[0], denominator[0])
    compiled = compile_group_rational(
        x[-1] // groups,
        groups=groups,
        m=numerator[1] - 1,
        n=max(denominator[1], 1),
        dtype=node.meta["val"].dtype,
        arch=target.arch,
        form=node.kwargs.get("form", FORMS[0]),
        numerators=numerator[0],
        denominators=denominator[0],
        coefficient_dtype=argument(node, 1).meta["val"].dtype,
        stride_aligned=x[-1] % 16 == 0,
    )
    return _report(GROUP_RATIONAL.qualified, compiled, target)


def _place_binary_attention(node: fx.Node, module: fx.GraphModule) -> None:
    node.target = torch.ops.ridgeline.triton_binary_attention.default


def _compile_binary_attention(node: fx.Node, target: Target) -> KernelReport:
    query, value = argument(node, 0), argument(node, 2)
    compiled = compile_binary_attention(
        hints(query),  # pyright: ignore[reportArgumentType]
        hints(value),  # pyright: ignore[reportArgumentType]
        dtype=query.meta["val"].dtype,
        arch=target.arch,
        value_dtype=value.meta["val"].dtype,
        multiprocessors=target.cores,
    )
    report = _report(BINARY_ATTENTION.qualified, compiled, target)
    return dataclasses.replace(report, also=cuda_of_binary_attention(node, target))


def _place_norm(node: fx.Node, module: fx.GraphModule) -> None:
    rows, parameters, center = norm_arguments(node)
    ops = torch.ops.ridgeline
    node.target = (ops.triton_norm if len(rows) == 1 else ops.triton_add_norm).default
    node.args = (*rows, *parameters, node.kwargs["eps"], node.kwargs.get("shift", 0.0), center)
    node.kwargs = {}


def _compile_norm(node: fx.Node, target: Target) -> KernelReport:
    rows, parameters, center = norm_arguments(node)
    weight, bias = (None if p is None else p.meta["val"].dtype for p in parameters)
    compiled = compile_norm(
        hints(rows[0])[-1],
        dtype=rows[0].meta["val"].dtype,
        arch=target.arch,
        weight=weight,
        bias=bias,
        residual=len(rows) > 1,
        center=center,
    )
    return _report(node.target._schema.name, compiled, target)  # pyright: ignore


def _compile_norm_rational(node: fx.Node, target: Target) -> KernelReport:
    weight, bias = (argument(node, i) for i in (1, 2))
    numerator, denominator = (hints(argument(node, i)) for i in (3, 4))
    compiled = compile_norm(
        hints(node)[-1],
        dtype=node.meta["val"].dtype,
        arch=target.arch,
        weight=None if weight is None else weight.meta["val"].dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
        center=True,
        numerator=numerator,  # pyright: ignore[reportArgumentType]
        denominator=(denominator[0], max(denominator[1], 1)),
        form=node.kwargs.get("form", FORMS[0]),
        coefficient_dtype=argument(node, 3).meta["val"].dtype,
    )
    return _report(LAYER_NORM_RATIONAL.qualified, compiled, target)


def _compile_linear_rational(node: fx.Node, target: Target) -> KernelReport:
    x, weight, bias, numerator, denominator = (argument(node, i) for i in range(5))
    b = hints(denominator)
    compiled = compile_linear_rational(
        math.prod(hints(x)[:-1]),
        *hints(weight),
        dtype=node.meta["val"].dtype,
        arch=target.arch,
        numerator=hints(numerator),  # pyright: ignore[reportArgumentType]
        denominator=(b[0], max(b[1], 1)),
        form=node.kwargs.get("form", FORMS[0]),
        side=node.kwargs.get("side", "output"),
        bias=None if bias is None else bias.meta["val"].dtype,
        coefficient_dtype=numerator.meta["val"].dtype,
        multiprocessors=target.cores,
    )
    return _report(LINEAR_RATIONAL.qualified, compiled, target)


def _place_gated(node: fx.Node, module: fx.GraphModule) -> None:
    node.target = torch.ops.ridgeline.triton_gated_activation.default


def _compile_gated(node: fx.Node, target: Target) -> KernelReport:
    return _report(GATED_ACTIVATION.qualified, pointwise.compile_gated_node(node, target), target)


def _place_rotary(node: fx.Node, module: fx.GraphModule) -> None:
    node.target = torch.ops.ridgeline.triton_rotary.default


def _compile_rotary(node: fx.Node, target: Target) -> KernelReport:
    return _report(ROTARY.qualified, pointwise.compile_rotary_node(node, target), target)


def _report(op: str, compiled: Compiled, target: Target) -> KernelReport:
    audit = dataclasses.asdict(compiled.audit)
    audit["matrix"] = ", ".join(f"{n} {name}" for name, n in compiled.audit.matrix)
    audit["code_bytes"] = len(compiled.binary)
    file = next(
        f
        for f in (
            *("attention_decode", "attention_backward", "attention", "quantized_linear", "norm"),
            *("gated", "rotary", "group_rational", "coded_linear", "binary_attention"),
            "linear_rational",
        )
        if compiled.kernel.startswith(f)
    )
    return KernelReport(
        op,
        "triton",
        target.name,
        f"{compiled.kernel} {compiled.config}",
        functools.partial(standalone_source, file, compiled.config),
        audit,
    )


_RATIONAL = Kernel(GROUP_RATIONAL.qualified, "triton", _KINDS, _stays, _compile_group_rational)

KERNELS = (
    Kernel(
        ATTENTION.qualified,
        "triton",
        _KINDS,
        _place_attention,
        _compile_attention,
        Kernel(
            ATTENTION.qualified,
            "triton",
            _KINDS,
            _place_attention_saved,
            _compile_attention_saved,
        ),
    ),
    Kernel(QUANTIZED_LINEAR.qualified, "triton", _KINDS, place_linear_node, _compile_linear),
    Kernel(
        BINARY_ATTENTION.qualified,
        "triton",
        _KINDS,
        _place_binary_attention,
        _compile_binary_attention,
    ),
    dataclasses.replace(_RATIONAL, training=_RATIONAL),
    *(
        Kernel(op.qualified, "triton", _KINDS, _place_norm, _compile_norm)
        for op in (RMS_NORM, ADD_RMS_NORM, LAYER_NORM, ADD_LAYER_NORM)
    ),
    Kernel(LAYER_NORM_RATIONAL.qualified, "triton", _KINDS, _stays, _compile_norm_rational),
    Kernel(LINEAR_RATIONAL.qualified, "triton", _KINDS, _stays, _compile_linear_rational),
    Kernel(GATED_ACTIVATION.qualified, "triton", _KINDS, _place_gated, _compile_gated),
    Kernel(ROTARY.qualified, "triton", _KINDS, _place_rotary, _compile_rotary),
)
