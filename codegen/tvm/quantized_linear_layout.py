"""How the CPU kernels of `ridgeline::quantized_linear` hold a weight: `pack` and its inverse.

    codes  4 bit: int16 [N/64, K/8, t, 1, 4, 32], 8 bit: int8 [N/64, K/8, 1, 4, 4, 32]; lane 2 n + p
           of vector j belongs to column 16 j + n and input feature parity p, and pair i of a step
           is features 8 step + 2 i + p: nibble i of a 16-bit word, or byte i.
    scale  [N/64, G, 4, 16] in the dtype it came in, offset likewise.
N is padded to 64 and K to 8; padded columns have scale 0, padded features meet x = 0.

"uniform" has t = 1; a byte holds the code minus 128. "shift" of t terms holds each field of a code
apart: of up to 4 bits as 4 (3 bits of shift, 7 for zero, below the sign), of more as a byte
(127 - shift, 0 for zero, below the sign), which is a float's sign and exponent. "binary" has a
layout of its own: `binary_linear_layout`.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.quantized_linear import pack_codes, unpack_codes

LANES, PANEL, STEP = 16, 64, 8

TVM_DTYPE = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
}
BITS = {"uniform": (4, 8), "binary": (1, 2, 3, 4), "shift": (4, 5, 6, 8)}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeightError(RidgelineError):
    """A quantised weight that the CPU kernel cannot take."""


class PackedWeight(NamedTuple):
    """A weight in the layout of its codec; all that `unpack` needs to give it back.

    terms: of "shift" the fields of a code, of "binary" the powers of two of an α, 0 for floating
    ones; row_scale: [N], permutation: int32 [K], both as the law has them.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    out_features: int
    in_features: int
    bits: int
    group_size: int
    codec: str = "uniform"
    terms: int = 1
    group_rows: int = 1
    row_scale: Tensor | None = None
    permutation: Tensor | None = None


def pack(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    codec: str = "uniform",
    terms: int = 1,
    group_rows: int = 1,
    row_scale: Tensor | None = None,
    permutation: Tensor | None = None,
) -> PackedWeight:
    """Canonical storage -> the CPU layout; `unpack` is the inverse.

    packed, scale, offset, row_scale, permutation: as `ridgeline.ir.quantized_linear` has them,
    scale and a floating offset in fp32, fp16 or bf16, an integer offset in uint8, int8 or int32.
    "uniform" of 4 or 8 bits, "shift" of fields of 2 to 8 bits: group_size a multiple of 16 and
    group_rows 1. "binary": see `binary_linear_layout.pack`. Any N, K >= 1.
    Raises QuantizedWeightError on anything else.
    """
    check(
        packed,
        scale,
        offset,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        codec=codec,
        terms=terms,
        group_rows=group_rows,
        row_scale=row_scale,
        permutation=permutation,
    )
    if codec == "binary":
        from ridgeline.codegen.tvm import binary_linear_layout

        parts = binary_linear_layout.pack(
            packed, scale, offset, bits, group_size, in_features, group_rows
        )
    else:
        parts = _pack(packed, scale, offset, bits, in_features, codec, terms)
    return PackedWeight(
        *parts,
        len(packed),
        in_features,
        bits,
        group_size,
        codec,
        _held_terms(codec, terms, scale),
        group_rows,
        None if row_scale is None else row_scale.detach().contiguous(),
        None if permutation is None else permutation.to(torch.int32).contiguous(),
    )


