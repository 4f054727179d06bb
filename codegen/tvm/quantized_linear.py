"""`ridgeline::tvm_quantized_linear`: the quantised linear layer on the host CPU.

Law: `ridgeline.ir.quantized_linear`. Weights are laid out once by `pack` for the vector lanes of
the kernels (`quantized_linear_kernel`, and `quantized_linear_many` for many rows); the layout
serves every instruction set and both multiply dtypes:

    codes  4 bit: int16 [N/64, K/8, 1, 4, 32], 8 bit: int8 [N/64, K/8, 4, 4, 32]; lane 2 n + p of
           vector j belongs to column 16 j + n and input feature parity p, and pair i of a step
           is features 8 step + 2 i + p: nibble i of a 16-bit word, or byte i minus 128.
    scale  [N/64, G, 4, 16] in the dtype it came in, offset likewise.
N is padded to 64 and K to 8; padded columns have scale 0, padded features meet x = 0.
"""

import functools
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.op import LIBRARY
from ridgeline.ir.quantized_linear import MANY_ROWS, pack_codes, unpack_codes

LANES, PANEL, STEP = 16, 64, 8

TVM_DTYPE = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)

PARALLEL_WORK = 1 << 18
"""Rows x N x K from which a second thread earns its wake-up: about 10 us of one core's work."""


class QuantizedWeightError(RidgelineError):
    """A quantised weight that the CPU kernel cannot take."""


