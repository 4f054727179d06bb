"""The TVM kernels of the host CPU, as nodes of a graph."""

import torch
from torch import fx

from ridgeline.codegen.kernel import Kernel, KernelReport, argument, attribute, constant, hints
from ridgeline.codegen.tvm import attention as attention  # registers its op
from ridgeline.codegen.tvm import quantized_linear
from ridgeline.codegen.tvm.isa import host_isa
from ridgeline.cost_model import Target
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR


def _place_attention(node: fx.Node, module: fx.GraphModule) -> None:
    node.target = torch.ops.ridgeline.tvm_attention.default


def _report_attention(node: fx.Node, target: Target) -> KernelReport:
    query, key, value = (hints(n) for n in node.args[:3])  # pyright: ignore[reportArgumentType]
    dtype = _name(node.meta["val"].dtype)
    masked = argument(node, 3) is not None
    causal = node.kwargs.get("diagonal") is not None
    return KernelReport(
        ATTENTION.qualified,
        "tvm",
        target.name,
        f"{host_isa()}, {dtype}, D {query[3]}/{value[3]}, {query[1]} heads on {key[1]}"
        f"{', causal' if causal else ''}{', masked' if masked else ''}",
    )


def _place_linear(node: fx.Node, module: fx.GraphModule) -> None:
    """Repack the canonical codes for this CPU, once per weight, and call the kernel's op."""
    x, packed, scale, offset, bias = (argument(node, i) for i in range(5))
    bits, group = node.kwargs["bits"], node.kwargs["group_size"]
    out_features, in_features = packed.meta["val"].shape[0], x.meta["val"].shape[-1]
    names = {p: f"{packed.target}_tvm_{p}" for p in ("codes", "scale", "offset")}
    if not hasattr(module, names["codes"]):
        packed_here = quantized_linear.pack(
            constant(packed),
            constant(scale),
            None if offset is None else constant(offset),
            bits=bits,
            group_size=group,
            in_features=in_features,
        )
        for part, name in names.items():
            module.register_buffer(name, getattr(packed_here, part), persistent=False)
    tensors = [getattr(module, name) for name in names.values()]
    spec = quantized_linear.kernel_spec(
        quantized_linear.PackedWeight(*tensors, out_features, in_features, bits, group),
        activation=x.meta["val"].dtype,
        multiply=node.kwargs["multiply"] or x.meta["val"].dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
    )
    with node.graph.inserting_before(node):
        parts = [
            None if tensor is None else attribute(module, name, packed)
            for name, tensor in zip(names.values(), tensors, strict=True)
        ]
    quantized_linear.register_lowering()
    node.target = quantized_linear.OP
    node.args = (x, *parts, bias, str(spec))
    node.kwargs = {}


def _report_linear(node: fx.Node, target: Target) -> KernelReport:
    x, packed, _, offset = node.args[:4]
    offset_dtype = None if offset is None else offset.meta["val"].dtype  # pyright: ignore
    scheme = "symmetric"
    if offset_dtype is not None:
        scheme = "minimum" if offset_dtype.is_floating_point else "zero_point"
    multiply = node.kwargs["multiply"] or x.meta["val"].dtype  # pyright: ignore
    return KernelReport(
        QUANTIZED_LINEAR.qualified,
        "tvm",
        target.name,
        f"{host_isa()}, {node.kwargs['bits']}-bit {scheme} g{node.kwargs['group_size']},"
        f" {hints(packed)[0]}x{hints(x)[-1]}, {_name(multiply)} products",  # pyright: ignore
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


KERNELS = (
    Kernel(ATTENTION.qualified, "tvm", frozenset({"cpu"}), _place_attention, _report_attention),
    Kernel(QUANTIZED_LINEAR.qualified, "tvm", frozenset({"cpu"}), _place_linear, _report_linear),
)
