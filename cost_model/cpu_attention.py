"""Arithmetic of attention kernels on a CPU, in the time of fp32 multiply-adds.

For each query head, with w = head_dim + value_dim and the figures of `_Forward` and `_Backward`:

    torch     q kv (product w + softmax) + q (row + rest (kv mod 16)) + copy kv w + head
      back    2.5 w q (kv + TORCH_BACKWARD_ROW)
    ours      pairs (product w + softmax) + row rows + copy kv w      to 16 rows of a key head; then
              (whole + CUT cut) w + softmax (whole + cut) + row rows + copy kv w blocks
      back    product w q (kept vectors + 1.5 kept keys) + softmax q kept vectors
              + (row q + copy kv) w

torch forms the products of keys that a causal mask excludes too, in fp32 unless the processor has
AMX and there are rows for it, and takes the keys of a row that fill no vector one by one. Ours
works on whole vectors of 16 rows, those of one key head side by side, and on 4 keys at once; where
64 rows meet 64 keys that all of them see, four vectors share what is read. Keys are copied for each
block of rows. Its backward forms two of the five products, and the softmax, on whole vectors of
keys, and all of them on 4 rows at once.

torch's figures, ours of few rows, and those of AMX: from 1 to 512 rows and keys, odd numbers too,
head_dim 16 and 64, 8 heads on 8 and on 2, with and without a causal mask, fp32 and bf16, on one
core of a Xeon with AMX. On Zen 4 torch's are 0.65 to 1.8 of what was measured in fp32 at 17 and
more rows, 80 % of them 0.96 to 1.26. Ours of many rows and its backward: from one core of Zen 4, 4
to 256 rows and keys, odd numbers too, head_dim 16, 32 and 64, 8 heads on 8 and on 2, with and
without a causal mask, in fp32, each the fastest of a second beside other work, by least squares of
the relative error, points far from the rest at 0.3 of their weight, backwards of 4 and 8 rows on 64
keys left out as disturbed: 80 % of the 51 forwards within 13 %, of the 60 backwards within 12 %; a
third off at 17 causal rows of 64 dimensions, measured once. There our forward takes 0.5 to 0.8 of
torch's time at every length, and a training step's attention 0.3 (4 rows) to 0.85 (65 rows of 64
dimensions).
"""

from dataclasses import dataclass
from math import ceil

import torch

from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import Attention

LANES, FEW, TILE, BLOCK = 16, 4, 64, 128
"""Numbers of a vector, keys and backward's rows that our kernels pad to, rows and keys of a whole
tile, and rows that share a copied tile."""
CUT = 1.15
"""A product of ours where the tile is no whole one."""
TORCH_BACKWARD_ROW = 64
"""What a row's backward costs torch beyond products, in keys."""


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
TILED = _Forward(product=1.0, softmax=0.5, row=500, copy=6)
FEW_ROWS = _Forward(product=1.0, softmax=20, row=2200, copy=3)
OWN_AMX = 1.4
"""Our product of bf16 pairs on a processor with AMX, which we do not use: no faster than fp32."""


@dataclass(frozen=True, slots=True)
class _Backward:
    """product: of one pair of query and key and one dimension; softmax: of one pair; row, copy: of
    one number of a query's row and its gradients, of a key and its value."""

    product: float
    softmax: float
    row: float
    copy: float


OWN_BACKWARD = _Backward(product=0.84, softmax=19, row=40, copy=48)


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
        both = pairs * padded / rows * _padded(a.kv, FEW) / a.kv + padded * LANES / (2 * group)
    else:
        whole = float(whole_rows * (a.kv // TILE * TILE))
        both = float(padded * _padded(a.kv, FEW))
    cut = max(0.0, both - whole) * max(CUT * min(unit, 1.0), unit)
    products = law.product * (whole * unit + cut) + law.copy * a.kv * ceil(rows / BLOCK)
    return (products * width + law.softmax * both + law.row * padded) / group


def _backward(a: Attention, target: Target) -> float:
    width, unit = a.head_dim + a.value_dim, _unit(a, target)
    if a.library == "torch":
        return 2.5 * a.q * (a.kv + TORCH_BACKWARD_ROW) * width * unit
    law, keys, in_vectors = OWN_BACKWARD, float(a.kv), float(_padded(a.kv, LANES))
    if a.causal:  # a row's last vector, and the last few rows, are whole ones
        kept = a.pairs / a.q
        keys, in_vectors = min(keys, kept + FEW / 2), min(in_vectors, kept + LANES / 2)
    rows = _padded(a.q, FEW)
    products = law.product * unit * width * (in_vectors + 1.5 * keys)
    copies = (law.row * a.q + law.copy * a.kv * a.kv_heads / a.heads) * width
    return rows * (products + law.softmax * in_vectors) + copies


def _unit(a: Attention, target: Target) -> float:
    """A product of this dtype over one of fp32, to which ours widens what the processor multiplies
    slower."""
    if a.dtype == torch.bfloat16 and _amx(target):
        return OWN_AMX
    unit = target.peak(torch.float32) / target.peak(a.dtype)
    return unit if a.library == "torch" else min(unit, 1.0)


def _amx(target: Target) -> bool:
    return "amx_bf16" in target.features


def _padded(count: int, multiple: int) -> int:
    return ceil(count / multiple) * multiple
