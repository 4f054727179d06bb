"""What a GPU plan lists beside Triton's kernels: the CUDA source that TVM generates for a node.

Shift layers and binary attention, for NVIDIA GPUs, where TVM is installed. The source is made when
it is asked for (`ridgeline dump --stage kernels`); the plan does not run it.
"""

import functools
import importlib.util
from collections.abc import Callable

from torch import fx

from ridgeline.codegen.kernel import KernelReport, argument, hints
from ridgeline.codegen.tvm.cuda import binary_attention_source, shift_linear_source
from ridgeline.cost_model import Target

_NOTE = "CUDA source, listed and not run"


def cuda_of_linear(node: fx.Node, target: Target) -> tuple[KernelReport, ...]:
    """Of a `quantized_linear` node with codec "shift"; nothing for the others."""
    if node.kwargs.get("codec") != "shift":
        return ()
    (n, _), k = hints(argument(node, 1)), hints(argument(node, 0))[-1]
    settings = {name: node.kwargs[name] for name in ("bits", "group_size")}
    settings |= {name: node.kwargs.get(name, 1) for name in ("terms", "group_rows")}
    source = functools.partial(shift_linear_source, n, k, arch=target.arch, **settings)
    said = f"{settings['bits']}-bit shifts of integers, g{settings['group_size']}, {n}x{k}"
    return _reports(node, target, said, source)


def cuda_of_binary_attention(node: fx.Node, target: Target) -> tuple[KernelReport, ...]:
    """Of a `binary_attention` node."""
    (_, heads, _, d), (*_, e) = hints(argument(node, 0)), hints(argument(node, 2))
    source = functools.partial(binary_attention_source, heads, d, e, arch=target.arch)
    return _reports(node, target, f"masked additions, {heads} heads of {d}/{e}", source)


def _reports(
    node: fx.Node, target: Target, said: str, source: Callable[[], str]
) -> tuple[KernelReport, ...]:
    if target.kind != "cuda" or importlib.util.find_spec("tvm") is None:
        return ()
    op = node.target._schema.name  # pyright: ignore[reportFunctionMemberAccess]
    return (KernelReport(op, "tvm-cuda", target.name, f"{said} ({_NOTE})", source),)
