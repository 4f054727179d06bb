"""`ridgeline::tvm_rotary`: rotary position embedding on the host CPU.

Law: `ridgeline.ir.rotary`. One kernel per D, R, form, dtypes and instruction set; batch, heads,
lengths and strides are values that it reads at run time. Queries and keys are turned in one call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.op import LIBRARY

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARALLEL_ELEMENTS = 1 << 16
"""Elements of q from which a second thread earns its wake-up."""


def _prim_func(
    dim: int,
    size: int,
    interleaved: bool,
    dtype: torch.dtype,
    angle: torch.dtype,
    isa: str,
    parallel: bool,
) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm.rotary_kernel import Spec, build

    if dtype not in DTYPES or angle not in DTYPES or size > dim or size % 2 or size <= 0:
        raise UnsupportedProblem(
            f"expected q, k, cos and sin of dtypes in {list(DTYPES)} and an even R <= D, found"
            f" {dtype}, {angle}, R = {size} and D = {dim}; keep ridgeline::rotary for it"
        )
    return build(Spec(dim, size, interleaved, DTYPES[dtype], DTYPES[angle], isa, parallel))


@functools.cache
def kernel(
    dim: int,
    size: int,
    interleaved: bool,
    dtype: torch.dtype,
    angle: torch.dtype,
    parallel: bool,
    isa: str | None = None,
) -> Callable[..., None]:
    """The compiled kernel: (q, k, cos, sin, q_out, k_out); isa defaults to `host_isa()`."""
    isa = isa or host_isa()
    return compile_kernel(_prim_func(dim, size, interleaved, dtype, angle, isa, parallel), isa)


def source(
    dim: int,
    size: int,
    *,
    interleaved: bool,
    dtype: torch.dtype,
    angle: torch.dtype | None = None,
    isa: str | None = None,
    parallel: bool = True,
) -> str:
    """The TVMScript text of a kernel, to read or to take away. Raises UnsupportedProblem."""
    isa = isa or host_isa()
    return _prim_func(dim, size, interleaved, dtype, angle or dtype, isa, parallel).script()


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The law of `ridgeline.ir.rotary.reference`, for fp32, bf16 and fp16 on the CPU.

    q [B,H,S,D], k [B,Hk,S,D], cos, sin [1|B,S,R]: any strides, but copied where the last dimension
    is not contiguous. Returns tensors like q and k. Raises UnsupportedProblem.
    """
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    made = q_out, k_out
    if q_out.stride(-1) != 1:
        q_out = q_out.contiguous()
    if k_out.stride(-1) != 1:
        k_out = k_out.contiguous()
    q, k, cos, sin = (_contiguous_rows(x) for x in (q, k, cos, sin))
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    # also gives this thread's OpenMP teams torch's setting, which its first call must do
    parallel = torch.get_num_threads() > 1 and q.numel() >= PARALLEL_ELEMENTS
    try:
        run = kernel(q.shape[-1], cos.shape[-1], interleaved, q.dtype, cos.dtype, parallel)
        if q.numel():
            run(q, k, cos, sin, q_out, k_out)
    except (ValueError, TypeError, RuntimeError) as mismatch:
        raise _problem(q, k, cos, sin) from mismatch
    for out, room in zip((q_out, k_out), made, strict=True):
        if out is not room:
            room.copy_(out)
    return made


def _problem(*tensors: Tensor) -> UnsupportedProblem:
    found = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in tensors)
    return UnsupportedProblem(
        "expected q [B,H,S,D] and k [B,Hk,S,D] of one dtype and cos, sin [1|B,S,R] on the CPU,"
        f" found {found}"
    )


LIBRARY.define(
    "tvm_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, bool interleaved)"
    " -> (Tensor, Tensor)"
)
LIBRARY.impl("tvm_rotary", rotary, "CPU")


@torch.library.register_fake("ridgeline::tvm_rotary")
def _fake(q, k, cos, sin, *, interleaved):
    return torch.empty_like(q), torch.empty_like(k)