def check(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    codec: str = "uniform",
    terms: int = 1,
    group_rows: int = 1,
    row_scale: Tensor | None = None,
    permutation: Tensor | None = None,
) -> None:
    """Raises QuantizedWeightError on what `pack` cannot take."""
    require(group_size > 0 and group_rows > 0, "groups of at least one weight", group_size)
    n, shape = len(packed), [-(-len(packed) // group_rows), -(-in_features // group_size)]
    require(codec in BITS, "codec 'uniform', 'binary' or 'shift'", repr(codec))
    allowed = f"{', '.join(map(str, BITS[codec][:-1]))} or {BITS[codec][-1]}"
    require(bits in BITS[codec], f"bits {allowed}", bits)
    require(in_features > 0, "at least one input feature", in_features)
    columns = -(-in_features * bits // 8)
    require(
        packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == columns,
        f"packed codes uint8 [N, {columns}]",
        f"{packed.dtype} {list(packed.shape)}",
    )
    require(
        row_scale is None or (row_scale.dtype in FLOATING and list(row_scale.shape) == [n]),
        f"row_scale [{n}] of float32, float16 or bfloat16",
        row_scale is not None and f"{row_scale.dtype} {list(row_scale.shape)}",
    )
    require(
        permutation is None or list(permutation.shape) == [in_features],
        f"permutation [{in_features}]",
        permutation is not None and list(permutation.shape),
    )
    if codec == "binary":
        from ridgeline.codegen.tvm import binary_linear_layout

        binary_linear_layout.check(scale, offset, bits, group_size, group_rows, shape)
    else:
        require(group_rows == 1, f"group_rows 1 with codec {codec!r}", group_rows)
        _check(scale, offset, bits, group_size, shape, codec, terms)


def described(
    packed: Tensor, scale: Tensor, offset: Tensor | None, **settings: Any
) -> PackedWeight:
    """What `pack` would give but for the layout: sizes and dtypes to choose a kernel by.

    Raises QuantizedWeightError where `pack` would.
    """
    check(packed, scale, offset, **settings)
    terms = settings.pop("terms", 1)
    codec, permutation = settings.get("codec", "uniform"), settings.pop("permutation", None)
    return PackedWeight(
        packed,
        scale,
        offset,
        len(packed),
        terms=_held_terms(codec, terms, scale),
        permutation=None if permutation is None else permutation.to(torch.int32),
        **settings,
    )


def _held_terms(codec: str, terms: int, scale: Tensor) -> int:
    """`PackedWeight.terms`."""
    if codec != "binary":
        return terms
    return scale.shape[-1] if scale.dtype == torch.int8 else 0


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The CPU layout -> canonical (packed, scale, offset)."""
    if weight.codec == "binary":
        from ridgeline.codegen.tvm import binary_linear_layout

        return binary_linear_layout.unpack(weight)
    n, k, codes = weight.out_features, weight.in_features, weight.codes
    if codes.dtype == torch.int8:
        lanes = codes.view(torch.uint8) ^ (128 if weight.codec == "uniform" else 0)
    else:
        word = codes.to(torch.int32)
        lanes = torch.cat([(word >> 4 * i) & 15 for i in range(STEP // 2)], dim=3).to(torch.uint8)
    panels, steps, terms = lanes.shape[:3]
    lanes = lanes.view(panels, steps, terms, STEP // 2, PANEL // LANES, LANES, 2)
    fields = lanes.permute(2, 0, 4, 5, 1, 3, 6).reshape(terms, panels * PANEL, steps * STEP)
    plain = fields[0] if weight.codec == "uniform" else _narrow(fields, weight.bits)
    offset = None if weight.offset is None else _unblocks(weight.offset, n)
    codes = plain[:n, :k].contiguous()
    return pack_codes(codes, weight.bits), _unblocks(weight.scale, n), offset


def require(holds: bool, expected: str, found: object) -> None:
    """Raises QuantizedWeightError unless `holds`."""
    if not holds:
        raise QuantizedWeightError(f"expected {expected}, found {found}")


def wide_codes(codec: str, bits: int, terms: int) -> bool:
    """Does a code (or a field of one) take a byte, rather than a nibble?"""
    return bits // terms > 4


def _pack(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    k: int,
    codec: str,
    terms: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    n = packed.shape[0]
    panels, steps = -(-n // PANEL), -(-k // STEP)
    codes = F.pad(unpack_codes(packed, bits, k), (0, steps * STEP - k, 0, panels * PANEL - n))
    fields = codes[None] if codec == "uniform" else _widen(codes, bits, terms)
    # term, panel, vector, column, step, pair, parity -> panel, step, term, pair, vector, (..)
    lanes = fields.view(terms, panels, PANEL // LANES, LANES, steps, STEP // 2, 2)
    lanes = lanes.permute(1, 4, 0, 5, 2, 3, 6)
    lanes = lanes.reshape(panels, steps, terms, STEP // 2, PANEL // LANES, 2 * LANES)
    if wide_codes(codec, bits, terms):
        stored = (lanes ^ (128 if codec == "uniform" else 0)).view(torch.int8).contiguous()
    else:
        nibbles = lanes.to(torch.int32)
        word = functools.reduce(
            torch.bitwise_or, (nibbles[:, :, :, i : i + 1] << 4 * i for i in range(STEP // 2))
        )
        stored = word.to(torch.int16).contiguous()
    base = None if offset is None else _blocks(offset.detach(), panels)
    return stored, _blocks(scale.detach(), panels), base


def _check(
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    shape: list[int],
    codec: str,
    terms: int,
) -> None:
    if codec == "uniform":
        require(terms == 1, "terms 1 with codec 'uniform'", terms)
    else:
        fits = terms in (1, 2) and bits % terms == 0
        require(fits, "1 or 2 terms of equal width", f"{terms} in {bits} bits")
        require(offset is None, "no offset with codec 'shift'", "one")
    require(group_size % LANES == 0, "group_size a multiple of 16", group_size)
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


def _widen(codes: Tensor, bits: int, terms: int) -> Tensor:
    """uint8 shift codes -> [terms, *codes.shape], each field in the form of the module's law."""
    width = bits // terms
    zero, fields = 2 ** (width - 1) - 1, []
    for term in range(terms):
        field = codes >> term * width
        shift, sign = field & zero, (field >> (width - 1)) & 1
        if width > 4:
            fields.append(torch.where(shift == zero, 0, 127 - shift) | sign << 7)
        else:
            fields.append(torch.where(shift == zero, 7, shift) | sign << 3)
    return torch.stack(fields)


def _narrow(fields: Tensor, bits: int) -> Tensor:
    """The inverse of `_widen`."""
    terms = len(fields)
    width = bits // terms
    zero, codes = 2 ** (width - 1) - 1, torch.zeros_like(fields[0])
    for term, field in enumerate(fields):
        if width > 4:
            value, sign = field & 127, field >> 7
            shift = torch.where(value == 0, zero, 127 - value)
        else:
            value, sign = field & 7, field >> 3
            shift = torch.where(value == 7, zero, value)
        codes |= (shift | sign << (width - 1)) << term * width
    return codes


def _blocks(x: Tensor, panels: int) -> Tensor:
    """[N, G] -> [N/64, G, 4, 16], padded with zeros."""
    x = F.pad(x, (0, 0, 0, panels * PANEL - x.shape[0]))
    return x.view(panels, PANEL // LANES, LANES, -1).permute(0, 3, 1, 2).contiguous()


def _unblocks(x: Tensor, out_features: int) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)[:out_features].contiguous()
