"""`ridgeline::tvm_binary_attention`: attention over binary codes on the host CPU.

Law: `ridgeline.ir.binary_attention`. One kernel per head dimensions, dtypes and instruction set;
batch, heads, lengths and strides are values that it reads at run time. The result lies in memory as
[B,M,H,E], because what follows is nearly always ``transpose(1, 2).reshape(B, M, H * E)``.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm, last_contiguous
from ridgeline.ir.binary_attention import check
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import LIBRARY

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARALLEL_WORK = 1 << 17
"""B H (M + N) D E from which a second thread earns its wake-up."""


def _prim_func(
    head_dim: int,
    value_dim: int,
    code: torch.dtype,
    value: torch.dtype,
    isa: str,
    parallel: bool,
) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm.binary_attention_kernel import Spec, build

    if code not in DTYPES or value not in DTYPES:
        raise UnsupportedProblem(
            f"expected dtypes of {list(DTYPES)}, found {code} and {value}; keep"
            " ridgeline::binary_attention for it"
        )
    return build(Spec(head_dim, value_dim, DTYPES[code], DTYPES[value], isa, parallel))


@functools.cache
def kernel(*specification: Any) -> Callable[..., None]:
    """The compiled kernel for `_prim_func`'s arguments; its module says what it takes."""
    return compile_kernel(_prim_func(*specification), specification[-2])


def source(
    head_dim: int,
    value_dim: int,
    *,
    code: torch.dtype,
    value: torch.dtype,
    isa: str | None = None,
    parallel: bool = True,
) -> str:
    """The TVMScript text of a kernel, to read or to take away.

    head_dim, value_dim: D and E. code, value: the dtypes of query and key, and of value.
    Raises UnsupportedProblem for dtypes that no kernel is built for.
    """
    return _prim_func(head_dim, value_dim, code, value, isa or host_isa(), parallel).script()


def binary_attention(
    query: Tensor, key: Tensor, value: Tensor, query_threshold: Tensor, key_threshold: Tensor
) -> Tensor:
    """The law of `ridgeline.ir.binary_attention.reference`, for fp32, bf16 and fp16 on the CPU.

    query [B,H,M,D], key [B,H,N,D], value [B,H,N,E]: any strides, but one of them is copied where
    its last dimension is not contiguous. Returns [B,H,M,E], in memory [B,M,H,E].
    Raises BinaryAttentionError, and UnsupportedProblem for other dtypes.
    """
    check(query, key, value, query_threshold, key_threshold)
    out = heads_side_by_side(value, (*query.shape[:3], value.shape[3]))
    binary_attention_out(query, key, value, query_threshold, key_threshold, out=out)
    return out


def binary_attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_threshold: Tensor,
    key_threshold: Tensor,
    *,
    out: Tensor,
) -> None:
    """`binary_attention` into `out`, for compiled graphs: no dispatcher, no allocation.

    out [B,H,M,E]: last dimension contiguous.
    """
    if not out.numel():
        return
    if key.dtype != query.dtype:
        wide = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(wide), key.to(wide)
    query, key, value = map(last_contiguous, (query, key, value))
    limits = (t.float().contiguous() for t in (query_threshold, key_threshold))
    depth, width = query.shape[3], value.shape[3]
    work = query.shape[0] * query.shape[1] * (query.shape[2] + key.shape[2]) * depth * width
    # also gives this thread's OpenMP teams torch's setting, which its first call must do
    parallel = torch.get_num_threads() > 1 and work >= PARALLEL_WORK
    run = kernel(depth, width, query.dtype, value.dtype, host_isa(), parallel)
    run(query, key, value, *limits, out)


LIBRARY.define(
    "tvm_binary_attention(Tensor query, Tensor key, Tensor value, Tensor query_threshold,"
    " Tensor key_threshold) -> Tensor"
)
LIBRARY.impl("tvm_binary_attention", binary_attention, "CPU")
OP = torch.ops.ridgeline.tvm_binary_attention.default
OP.out = binary_attention_out
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_binary_attention")
def _fake(query, key, value, query_threshold, key_threshold):
    return heads_side_by_side(value, (*query.shape[:3], value.shape[3]))


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly, without the dispatcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(query, key, value, query_threshold, key_threshold):
        batch, heads, rows, _ = query.get_size()
        width = value.get_size()[3]
        inputs = (query, key, value, query_threshold, key_threshold)
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(
                value.get_device(),
                value.get_dtype(),
                [batch, heads, rows, width],
                [rows * heads * width, width, heads * width, 1],
            ),
            inputs=[ir.ExternKernel.realize_input(x) for x in inputs],
            python_kernel_name="torch.ops.ridgeline.tvm_binary_attention.default.out",
            op_overload=OP,
        )
        return ir.TensorBox.create(call)
