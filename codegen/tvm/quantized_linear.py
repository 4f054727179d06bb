"""`ridgeline::tvm_quantized_linear`: the quantised linear layer on the host CPU.

Law: `ridgeline.ir.quantized_linear`. Weights are laid out once by `quantized_linear_layout.pack`
for the vector lanes of the kernels; a layout serves every instruction set and multiply dtype.

    codec              kernels
    uniform, shift     quantized_linear_kernel; quantized_linear_many for many rows in bf16
    binary             binary_linear_kernel (tables of sums of four inputs, fp32 or, for fixed
                       point, bytes); quantized_linear_many for many rows in bf16
"""

import functools
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ridgeline.codegen.tvm.isa import byte_table_isa
from ridgeline.codegen.tvm.quantized_linear_layout import (
    FLOATING,
    TVM_DTYPE,
    PackedWeight,
    QuantizedWeightError,
    described,
    pack,
    unpack,
)
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.op import LIBRARY
from ridgeline.ir.quantized_linear import MANY_ROWS

__all__ = [
    "OP",
    "KernelSpec",
    "PackedWeight",
    "QuantizedWeightError",
    "described",
    "pack",
    "unpack",
]

PARALLEL_WORK = 1 << 18
"""Rows x N x K from which a second thread earns its wake-up: about 10 us of one core's work."""


class KernelSpec(NamedTuple):
    """What a kernel is specialised on besides the number of rows.

    dtypes by TVM's names, "none" for what is absent; `str` and `parse` are inverses, and the text
    is what the op carries: it means the same in every process, so graphs that hold it can be
    cached, and unlike a handle it cannot go stale.
    """

    codec: str
    out_features: int
    in_features: int
    group_size: int
    group_rows: int
    bits: int
    terms: int
    scale: str
    offset: str
    bias: str
    row_scale: str
    permutation: str
    activation: str
    multiply: str
    isa: str

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())

    @classmethod
    def parse(cls, text: str) -> "KernelSpec":
        """Raises QuantizedWeightError where `text` is not what `str` writes."""
        found = dict(word.partition("=")[::2] for word in text.split())
        numbers = cls._fields[1:7]
        if tuple(found) != cls._fields or not all(found[name].isdecimal() for name in numbers):
            raise QuantizedWeightError(
                f"expected a kernel as `kernel_spec` writes it ({'=, '.join(cls._fields)}=),"
                f" found {text!r}"
            )
        return cls(*(int(v) if name in numbers else v for name, v in found.items()))  # type: ignore[arg-type]


def kernel_spec(
    weight: PackedWeight,
    *,
    activation: torch.dtype,
    multiply: torch.dtype,
    bias: torch.dtype | None = None,
    isa: str | None = None,
) -> KernelSpec:
    """The kernel for `weight` and x of dtype `activation`; isa defaults to `host_isa()`, or what
    of it beyond `ISAS` byte tables need.

    Raises QuantizedWeightError if there is none for these dtypes.
    """
    exact_in_fp32 = multiply == activation == torch.float16
    allowed = (torch.float32, torch.bfloat16, torch.int16)
    if activation not in FLOATING or not (multiply in allowed or exact_in_fp32):
        raise QuantizedWeightError(
            "expected x of float32, float16 or bfloat16, multiplied in float32, bfloat16 or fixed"
            " point (int16) (or float16 for a float16 x), found x"
            f" {activation}, multiply {multiply}"
        )
    if isa is None and weight.codec == "binary" and multiply == torch.int16:
        isa = byte_table_isa()

    def name(tensor: Tensor | None) -> str:
        return "none" if tensor is None else TVM_DTYPE[tensor.dtype]

    return KernelSpec(
        weight.codec,
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.group_rows,
        weight.bits,
        weight.terms,
        name(weight.scale),
        name(weight.offset),
        "none" if bias is None else TVM_DTYPE[bias],
        name(weight.row_scale),
        name(weight.permutation),
        TVM_DTYPE[activation],
        "float32" if exact_in_fp32 else TVM_DTYPE[multiply],
        isa or host_isa(),
    )


def decodes_first(spec: KernelSpec, rows: int) -> bool:
    """Is the weight decoded as a whole before it is multiplied (`quantized_linear_many`)?"""
    pairs = spec.multiply == "bfloat16" and spec.isa == "avx512_bf16"
    own = spec.codec != "binary" or spec.group_size % 32 == 0
    return pairs and own and rows >= MANY_ROWS


def _prim_func(spec: KernelSpec, lead: bool, parallel: bool, many: bool) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import (
        binary_linear_kernel,
        quantized_linear_kernel,
        quantized_linear_many,
    )
    from ridgeline.codegen.tvm.quantized_linear_parts import Spec

    few = binary_linear_kernel if spec.codec == "binary" else quantized_linear_kernel
    build = quantized_linear_many.build if many else few.build
    return build(Spec(**spec._asdict(), lead=lead, parallel=parallel))


def source(spec: KernelSpec, *, rows: int = 1, parallel: bool = True) -> str:
    """The TVMScript text of the kernel for so many rows, to read or to take away."""
    return _prim_func(spec, False, parallel, decodes_first(spec, rows)).script()


