"""How the Triton kernels hold binary-coded and shift weights, and which arithmetic suits them.

Storage (`pack`, a bijection with the codes): int32 [tiles, bits, N, J/4], a tile being T columns of
J = T/8 bytes per row n and bit (`packing_tile`). Codec "binary": row i of a tile is plane i, bit s
of its byte j standing for column s*J + j and set where the code's bit is 0, like the sign of a
float. Codec "shift": byte j of row u < 4 holds the low four bits of the codes of columns u*J + j
and, in its high nibble, (u+4)*J + j; rows 4 and up hold the bits 4 and up, bit s of byte j for
column s*J + j; 8-bit codes are bytes, row s those of columns s*J to s*J + J - 1. Columns after the
last one are codes of 0 and meet x = 0. Each byte thus meets contiguous parts of x under shifts
known when the kernel is compiled, and a block of rows is one contiguous piece of memory.
This file needs only torch.
"""

import math

import torch
from torch import Tensor

EXACT, ROUNDED, HALVED = 0, 1, 2
FEW_TOKENS = 64
"""Rows up to which no weight is rounded; above, the op's law allows it."""


def packing_tile(in_features: int) -> int:
    """T: 256 columns where filling up the last tile wastes little, else 128."""
    short = -in_features % 256 < 128  # as many columns of 256 as of 128
    return 256 if short or in_features >= 2048 else 128


def shared_run(group_size: int, in_features: int) -> int:
    """Parts of J = T/8 columns of a tile that certainly share their group; 0 where J do not."""
    tile = packing_tile(in_features)
    if group_size >= in_features:
        return 8
    return math.gcd(group_size, tile) // (tile // 8)


def product_dtype(multiply: torch.dtype, *, codec: str, bits: int, terms: int) -> torch.dtype:
    """`multiply`, but fp32 where fp16 cannot hold the numbers: shifts beyond 14."""
    wide = codec == "shift" and bits // terms > 5
    return torch.float32 if wide and multiply == torch.float16 else multiply


def product_form(codec: str, compute: torch.dtype, *, tokens: int, run: int) -> int:
    """Which of the ways of `coded_linear` computes the layer; compute: the `product_dtype`."""
    if codec == "shift":
        return EXACT
    if compute == torch.float32 or tokens > FEW_TOKENS:
        return ROUNDED  # in fp32, to what it is
    return EXACT if run else HALVED


def lift_of(scale: Tensor, offset: Tensor | None) -> float:
    """The power of two that brings the largest ŵ of codec "binary" to [1/2, 1); 1 where all are 0.

    scale, offset: canonical, scale floating [R,G,q] or int8 [R,G,q,T].
    """
    if not scale.is_floating_point():
        wide = scale.to(torch.int32)
        scale = torch.ldexp(wide.sign().float(), wide.abs() - 64).sum(-1)
    largest = scale.float().abs().sum(-1)
    if offset is not None:
        largest = largest + offset.float().abs()
    top = float(largest.max()) if largest.numel() else 0.0
    return 2.0 ** -math.frexp(top)[1] if 0.0 < top < math.inf else 1.0


def arranged(scale: Tensor, *, narrow: bool) -> Tensor:
    """Canonical α, scale or offset [R,G,...], its memory in the order in which a block reads it:
    rows last, or where groups are narrow (`shared_run` is 0) groups last."""
    inner = 1 if narrow else 0
    return scale.movedim(inner, -1).contiguous().movedim(-1, inner)


def _plane(bits: Tensor) -> Tensor:
    """uint8 bits [...,8,J] -> bytes [...,J], bit s of a byte from part s."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device).unsqueeze(-1)
    return (bits << places).sum(-2, dtype=torch.uint8)


def _spread(octets: Tensor) -> Tensor:
    """The inverse of `_plane`."""
    places = torch.arange(8, dtype=torch.uint8, device=octets.device).unsqueeze(-1)
    return (octets.unsqueeze(-2) >> places) & 1


def pack(codes: Tensor, *, codec: str, bits: int) -> Tensor:
    """uint8 codes [N,K], below 2**bits -> GPU storage, int32 (see the top)."""
    tile = packing_tile(codes.shape[1])
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % tile))
    parts = padded.unflatten(1, (-1, 8, tile // 8))
    if codec == "binary":
        rows = [_plane((parts >> i) & 1 ^ 1) for i in range(bits)]
    elif bits == 8:
        rows = list(parts.unbind(2))
    else:
        rows = [(parts[:, :, u] & 15) | (parts[:, :, u + 4] << 4) for u in range(4)]
        rows += [_plane((parts >> i) & 1) for i in range(4, bits)]
    return torch.stack(rows).permute(2, 0, 1, 3).contiguous().view(torch.int32)


def unpack(words: Tensor, *, codec: str, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack`: uint8 codes [N,K]."""
    rows = words.view(torch.uint8).permute(1, 2, 0, 3)  # [bits, N, tiles, J]
    if codec == "binary":
        parts = sum((_spread(rows[i]) ^ 1) << i for i in range(bits))
    elif bits == 8:
        parts = rows.permute(1, 2, 0, 3)
    else:
        nibbles = torch.cat((rows[:4] & 15, rows[:4] >> 4)).permute(1, 2, 0, 3)
        parts = nibbles + sum(_spread(rows[i]) << i for i in range(4, bits))
    return parts.flatten(1)[:, :in_features].contiguous()