class PackedWeight(NamedTuple):
    """A weight in the layout of the module docstring; all that `unpack` needs to give it back."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    out_features: int
    in_features: int
    bits: int
    group_size: int


def _blocks(x: Tensor, panels: int) -> Tensor:
    """[N, G] -> [N/64, G, 4, 16], padded with zeros."""
    x = F.pad(x, (0, 0, 0, panels * PANEL - x.shape[0]))
    return x.view(panels, PANEL // LANES, LANES, -1).permute(0, 3, 1, 2).contiguous()


def _unblocks(x: Tensor, out_features: int) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)[:out_features].contiguous()


def pack(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> PackedWeight:
    """Canonical storage -> the CPU layout; `unpack` is the inverse.

    packed: uint8 [N, ceil(K/2)] (4 bit) or [N, K] (8 bit); scale [N, G], G = ceil(K/group_size),
    fp32, fp16 or bf16; offset None, or [N, G] of uint8, int8, int32 (zero point) or a floating
    dtype (minimum). bits 4 or 8; group_size a multiple of 16; any N, K >= 1.
    Raises QuantizedWeightError on anything else.
    """
    _check(packed, scale, offset, bits, group_size, in_features)
    n = packed.shape[0]
    panels, steps = -(-n // PANEL), -(-in_features // STEP)
    codes = unpack_codes(packed, bits, in_features)
    codes = F.pad(codes, (0, steps * STEP - in_features, 0, panels * PANEL - n))
    # panel, vector, column, step, pair, parity -> panel, step, pair, vector, column, parity
    lanes = codes.view(panels, PANEL // LANES, LANES, steps, STEP // 2, 2).permute(0, 3, 4, 1, 2, 5)
    lanes = lanes.reshape(panels, steps, STEP // 2, PANEL // LANES, 2 * LANES)
    if bits == 8:
        stored = (lanes ^ 128).view(torch.int8).contiguous()
    else:
        nibbles = lanes.to(torch.int32)
        word = functools.reduce(
            torch.bitwise_or, (nibbles[:, :, i : i + 1] << 4 * i for i in range(STEP // 2))
        )
        stored = word.to(torch.int16).contiguous()
    return PackedWeight(
        stored,
        _blocks(scale.detach(), panels),
        None if offset is None else _blocks(offset.detach(), panels),
        n,
        in_features,
        bits,
        group_size,
    )


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The CPU layout -> canonical (packed, scale, offset)."""
    codes, n, k = weight.codes, weight.out_features, weight.in_features
    if weight.bits == 8:
        lanes = codes.view(torch.uint8) ^ 128
    else:
        word = codes.to(torch.int32)
        lanes = torch.cat([(word >> 4 * i) & 15 for i in range(STEP // 2)], dim=2).to(torch.uint8)
    panels, steps = lanes.shape[:2]
    lanes = lanes.view(panels, steps, STEP // 2, PANEL // LANES, LANES, 2)
    plain = lanes.permute(0, 3, 4, 1, 2, 5).reshape(panels * PANEL, steps * STEP)[:n, :k]
    offset = None if weight.offset is None else _unblocks(weight.offset, n)
    return pack_codes(plain.contiguous(), weight.bits), _unblocks(weight.scale, n), offset


def _check(
    packed: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group_size: int, k: int
) -> None:
    def require(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise QuantizedWeightError(f"expected {expected}, found {found}")

    require(bits in (4, 8), "bits 4 or 8", bits)
    require(group_size > 0 and group_size % LANES == 0, "group_size a multiple of 16", group_size)
    require(k > 0, "at least one input feature", k)
    columns = -(-k * bits // 8)
    require(
        packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == columns,
        f"packed codes uint8 [N, {columns}]",
        f"{packed.dtype} {list(packed.shape)}",
    )
    shape = [packed.shape[0], -(-k // group_size)]
    require(
        scale.dtype in FLOATING and list(scale.shape) == shape,
        f"scale {shape} of float32, float16 or bfloat16",
        f"{scale.dtype} {list(scale.shape)}",
    )
    require(
        offset is None or (offset.dtype in TVM_DTYPE and list(offset.shape) == shape),
        f"offset {shape} of uint8, int8, int32, float32, float16 or bfloat16",
        offset is not None and f"{offset.dtype} {list(offset.shape)}",
    )


class KernelSpec(NamedTuple):
    """What a kernel is specialised on besides the number of rows.

    dtypes by TVM's names, "none" for what is absent; `str` and `parse` are inverses, and the text
    is what the op carries: it means the same in every process, so graphs that hold it can be
    cached, and unlike a handle it cannot go stale.
    """

    out_features: int
    in_features: int
    group_size: int
    bits: int
    scale: str
    offset: str
    bias: str
    activation: str
    multiply: str
    isa: str

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())

    @classmethod
    def parse(cls, text: str) -> "KernelSpec":
        """Raises QuantizedWeightError where `text` is not what `str` writes."""
        found = dict(word.partition("=")[::2] for word in text.split())
        numbers = cls._fields[:4]
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
    """The kernel for `weight` and x of dtype `activation`; isa defaults to `host_isa()`.

    Raises QuantizedWeightError if there is none for these dtypes.
    """
    exact_in_fp32 = multiply == activation == torch.float16
    if activation not in FLOATING or not (
        multiply in (torch.float32, torch.bfloat16) or exact_in_fp32
    ):
        raise QuantizedWeightError(
            "expected x of float32, float16 or bfloat16, multiplied in float32 or bfloat16 (or"
            f" float16 for a float16 x), found x {activation}, multiply {multiply}"
        )
    return KernelSpec(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bits,
        TVM_DTYPE[weight.scale.dtype],
        "none" if weight.offset is None else TVM_DTYPE[weight.offset.dtype],
        "none" if bias is None else TVM_DTYPE[bias],
        TVM_DTYPE[activation],
        "float32" if exact_in_fp32 else TVM_DTYPE[multiply],
        isa or host_isa(),
    )


def decodes_first(spec: KernelSpec, rows: int) -> bool:
    """Is the weight decoded as a whole before it is multiplied (`quantized_linear_many`)?"""
    pairs = spec.multiply == "bfloat16" and spec.isa == "avx512_bf16"
    return pairs and rows >= MANY_ROWS


def _prim_func(spec: KernelSpec, lead: bool, parallel: bool, many: bool) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import quantized_linear_kernel, quantized_linear_many
    from ridgeline.codegen.tvm.quantized_linear_parts import Spec

    build = quantized_linear_many.build if many else quantized_linear_kernel.build
    return build(Spec(**spec._asdict(), lead=lead, parallel=parallel))


def source(spec: KernelSpec, *, rows: int = 1, parallel: bool = True) -> str:
    """The TVMScript text of the kernel for so many rows, to read or to take away."""
    return _prim_func(spec, False, parallel, decodes_first(spec, rows)).script()


class _Kernel:
    """The compiled forms of one `KernelSpec`, each compiled when it is first needed."""

    __slots__ = ("forms", "lock", "many_from", "offset", "out_features", "parallel_from", "spec")

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.out_features = spec.out_features
        self.offset = spec.offset != "none"
        self.parallel_from = math.ceil(PARALLEL_WORK / (spec.out_features * spec.in_features))
        """Rows from which panels are shared among threads."""
        self.many_from = MANY_ROWS if decodes_first(spec, MANY_ROWS) else math.inf
        self.forms: dict[tuple[bool, bool, bool], Callable[..., None]] = {}

    def form(self, lead: bool, parallel: bool, many: bool) -> Callable[..., None]:
        """(x, codes, scale, offset, bias, y) -> None; lead: x and y are [1, rows, .]."""
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
    _write(x, codes, scale, offset, bias, kernel, y)
    return y


def quantized_linear_out(
    x: Tensor, codes: Tensor, scale: Tensor, *present: Tensor, kernel: str, out: Tensor
) -> None:
    """`quantized_linear` into `out`, for compiled graphs: no dispatcher, no allocation.

    x, out: contiguous; present: of offset and bias, those that `kernel` names.
    """
    offset = present[0] if _kernel(kernel).offset else None
    bias = present[-1] if len(present) > (offset is not None) else None
    _write(x, codes, scale, offset, bias, kernel, out)


def _write(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
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
        run(x, codes, scale, offset, bias, y)
    except (TypeError, ValueError) as mismatch:
        raise QuantizedWeightError(
            f"expected tensors for the kernel {kernel!r}, found others: {mismatch}"
        ) from mismatch


LIBRARY.define(
    "tvm_quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor? bias,"
    " str kernel) -> Tensor"
)
LIBRARY.impl("tvm_quantized_linear", quantized_linear, "CPU")
OP = torch.ops.ridgeline.tvm_quantized_linear.default
OP.out = quantized_linear_out
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_quantized_linear")
def _fake(x, codes, scale, offset, bias, kernel):
    return x.new_empty((*x.shape[:-1], KernelSpec.parse(kernel).out_features))


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly (`quantized_linear_out`), 3 us less than through OP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(x, codes, scale, offset, bias, kernel):
        x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
        present = [ir.ExternKernel.realize_input(t) for t in (offset, bias) if t is not None]
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
