"""`ridgeline::tvm_quantized_linear`: the quantised linear layer on the host CPU.

Law: `ridgeline.ir.quantized_linear`. Weights are laid out once by `pack` for the vector lanes of
the kernel (`quantized_linear_kernel`); the layout serves every instruction set and both multiply
dtypes:

    codes  4 bit: int16 [N/64, K/8, 1, 4, 32], 8 bit: int8 [N/64, K/8, 4, 4, 32]; lane 2 n + p of
           vector j belongs to column 16 j + n and input feature parity p, and pair i of a step
           is features 8 step + 2 i + p: nibble i of a 16-bit word, or byte i minus 128.
    scale  [N/64, G, 4, 16] in the dtype it came in, offset likewise.
N is padded to 64 and K to 8; padded columns have scale 0, padded features meet x = 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.op import LIBRARY
from ridgeline.ir.quantized_linear import pack_codes, unpack_codes

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


def _prim_func(
    n: int,
    k: int,
    group_size: int,
    bits: int,
    scale: torch.dtype,
    offset: torch.dtype | None,
    bias: torch.dtype | None,
    activation: torch.dtype,
    multiply: torch.dtype,
    isa: str,
    parallel: bool,
) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import quantized_linear_kernel

    exact_in_fp32 = multiply == activation == torch.float16
    if activation not in FLOATING or not (
        multiply in (torch.float32, torch.bfloat16) or exact_in_fp32
    ):
        raise QuantizedWeightError(
            "expected x of float32, float16 or bfloat16, multiplied in float32 or bfloat16 (or"
            f" float16 for a float16 x), found x {activation}, multiply {multiply}"
        )
    scheme = "symmetric"
    if offset is not None:
        scheme = "minimum" if offset.is_floating_point else "zero_point"
    return quantized_linear_kernel.build(
        quantized_linear_kernel.Spec(
            out_features=n,
            in_features=k,
            group_size=group_size,
            bits=bits,
            scheme=scheme,
            scale=TVM_DTYPE[scale],
            offset=TVM_DTYPE[offset or torch.float32],
            bias=None if bias is None else TVM_DTYPE[bias],
            activation=TVM_DTYPE[activation],
            multiply="float32" if exact_in_fp32 else TVM_DTYPE[multiply],
            isa=isa,
            parallel=parallel,
        )
    )


@functools.cache
def kernel(*spec: Any) -> Callable[..., None]:
    """The compiled kernel for `_prim_func`'s arguments: (x, codes, scale, offset, bias, y)."""
    return compile_kernel(_prim_func(*spec), spec[-2])


def source(
    weight: PackedWeight,
    *,
    activation: torch.dtype,
    multiply: torch.dtype,
    bias: torch.dtype | None = None,
    isa: str | None = None,
    parallel: bool = True,
) -> str:
    """The TVMScript text of the kernel that serves `weight`, to read or to take away."""
    offset = None if weight.offset is None else weight.offset.dtype
    return _prim_func(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bits,
        weight.scale.dtype,
        offset,
        bias,
        activation,
        multiply,
        isa or host_isa(),
        parallel,
    ).script()


_ABSENT = torch.zeros(1)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    multiply: torch.dtype,
) -> Tensor:
    """y [..., n] in x's dtype from x [..., K] and the tensors of a `PackedWeight`."""
    k = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    torch.get_num_threads()  # a thread's first call gives its OpenMP region torch's setting
    y = rows.new_empty((rows.shape[0], n))
    kernel(
        n,
        k,
        group_size,
        bits,
        scale.dtype,
        offset if offset is None else offset.dtype,
        bias if bias is None else bias.dtype,
        x.dtype,
        multiply,
        host_isa(),
        rows.shape[0] * n * k >= PARALLEL_WORK,
    )(
        rows,
        codes,
        scale,
        _ABSENT if offset is None else offset,
        _ABSENT if bias is None else bias,
        y,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


LIBRARY.define(
    "tvm_quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor? bias,"
    " int n, int bits, int group_size, ScalarType multiply) -> Tensor"
)
LIBRARY.impl("tvm_quantized_linear", quantized_linear, "CPU")


@torch.library.register_fake("ridgeline::tvm_quantized_linear")
def _fake(x, codes, scale, offset, bias, n, bits, group_size, multiply):
    return x.new_empty((*x.shape[:-1], n))
