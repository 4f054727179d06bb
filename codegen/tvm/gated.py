"""`ridgeline::tvm_gated_activation`: the gated activation on the host CPU.

Law: `ridgeline.ir.gated`. One kernel per activation, dtype and instruction set; shapes and strides
are values that it reads at run time. Halves of a packed tensor are read where they lie.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import (
    compile_kernel,
    host_isa,
    import_tvm,
    last_contiguous,
)
from ridgeline.ir.gated import ACTIVATIONS
from ridgeline.ir.op import LIBRARY

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARALLEL_ELEMENTS = 1 << 15
"""Elements from which a second thread earns its wake-up."""


def _prim_func(activation: str, dtype: torch.dtype, isa: str, parallel: bool) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm.gated_kernel import Spec, build

    if activation not in ACTIVATIONS or dtype not in DTYPES:
        raise UnsupportedProblem(
            f"expected an activation of {list(ACTIVATIONS)} and a dtype of {list(DTYPES)}, found"
            f" {activation!r} and {dtype}; keep ridgeline::gated_activation for it"
        )
    return build(Spec(activation, DTYPES[dtype], isa, parallel))


@functools.cache
def kernel(
    activation: str, dtype: torch.dtype, parallel: bool, isa: str | None = None
) -> Callable[..., None]:
    """The compiled kernel: (gate, up, y), each [outer, rows, n]; isa defaults to `host_isa()`."""
    isa = isa or host_isa()
    return compile_kernel(_prim_func(activation, dtype, isa, parallel), isa)


def source(
    activation: str, dtype: torch.dtype, *, isa: str | None = None, parallel: bool = True
) -> str:
    """The TVMScript text of a kernel, to read or to take away. Raises UnsupportedProblem."""
    return _prim_func(activation, dtype, isa or host_isa(), parallel).script()


_allocate = torch._C._dynamo.guards._empty_strided_cpu
"""What Inductor's own code allocates with: a third of the time of `torch.empty`."""


def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """The law of `ridgeline.ir.gated.reference`, for fp32, bf16 and fp16 on the CPU.

    gate, up: one shape and dtype, any strides (copied where the last dimension is not contiguous).
    Returns a contiguous tensor. Raises UnsupportedProblem.
    """
    shape = gate.shape
    if len(shape) == 3:
        y = _allocate(tuple(shape), (shape[1] * shape[2], shape[2], 1), gate.dtype)
    else:
        y = gate.new_empty(shape)
    gated_activation_out(gate, up, activation=activation, out=y)
    return y


def gated_activation_out(gate: Tensor, up: Tensor, *, activation: str, out: Tensor) -> None:
    """`gated_activation` into the contiguous `out`: no dispatcher, no allocation."""
    # the number of threads also gives this thread's OpenMP teams torch's setting
    parallel = torch.get_num_threads() > 1 and out.numel() >= PARALLEL_ELEMENTS
    run = kernel(activation, gate.dtype, parallel)
    if gate.dim() != 3:  # to be told by the kernel costs some 80 µs
        gate, up, out = _regular(gate, up, out)
    try:
        run(gate, up, out)
    except (ValueError, TypeError, RuntimeError):
        if not out.numel():
            return
        try:
            run(*_regular(gate, up, out))
        except (ValueError, TypeError, RuntimeError) as mismatch:
            raise UnsupportedProblem(
                "expected gate and up of one shape and dtype on the CPU, found"
                f" {gate.dtype} {list(gate.shape)} on {gate.device} and"
                f" {up.dtype} {list(up.shape)} on {up.device}"
            ) from mismatch


def _regular(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three dimensions out of any number, the last one contiguous."""
    n = gate.shape[-1] if gate.dim() else 1
    gate, up = (x if x.dim() == 3 else x.reshape(1, -1, n) for x in (gate, up))
    return last_contiguous(gate), last_contiguous(up), out.view(gate.shape)


LIBRARY.define("tvm_gated_activation(Tensor gate, Tensor up, *, str activation) -> Tensor")
LIBRARY.impl("tvm_gated_activation", gated_activation, "CPU")
OP = torch.ops.ridgeline.tvm_gated_activation.default
OP.out = gated_activation_out
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_gated_activation")
def _fake(gate, up, *, activation):
    return gate.new_empty(gate.shape)


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly, without the dispatcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering
        from torch._inductor.utils import sympy_product

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(gate, up, *, activation):
        shape = gate.get_size()
        rows = [1, sympy_product(shape[:-1]), shape[-1]]  # to be told by the kernel costs 80 µs
        inputs = [ir.ExternKernel.realize_input(lowering.view(x, rows)) for x in (gate, up)]
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(gate.get_device(), gate.get_dtype(), rows),
            inputs=inputs,
            kwargs={"activation": activation},
            python_kernel_name="torch.ops.ridgeline.tvm_gated_activation.default.out",
            op_overload=OP,
        )
        return lowering.view(ir.TensorBox.create(call), shape)
