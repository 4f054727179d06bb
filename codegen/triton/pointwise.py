"""The elementwise kernels, compiled for an architecture and as operations.

`ridgeline::triton_gated_activation`, `triton_rotary`: laws and schemas are those of the operations
without the prefix, forward only, for CUDA and ROCm tensors. Importing this module registers both
and needs no triton.
"""

import torch
from torch import Tensor, fx

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.kernel import argument, hints
from ridgeline.codegen.triton import require_triton
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile
from ridgeline.cost_model import Target
from ridgeline.ir.op import LIBRARY

_FLOATS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
GATED_CONFIG = Config((("BLOCK", 2048),), num_warps=4, num_stages=1)


def rotary_config(dim: int) -> Config:
    """Heads of one program: up to 16, and at most 2048 features."""
    rows = max(1, min(16, 2048 // max(16, 1 << (dim - 1).bit_length())))
    return Config((("BLOCK_H", rows),), num_warps=4, num_stages=1)


def _pointer(dtype: torch.dtype) -> str:
    if dtype not in _FLOATS:
        raise UnsupportedProblem(
            f"the Triton kernels take {', '.join(map(str, _FLOATS))}, found {dtype};"
            " keep ridgeline's reference operation for it"
        )
    return _FLOATS[dtype]


def compile_gated(activation: str, columns: int, *, dtype: torch.dtype, arch: str) -> Compiled:
    """The gated activation of rows of `columns` elements; no GPU is needed.

    Raises UnsupportedProblem, UnknownArchitecture, KernelRejected, BackendMissing.
    """
    pointer = _pointer(dtype)
    require_triton()
    from ridgeline.codegen.triton.gated import ACTIVATIONS, gated_activation_rows

    if activation not in ACTIVATIONS:
        raise UnsupportedProblem(f"expected one of {ACTIVATIONS}, found {activation!r}")
    pointers = ("gate_ptr", "up_ptr", "out_ptr")
    sizes = ("columns", "gate_stride", "up_stride")
    return cross_compile(
        gated_activation_rows,
        {**dict.fromkeys(pointers, pointer), **dict.fromkeys(sizes, "i32")},
        {"ACTIVATION": activation},
        GATED_CONFIG,
        arch,
        aligned={*pointers, *(sizes if columns % 16 == 0 else ())},
        matrix=False,
    )


def compile_rotary(
    dim: int,
    size: int,
    *,
    interleaved: bool,
    dtype: torch.dtype,
    angle: torch.dtype,
    arch: str,
) -> Compiled:
    """Rotary embedding of `size` of `dim` features; no GPU is needed. Raises as `compile_gated`."""
    x, c = _pointer(dtype), _pointer(angle)
    require_triton()
    from ridgeline.codegen.triton.rotary import rotary_heads

    outs = ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")
    angles = ("cos_ptr", "sin_ptr")
    strides = [f"stride_{t}{d}" for t, ds in (("q", "bhs"), ("k", "bhs")) for d in ds]
    angle_strides = [f"stride_{t}{d}" for t in "cs" for d in "bs"]
    plain = ("heads", "key_heads", "length")
    return cross_compile(
        rotary_heads,
        {
            **dict.fromkeys(outs, x),
            **dict.fromkeys(angles, c),
            **dict.fromkeys((*plain, *strides, *angle_strides), "i32"),
        },
        {
            "INTERLEAVED": interleaved,
            "D": dim,
            "R": size,
            "BLOCK_D": 1 << (dim - 1).bit_length(),
        },
        rotary_config(dim),
        arch,
        aligned={
            *outs,
            *angles,
            *(strides if dim % 16 == 0 else ()),
            *(angle_strides if size % 16 == 0 else ()),
        },
        matrix=False,
    )


def compile_gated_node(node: fx.Node, target: Target) -> Compiled:
    """The kernel of a `ridgeline::gated_activation` node."""
    columns = (hints(node) or (1,))[-1]
    activation, dtype = str(node.kwargs["activation"]), node.meta["val"].dtype
    return compile_gated(activation, columns, dtype=dtype, arch=target.arch)


def compile_rotary_node(node: fx.Node, target: Target) -> Compiled:
    """The kernel of a `ridgeline::rotary` node."""
    q, cos = argument(node, 0), argument(node, 2)
    return compile_rotary(
        hints(q)[3],
        hints(cos)[2],
        interleaved=bool(node.kwargs["interleaved"]),
        dtype=q.meta["val"].dtype,
        angle=cos.meta["val"].dtype,
        arch=target.arch,
    )


def _launch_gated(gate, up, *, activation):
    from ridgeline.codegen.triton.gated import gated_activation

    with torch.cuda.device(gate.device):
        return gated_activation(gate, up, activation=activation, **GATED_CONFIG.launch())


def _launch_rotary(q, k, cos, sin, *, interleaved):
    from ridgeline.codegen.triton.rotary import rotary

    config = rotary_config(q.shape[-1])
    with torch.cuda.device(q.device):
        return rotary(q, k, cos, sin, interleaved=interleaved, **config.launch())


def _elsewhere(first: Tensor, *_arguments, **_options):
    raise UnsupportedProblem(
        f"the ridgeline::triton_* operations run on CUDA or ROCm tensors, found {first.device};"
        " use ridgeline::gated_activation or ridgeline::rotary there"
    )


def _fake_gated(gate, up, *, activation):
    return gate.new_empty(gate.shape)


def _fake_rotary(q, k, cos, sin, *, interleaved):
    return tuple(
        q.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
        for x in (q, k)
    )


LIBRARY.define("triton_gated_activation(Tensor gate, Tensor up, *, str activation) -> Tensor")
LIBRARY.define(
    "triton_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, bool interleaved)"
    " -> (Tensor, Tensor)"
)
for _name, _launch, _fake in (
    ("triton_gated_activation", _launch_gated, _fake_gated),
    ("triton_rotary", _launch_rotary, _fake_rotary),
):
    LIBRARY.impl(_name, _elsewhere, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _launch, "CUDA")
    torch.library.register_fake(f"ridgeline::{_name}", _fake)
