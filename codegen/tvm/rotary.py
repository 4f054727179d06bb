"""`ridgeline::tvm_rotary`: rotary position embedding on the host CPU.

Law: `ridgeline.ir.rotary`. One kernel per D, R, form, dtypes and instruction set; batch, heads,
lengths and strides are values that it reads at run time. Queries and keys are turned in one call
and come out in one tensor [B,S,H+Hk,D], in the order of a packed projection, of which both are
views: one allocation, and a form in which Inductor calls the kernel directly.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm, last_contiguous
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
    """The compiled kernel: (q, k, cos, sin, out); isa defaults to `host_isa()`."""
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


_allocate = torch._C._dynamo.guards._empty_strided_cpu
"""What Inductor's own code allocates with: a third of the time of `torch.empty`."""


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """The law of `ridgeline.ir.rotary.reference`, for fp32, bf16 and fp16 on the CPU.

    q [B,H,S,D], k [B,Hk,S,D], cos, sin [1|B,S,R]: any strides, but copied where the last dimension
    is not contiguous. Returns [B,S,H+Hk,D]: q's heads, then k's. Raises UnsupportedProblem.
    """
    batch, heads, length, dim = q.shape
    heads += k.shape[1]
    step = heads * dim
    out = _allocate((batch, length, heads, dim), (length * step, step, dim, 1), q.dtype)
    rotary_out(q, k, cos, sin, interleaved=interleaved, out=out)
    return out


def rotary_out(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, out: Tensor
) -> None:
    """`rotary` into the contiguous `out`, for compiled graphs: no dispatcher, no allocation."""
    # the number of threads also gives this thread's OpenMP teams torch's setting
    parallel = torch.get_num_threads() > 1 and out.numel() >= PARALLEL_ELEMENTS
    run = kernel(out.shape[3], cos.shape[2], interleaved, q.dtype, cos.dtype, parallel)
    try:
        run(q, k, cos, sin, out)
    except (ValueError, TypeError, RuntimeError):
        again = _regular(q, k, cos, sin, out)
        if again is None:
            return
        try:
            kernel(out.shape[3], cos.shape[2], interleaved, q.dtype, again[2].dtype, parallel)(
                *again, out
            )
        except (ValueError, TypeError, RuntimeError) as mismatch:
            raise _problem(q, k, cos, sin) from mismatch


def _regular(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The arguments as the kernel reads them; None where there is nothing to compute."""
    if not out.numel():
        return None
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    q, k, cos, sin = map(last_contiguous, (q, k, cos, sin))
    return q, k, cos, sin


def _problem(*tensors: Tensor) -> UnsupportedProblem:
    found = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in tensors)
    return UnsupportedProblem(
        "expected q [B,H,S,D] and k [B,Hk,S,D] of one dtype and cos, sin [1|B,S,R] on the CPU,"
        f" found {found}"
    )


LIBRARY.define(
    "tvm_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, bool interleaved) -> Tensor"
)
LIBRARY.impl("tvm_rotary", rotary, "CPU")
OP = torch.ops.ridgeline.tvm_rotary.default
OP.out = rotary_out
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_rotary")
def _fake(q, k, cos, sin, *, interleaved):
    batch, heads, length, dim = q.shape
    return q.new_empty((batch, length, heads + k.shape[1], dim))


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly, without the dispatcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(q, k, cos, sin, *, interleaved):
        batch, heads, length, dim = q.get_size()
        size = [batch, length, heads + k.get_size()[1], dim]
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(q.get_device(), q.get_dtype(), size),
            inputs=[ir.ExternKernel.realize_input(x) for x in (q, k, cos, sin)],
            kwargs={"interleaved": interleaved},
            python_kernel_name="torch.ops.ridgeline.tvm_rotary.default.out",
            op_overload=OP,
        )
        return ir.TensorBox.create(call)
