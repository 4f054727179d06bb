"""The sources of the kernels that a rewritten graph calls for, to read or to take away."""

import torch
from torch import fx

from ridgeline.codegen.kernel import argument, constant, hints
from ridgeline.cost_model import Target
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR


def kernel_sources(module: fx.GraphModule, target: Target) -> dict[str, str]:
    """File name -> source, one entry per distinct kernel; empty where no rewrite fired.

    GPUs: Triton files that stand alone, with the emitter's default launch configuration.
    CPU: TVMScript for this machine's instruction set. Raises UnsupportedProblem.
    """
    sources: dict[str, str] = {}
    one = _tvm if target.kind == "cpu" else _triton
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in (
            ATTENTION.qualified,
            QUANTIZED_LINEAR.qualified,
        ):
            stem, source = one(node, node.target._schema.name == ATTENTION.qualified, target)
            if source not in sources.values():
                same = sum(name.startswith(f"{stem}_") for name in sources)
                sources[f"{stem}_{same}.py"] = source
    return sources


def _triton(node: fx.Node, attention: bool, target: Target) -> tuple[str, str]:
    from ridgeline.codegen.triton.emit import standalone_source
    from ridgeline.codegen.triton.kernels import KERNELS

    op = ATTENTION.qualified if attention else QUANTIZED_LINEAR.qualified
    report = next(k for k in KERNELS if k.op == op).compile(node, target)
    name = report.configuration.partition(" ")[0]  # decoding has its own attention kernel
    return f"triton_{name}", standalone_source(name)


def _tvm(node: fx.Node, attention: bool, target: Target) -> tuple[str, str]:
    if attention:
        from ridgeline.codegen.tvm.attention import source

        query, _, value = (hints(n) for n in node.args[:3])  # pyright: ignore[reportArgumentType]
        mask = argument(node, 3)
        text = source(
            query[3],
            value[3],
            dtype=node.meta["val"].dtype,
            mask=None if mask is None else mask.meta["val"].dtype,
        )
        return "tvm_attention", text
    from ridgeline.codegen.tvm import quantized_linear as cpu

    x, packed, scale, offset, bias = (argument(node, i) for i in range(5))
    dtype = x.meta["val"].dtype
    weight = cpu.pack(
        constant(packed),
        constant(scale),
        None if offset is None else constant(offset),
        bits=node.kwargs["bits"],  # pyright: ignore[reportArgumentType]
        group_size=node.kwargs["group_size"],  # pyright: ignore[reportArgumentType]
        in_features=x.meta["val"].shape[-1],
    )
    spec = cpu.kernel_spec(
        weight,
        activation=dtype,
        multiply=node.kwargs["multiply"] or dtype,  # pyright: ignore[reportArgumentType]
        bias=None if bias is None else bias.meta["val"].dtype,
    )
    return "tvm_quantized_linear", cpu.source(spec)
