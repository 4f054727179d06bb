"""How the CPU kernels hold a weight of codec "binary": `pack` and its inverse.

Columns here are outputs. A byte holds two nibbles of one plane: nibble h of byte b of column n is
the bits of input features 32 step + 16 h + 4 b + {0, 1, 2, 3}, the first in the lowest bit. With
V = `vectors(bits)` vectors of 16 columns to a panel of 16 V, and K padded to 32:

    own groups     codes  uint8 [panels, K/32, bits, V, 64]      byte 4 n + b of vector j: column
                   scale  [panels, G, bits, V, 16]               16 j + n of the panel
                          int8 [panels, G, bits, T, V, 16]
                   offset [panels, G, V, 16]
    shared groups  codes  uint8 [R panels, bits K/32, 1, 4, 64]  plane after plane
                   scale  [R, bits, K] or int8 [R, bits, T, K]   per column of the weight
                   offset [R, K]

Groups of a multiple of 32 features count as rows' own, their scales repeated per row. Shared are
groups of 1 and 8 features: panels begin anew with each group row, and x is multiplied by α before
it meets the planes, which then are one plane of bits K features. An int8 α, sign(v) 2**(|v| - 64),
is held as |v| below the sign: shifted up by 23 that is the float 2**-63 α, and 0 is 0.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm.quantized_linear_layout import (
    FLOATING,
    LANES,
    PackedWeight,
    require,
)
from ridgeline.ir.quantized_linear import pack_codes, unpack_codes

STEP = 32
"""Input features per step: two nibbles in each byte of a 4-byte lane."""

SMALLEST_SHARED = 16
"""Rows that shared groups of 1 or 8 features must have at least: fewer waste most of a panel."""


def vectors(bits: int, shared: bool) -> int:
    """Vectors of 16 columns in a panel: sums of all planes, twice, must fit the 32 registers."""
    return 2 if bits == 4 and not shared else 4


def is_shared(group_size: int) -> bool:
    """Is x multiplied by α first? See the module's law."""
    return group_size % STEP != 0


