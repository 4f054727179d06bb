"""Arithmetic of attention kernels on a CPU, in the time of fp32 multiply-adds.

For each query head, with w = head_dim + value_dim and the figures of `_Forward`:

    torch     q kv (product w + softmax) + q (row + rest (kv mod 16)) + copy kv w + head
    ours      pairs (product w + softmax) + row rows + copy kv w      to 16 rows of a key head; then
              (whole + CUT cut) w + softmax (whole + cut) + row rows + copy kv w blocks
    backward  2.5 w q (kept keys + BACKWARD_ROW)                 where there is one

torch forms the products of keys that a causal mask excludes too, in fp32 unless the processor has
AMX and there are rows for it, and takes the keys of a row that fill no vector one by one. Ours
works on whole vectors of 16 rows, those of one key head side by side, and on 8 keys at once; where
64 rows meet 64 keys that all of them see, four vectors share what is read. Keys are copied for each
block of rows. Both backwards form products alike, ours of whole tiles of keys.

From 1 to 512 rows and keys, odd numbers too, head_dim 16 and 64, 8 heads on 8 and on 2, with and
without a causal mask, fp32 and bf16, on one core of a Xeon with AMX. Of 64 dimensions in fp32 our
forward takes 1.7 times torch's time at 17 rows, 1.3 at 32, 0.85 at 64, 0.8 at 128, causal ones of
512 0.45; in bf16, where torch's products go to AMX, 2.2 at 64. Forward and backward take 2.4 times
torch's at 17 rows, as much at 128, causal ones of 512 0.55. Better on Zen 4 and 5.
"""

from dataclasses import dataclass
from math import ceil

import torch

from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import Attention

LANES, KEYS, TILE, BLOCK = 16, 8, 64, 128
"""Rows and keys that our kernels pad to, of a whole tile, and rows that share a copied tile."""
CUT = 1.4
"""A product of ours where the tile is no whole one."""
BACKWARD_ROW = {"torch": 64, "ridgeline": 110}
"""What a row's backward costs beyond products, in keys."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """product: of one pair of query and key and one dimension; softmax: of one pair; row, head: of
    each; rest: of one key that fills no vector; copy: of one number of a key or its
    value, read or copied."""

    product: float
    softmax: float
    row: float
    rest: float = 0.0
    copy: float = 0.0
    head: float = 0.0


TORCH = _Forward(product=1.25, softmax=24, row=2800, rest=590, copy=5, head=12_600)
TORCH_AMX = _Forward(product=0.05, softmax=44, row=3700, rest=750, copy=11, head=77_000)
TILED = _Forward(product=1.0, softmax=6, row=1200, copy=26)
FEW_ROWS = _Forward(product=1.0, softmax=20, row=2200, copy=3)
OWN_AMX = 1.4
"""Our product of bf16 pairs on a processor with AMX, which we do not use: no faster than fp32."""


def multiply_adds(a: Attention, target: Target) -> float:
    """Of one query head; 0 where there is nothing to attend to."""
    if not a.q * a.kv * a.pairs:
        return 0.0
    forward = _torch(a, target) if a.library == "torch" else _own(a, target)
    return forward + (_backward(a, target) if a.backward else 0.0)


def _torch(a: Attention, target: Target) -> float:
    amx = a.q > 1 and a.dtype == torch.bfloat16 and _amx(target)
    law = TORCH_AMX if amx else TORCH
    width = a.head_dim + a.value_dim
    pairs = a.q * a.kv * (law.product * width + law.softmax)
    rows = a.q * (law.row + law.rest * (a.kv % LANES))
    return pairs + rows + law.copy * a.kv * width + law.head


def _own(a: Attention, target: Target) -> float:
    group, width, unit = a.heads // a.kv_heads, a.head_dim + a.value_dim, _unit(a, target)
    rows, pairs = a.q * group, a.pairs * group
    if rows <= LANES and not a.backward:
        law = FEW_ROWS
        products = pairs * (law.product * unit * width + law.softmax)
        return (products + law.row * rows + law.copy * a.kv * width) / group
    law, whole_rows, padded = TILED, rows // TILE * TILE, _padded(rows, LANES)
    if a.causal:  # the tiles that the edge crosses are cut; 16 rows end where the last of them does
        whole = max(0.0, whole_rows * (pairs / rows - TILE / 2))
        both = pairs * padded / rows * _padded(a.kv, KEYS) / a.kv + padded * LANES / (2 * group)
    else:
        whole = float(whole_rows * (a.kv // TILE * TILE))
        both = float(padded * _padded(a.kv, KEYS))
    cut = max(0.0, both - whole) * max(CUT * min(unit, 1.0), unit)
    products = law.product * (whole * unit + cut) + law.copy * a.kv * ceil(rows / BLOCK)
    return (products * width + law.softmax * both + law.row * padded) / group


def _backward(a: Attention, target: Target) -> float:
    kept, keys = 1.0, float(a.kv)
    if a.library == "ridgeline":
        kept = a.pairs / (a.q * a.kv)
        if a.causal:  # the tiles that its edge crosses are whole ones
            kept = min(1.0, kept + TILE / 2 / a.kv)
        keys = float(_padded(a.kv, TILE))
    rows = 2.5 * a.q * (kept * keys + BACKWARD_ROW[a.library])
    return rows * (a.head_dim + a.value_dim) * _unit(a, target)


def _unit(a: Attention, target: Target) -> float:
    """Our product of this dtype over one of fp32."""
    if a.dtype == torch.bfloat16 and _amx(target):
        return OWN_AMX
    return target.peak(torch.float32) / target.peak(a.dtype)


def _amx(target: Target) -> bool:
    return "amx_bf16" in target.features


def _padded(count: int, multiple: int) -> int:
    return ceil(count / multiple) * multiple
