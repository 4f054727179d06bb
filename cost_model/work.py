"""Work: what a piece of a program costs any machine, as a tuple of kernels.

    gemm       y[b,m,n] = sum_k a[b,m,k] w[b,k,n]      2 b m n k FLOPs
    attention  2 (d + dv) FLOPs per (head, query, key) pair that is kept
    norm       RMSNorm or LayerNorm of rows, with the residual sum before it
    stream     reads and writes tensors once, a few FLOPs per element
    collective bytes per rank over the link

A weight of `weight_bits` < 16 with groups of `group_size` holds bits/8 bytes per element plus a
2-byte scale per group (and an offset of 2 bytes "minimum", 1 byte "zero_point").
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch

Roles = dict[str, float]
_OFFSET_BYTES = {"symmetric": 0, "zero_point": 1, "minimum": 2}


@dataclass(frozen=True, slots=True)
class Gemm:
    """One matrix product; `dtype` is the dtype of products and activations.

    weight_bits: of the right operand when it holds integer codes, else None; then `group_size` and
        `scheme` ("symmetric", "zero_point", "minimum") say what stands beside the codes.
    shared_weight: one right operand for the whole batch (a broadcast matmul).
    left_elements: elements of the left operand really in memory, where fewer than b m k (the
        implicit GEMM of a convolution reads its image once).
    bias: the epilogue adds n elements.
    """

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    weight_bits: int | None = None
    group_size: int | None = None
    scheme: str = "symmetric"
    shared_weight: bool = False
    left_elements: int | None = None
    bias: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def bytes(self) -> Roles:
        size = self.dtype.itemsize
        copies = 1 if self.shared_weight else self.batch
        left = self.batch * self.m * self.k if self.left_elements is None else self.left_elements
        weights = copies * self.n * self.k
        held = weights * (size if self.weight_bits is None else self.weight_bits / 8)
        if self.weight_bits is not None and self.group_size:
            per_group = 2 + _OFFSET_BYTES[self.scheme]
            held += copies * self.n * ceil(self.k / self.group_size) * per_group
        if self.bias:
            held += self.n * size
        output = self.batch * self.m * self.n * size
        return {"input": float(left * size), "weight": float(held), "output": float(output)}


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(q kᵀ) v in one pass over the keys, no score in memory.

    causal: query i keeps the keys j <= i + (kv - q), at most kv. masked: a mask of one byte per
    score is read for one head. sinks: a number is read for each head. library: whose kernel it is,
    "torch" or "ridgeline".
    """

    batch: int
    heads: int
    kv_heads: int
    q: int
    kv: int
    head_dim: int
    value_dim: int
    causal: bool = False
    dtype: torch.dtype = torch.float32
    masked: bool = False
    sinks: bool = False
    library: str = "torch"

    @property
    def pairs(self) -> int:
        """(query, key) pairs kept, for one head of one batch element."""
        if not self.causal:
            return self.q * self.kv
        first = max(1, self.kv - self.q + 1)  # keys of the first query that keeps any
        rows = min(self.q, self.kv)
        return rows * (first + self.kv) // 2 if rows else 0

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.pairs * (self.head_dim + self.value_dim)

    @property
    def bytes(self) -> Roles:
        size, dims = self.dtype.itemsize, self.head_dim + self.value_dim
        moved = {
            "input": float(self.batch * self.heads * self.q * self.head_dim * size),
            "kv": float(self.batch * self.kv_heads * self.kv * dims * size),
            "output": float(self.batch * self.heads * self.q * self.value_dim * size),
        }
        if self.masked:
            moved["mask"] = float(self.batch * self.q * self.kv)
        if self.sinks:
            moved["sinks"] = float(self.heads * size)
        return moved


@dataclass(frozen=True, slots=True)
class Norm:
    """One kernel that normalises `rows` rows of `size` elements of `dtype`, in fp32.

    center: LayerNorm instead of RMSNorm. residual: of the sum of two tensors, which is written too.
    library: who makes the kernel, "inductor" (from the steps that spell the norm) or "ridgeline".
    """

    rows: int
    size: int
    dtype: torch.dtype = torch.float32
    center: bool = False
    residual: bool = False
    library: str = "inductor"

    @property
    def flops(self) -> int:
        """Squares and their sum, scale, weight; mean and centring; the residual sum."""
        return self.rows * self.size * (4 + 3 * self.center + self.residual)

    @property
    def bytes(self) -> Roles:
        moved = float(self.rows * self.size * self.dtype.itemsize * (1 + self.residual))
        parameters = float(self.size * self.dtype.itemsize * (1 + self.center))
        return {"input": moved + parameters, "output": moved}


@dataclass(frozen=True, slots=True)
class Stream:
    """A kernel that memory bounds: elementwise, reduction, gather, copy.

    flops run on the vector unit. access: "elementwise", "reduction" or "gather".
    """

    bytes_read: float
    bytes_written: float
    flops: int = 0
    dtype: torch.dtype = torch.float32
    access: str = "elementwise"

    @property
    def bytes(self) -> Roles:
        return {"input": float(self.bytes_read), "output": float(self.bytes_written)}


@dataclass(frozen=True, slots=True)
class Collective:
    """all_reduce, all_gather, reduce_scatter or all_to_all of `payload_bytes` per rank."""

    name: str
    payload_bytes: int
    ranks: int

    flops = 0
    dtype = torch.float32

    @property
    def bytes(self) -> Roles:
        return {"link": float(self.payload_bytes)}


Kernel = Gemm | Attention | Norm | Stream | Collective


@dataclass(frozen=True)
class Work:
    """Kernels that run one after the other. `a + b` is both; `Work()` is nothing."""

    kernels: tuple[Kernel, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.kernels + other.kernels)

    @cached_property
    def flops(self) -> dict[tuple[str, str], int]:
        """FLOPs by (unit, dtype name): unit "matrix" for products, "vector" for the rest."""
        total: Counter[tuple[str, str]] = Counter()
        for kernel in self.kernels:
            unit = "matrix" if isinstance(kernel, Gemm | Attention) else "vector"
            if kernel.flops:
                total[unit, str(kernel.dtype).removeprefix("torch.")] += kernel.flops
        return dict(total)

    @cached_property
    def bytes(self) -> dict[str, float]:
        """Bytes by the role of the tensor: input, weight, kv, mask, output, link."""
        total: dict[str, Any] = {}
        for kernel in self.kernels:
            for role, moved in kernel.bytes.items():
                total[role] = total.get(role, 0.0) + moved
        return total

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(k for k in self.kernels if isinstance(k, Collective))