def panels_of(n: int, bits: int, group_size: int, group_rows: int) -> tuple[int, int]:
    """(group rows that have panels of their own, panels of each)."""
    shared = is_shared(group_size)
    rows = min(group_rows, n) if shared else n
    return -(-n // rows), -(-rows // (LANES * vectors(bits, shared)))


def pack(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    group_rows: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, offset) in the layout of the module's law, from the canonical ones.

    `check` says what it takes.
    """
    n = len(packed)
    codes, scale = unpack_codes(packed, bits, k), scale.detach()
    offset = None if offset is None else offset.detach()
    shared = is_shared(group_size)
    if scale.dtype == torch.int8:
        magnitude = scale.abs().view(torch.uint8)
        scale = (magnitude | (scale < 0).to(torch.uint8) << 7).view(torch.int8)
    wide = vectors(bits, shared) * LANES
    if shared:
        stored = _planes(_by_group_row(codes, group_rows, wide), bits, wide, k)
        stored = stored.transpose(1, 2).flatten(1, 2).unsqueeze(2)
        return stored.contiguous(), *_per_column(scale, offset, group_size, k)
    stored = _planes(F.pad(codes, (0, 0, 0, -n % wide)), bits, wide, k).contiguous()
    scale, offset = (
        None
        if t is None
        else F.pad(
            t.repeat_interleave(group_rows, 0)[:n].flatten(1), (0, 0, 0, -n % wide)
        ).unflatten(1, t.shape[1:])
        for t in (scale, offset)
    )
    assert scale is not None
    return stored, _lanes_last(scale, wide), None if offset is None else _lanes_last(offset, wide)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layout of the module's law -> canonical (packed, scale, offset)."""
    n, k, bits, rows = weight.out_features, weight.in_features, weight.bits, weight.group_rows
    scale, offset, stored = weight.scale, weight.offset, weight.codes
    shared = is_shared(weight.group_size)
    if shared:
        stored = stored.squeeze(2).unflatten(1, (bits, -1)).transpose(1, 2)
        codes = _codes(stored)
        held = min(rows, n)
        padded = -(-held // (LANES * vectors(bits, True))) * LANES * vectors(bits, True)
        codes = codes.unflatten(0, (-1, padded))[:, :held].flatten(0, 1)
        first = slice(0, k, weight.group_size)
        scale = scale[..., first].movedim(-1, 1)
        offset = None if offset is None else offset[..., first]
    else:
        codes = _codes(stored)
        scale = scale.movedim((-2, -1), (1, 2)).flatten(0, 2)[:n:rows]
        if offset is not None:
            offset = offset.movedim((-2, -1), (1, 2)).flatten(0, 2)[:n:rows].contiguous()
    if scale.dtype == torch.int8:
        octets = scale.contiguous().view(torch.uint8)
        magnitude = (octets & 127).view(torch.int8)
        scale = torch.where(octets > 127, -magnitude, magnitude)
    packed = pack_codes(codes[:n, :k].contiguous(), bits)
    return packed, scale.contiguous(), None if offset is None else offset.contiguous()


def check(
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    group_rows: int,
    shape: list[int],
) -> None:
    """bits 1 to 4; group_size a multiple of 32 with any group_rows, or 1 or 8 with group_rows 16 or
    more; scale fp32, fp16 or bf16 [*shape, bits] or int8 [*shape, bits, T]; offset None or floating
    `shape`. Raises QuantizedWeightError on anything else.
    """
    own = group_size % STEP == 0
    require(own or group_size in (1, 8), "group_size 1, 8 or a multiple of 32", group_size)
    require(
        group_rows >= (1 if own else SMALLEST_SHARED),
        f"groups of {SMALLEST_SHARED} rows or more with group_size {group_size}",
        group_rows,
    )
    kinds = (
        [[*shape, bits, t] for t in (1, 2, 3)] if scale.dtype == torch.int8 else [[*shape, bits]]
    )
    require(
        scale.dtype in (*FLOATING, torch.int8) and list(scale.shape) in kinds,
        f"scale {kinds[0]} of float32, float16, bfloat16 or int8 with up to 3 terms",
        f"{scale.dtype} {list(scale.shape)}",
    )
    require(
        scale.dtype != torch.int8 or not bool((scale == -128).any()),
        "int8 powers of two from -127 on",
        -128,
    )
    require(
        offset is None or (offset.dtype in FLOATING and list(offset.shape) == shape),
        f"offset {shape} of float32, float16 or bfloat16",
        offset is not None and f"{offset.dtype} {list(offset.shape)}",
    )


def _planes(codes: Tensor, bits: int, wide: int, k: int) -> Tensor:
    """uint8 codes [panels wide, K] -> [panels, K/32, bits, V, 64]."""
    codes = F.pad(codes, (0, -k % STEP))
    # panel, vector, column, step, half, byte, feature
    view = codes.view(-1, wide // LANES, LANES, codes.shape[1] // STEP, 2, 4, 4)
    planes = [
        functools.reduce(
            torch.bitwise_or,
            (
                ((view[..., half, :, i] >> plane) & 1) << 4 * half + i
                for half in range(2)
                for i in range(4)
            ),
        )
        for plane in range(bits)
    ]  # each [panel, vector, column, step, byte]
    return torch.stack(planes).permute(1, 4, 0, 2, 3, 5).flatten(-2)


def _codes(planes: Tensor) -> Tensor:
    """The inverse of `_planes`: uint8 [panels wide, K padded]."""
    bits = planes.shape[2]
    view = planes.unflatten(-1, (LANES, 4)).permute(2, 0, 3, 4, 1, 5)
    codes = view.new_zeros((*view.shape[1:5], 2, 4, 4))
    for plane in range(bits):
        for half in range(2):
            for i in range(4):
                codes[..., half, :, i] |= ((view[plane] >> 4 * half + i) & 1) << plane
    return codes.flatten(3).flatten(0, 2)


def _by_group_row(codes: Tensor, group_rows: int, wide: int) -> Tensor:
    """[N, K] -> [R padded, K]: each group row padded to whole panels."""
    held = min(group_rows, len(codes))
    codes = F.pad(codes, (0, 0, 0, -len(codes) % held)).unflatten(0, (-1, held))
    return F.pad(codes, (0, 0, 0, -held % wide)).flatten(0, 1)


def _per_column(
    scale: Tensor, offset: Tensor | None, group_size: int, k: int
) -> tuple[Tensor, Tensor | None]:
    """[R, G, ...] -> [R, ..., K padded to 32], each group's value once per column."""

    def spread(x: Tensor) -> Tensor:
        wide = x.movedim(1, -1).repeat_interleave(group_size, -1)[..., :k]
        return F.pad(wide, (0, -k % STEP)).contiguous()

    return spread(scale), None if offset is None else spread(offset)


def _lanes_last(x: Tensor, wide: int) -> Tensor:
    """[N, G, ...] -> [panels, G, ..., V, 16]."""
    blocks = x.unflatten(0, (-1, wide // LANES, LANES))
    return blocks.movedim((1, 2), (-2, -1)).contiguous()