class _Kernel:
    """The compiled forms of one `KernelSpec`, each compiled when it is first needed."""

    __slots__ = ("forms", "lock", "many_from", "operands", "out_features", "parallel_from", "spec")

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.out_features = spec.out_features
        held = [p != "none" for p in (spec.offset, spec.bias, spec.row_scale, spec.permutation)]
        self.operands = tuple(sum(held[:i]) if held[i] else -1 for i in range(len(held)))
        """Where among the tensors that are present each optional one stands; -1: it is absent."""
        self.parallel_from = math.ceil(PARALLEL_WORK / (spec.out_features * spec.in_features))
        """Rows from which panels are shared among threads."""
        self.many_from = MANY_ROWS if decodes_first(spec, MANY_ROWS) else math.inf
        self.forms: dict[tuple[bool, bool, bool], Callable[..., None]] = {}

    def form(self, lead: bool, parallel: bool, many: bool) -> Callable[..., None]:
        """(x, codes, scale, offset, bias, row_scale, permutation, y) -> None; lead: x and y are
        [1, rows, .]."""
        key = lead, parallel, many
        with self.lock:
            if key not in self.forms:
                self.forms[key] = compile_kernel(_prim_func(self.spec, *key), self.spec.isa)
        return self.forms[key]


@functools.cache
def _kernel(text: str) -> _Kernel:
    return _Kernel(KernelSpec.parse(text))


_allocate = torch._C._dynamo.guards._empty_strided_cpu
"""What Inductor's own code allocates with: 0.6 us, where `torch.empty` takes 1.9 us."""


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    permutation: Tensor | None,
    kernel: str,
) -> Tensor:
    """y [..., N] in x's dtype from x [..., K] and the tensors of a `PackedWeight`.

    kernel: `str(kernel_spec(weight, ...))`. Raises QuantizedWeightError if the tensors are not of
    the shapes and dtypes it names.
    """
    shape, n = x.shape, _kernel(kernel).out_features
    if len(shape) == 2:
        y = _allocate((shape[0], n), (n, 1), x.dtype)
    elif len(shape) == 3:
        y = _allocate((shape[0], shape[1], n), (shape[1] * n, n, 1), x.dtype)
    else:
        y = x.new_empty((*shape[:-1], n))
    x = x if x.is_contiguous() else x.contiguous()
    _write(x, codes, scale, (offset, bias, row_scale, permutation), kernel, y)
    return y


def quantized_linear_out(
    x: Tensor, codes: Tensor, scale: Tensor, *present: Tensor, kernel: str, out: Tensor
) -> None:
    """`quantized_linear` into `out`, for compiled graphs: no dispatcher, no allocation.

    x, out: contiguous; present: of offset, bias, row_scale and permutation those that `kernel`
    names.
    """
    a, b, c, d = _kernel(kernel).operands
    held = (*present, None)
    _write(x, codes, scale, (held[a], held[b], held[c], held[d]), kernel, out)


def _write(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    optional: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    kernel: str,
    y: Tensor,
) -> None:
    entry, shape = _kernel(kernel), x.shape
    rows = shape[-2] if len(shape) > 1 else 1
    lead = len(shape) == 3 and shape[0] == 1  # batch 1, every decode step: no view is needed
    if not (lead or len(shape) == 2):
        x, y = x.reshape(-1, shape[-1]), y.view(-1, entry.out_features)
        rows = x.shape[0]
    form = lead, rows >= entry.parallel_from, rows >= entry.many_from
    run = entry.forms.get(form) or entry.form(*form)
    torch.get_num_threads()  # a thread's first call gives its OpenMP region torch's setting
    try:
        run(x, codes, scale, *optional, y)
    except (TypeError, ValueError) as mismatch:
        raise QuantizedWeightError(
            f"expected tensors for the kernel {kernel!r}, found others: {mismatch}"
        ) from mismatch


LIBRARY.define(
    "tvm_quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor? bias,"
    " Tensor? row_scale, Tensor? permutation, str kernel) -> Tensor"
)
LIBRARY.impl("tvm_quantized_linear", quantized_linear, "CPU")
OP = torch.ops.ridgeline.tvm_quantized_linear.default
OP.out = quantized_linear_out
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_quantized_linear")
def _fake(x, codes, scale, offset, bias, row_scale, permutation, kernel):
    return x.new_empty((*x.shape[:-1], KernelSpec.parse(kernel).out_features))


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly (`quantized_linear_out`), 3 us less than through OP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(x, codes, scale, offset, bias, row_scale, permutation, kernel):
        x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
        optional = offset, bias, row_scale, permutation
        present = [ir.ExternKernel.realize_input(t) for t in optional if t is not None]
        n = KernelSpec.parse(kernel).out_features
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(x.get_device(), x.get_dtype(), [*x.get_size()[:-1], n]),
            inputs=[
                x,
                ir.ExternKernel.realize_input(codes),
                ir.ExternKernel.realize_input(scale),
                *present,
            ],
            kwargs={"kernel": kernel},
            python_kernel_name="torch.ops.ridgeline.tvm_quantized_linear.default.out",
            op_overload=OP,
        )
        return ir.TensorBox.create(call)
