"""Work: what a piece of a program costs any machine, as a tuple of kernels.

    gemm       y[b,m,n] = sum_k a[b,m,k] w[b,k,n]      2 b m n k FLOPs
    attention  2 (d + dv) FLOPs per (head, query, key) pair that is kept
    binary attention  sums over keys and queries that binary codes select, and a division per query
    norm       RMSNorm or LayerNorm of rows, with the residual sum before it
    stream     reads and writes tensors once, a few FLOPs per element
    collective bytes per rank over the link

A weight held as codes of `weight_bits` takes ceil(k bits/8) bytes per row, and per group (of
`group_size` columns and `group_rows` rows) a scale ("symmetric", "shift"), with an offset of a byte
("zero_point") or of the scale's size ("minimum"), or one α per plane ("binary": of the scale's
size, or `terms` bytes) and an offset where its levels are not centred.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch

Roles = dict[str, float]


@dataclass(frozen=True, slots=True)
class Gemm:
    """One matrix product; `dtype` is the dtype of products and activations.

    weight_bits: of the right operand when it holds integer codes, else None; then `group_size`,
        `scheme` ("symmetric", "zero_point", "minimum", "binary", "shift") and the fields from
        `group_rows` on say what stands beside the codes. terms: of "binary", powers of two per α,
        0 for floating ones; of "shift", powers of two per weight. beside_bytes: row scales and
        permutation. dtype int16: products with fixed-point activations, as in
        `ridgeline.ir.quantized_linear`.
    stored: dtype of activations in memory, where it isn't `dtype`.
    shared_weight: one right operand for the whole batch (a broadcast matmul).
    experts: right operands among which the rows are shared out, each read once.
    weight: the operand that is one, "right" or "left"; "none": the program forms both, as attention
        its queries and keys.
    left_elements: elements of the left operand really in memory, where fewer than b m k (the
        implicit GEMM of a convolution reads its image once).
    bias: the epilogue adds n elements.
    library: whose kernel it is of a product of plain numbers, "vendor" or "ridgeline"; the latter's
        takes a rational function of `output_terms` coefficients of each result, or one of
        `input_terms` of each element of the left operand, as often as it is loaded (0: none).
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
    experts: int = 1
    weight: str = "right"
    left_elements: int | None = None
    bias: bool = False
    stored: torch.dtype | None = None
    group_rows: int = 1
    terms: int = 0
    centred: bool = True
    scale_bytes: int = 2
    beside_bytes: int = 0
    library: str = "vendor"
    output_terms: int = 0
    input_terms: int = 0

    @property
    def flops(self) -> int:
        """Of the product as written; what kinds of operation do it: `cost_model.operations`."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def copies(self) -> int:
        """Right operands."""
        return self.experts * (1 if self.shared_weight else self.batch)

    @property
    def lookup(self) -> bool:
        """Are sums of activations looked up instead of products formed?"""
        return self.scheme == "binary" and self.dtype == torch.int16

    @property
    def bytes(self) -> Roles:
        size = (self.stored or self.dtype).itemsize
        left = self.batch * self.m * self.k if self.left_elements is None else self.left_elements
        held = self.copies * self.n * self.k * size
        if self.weight_bits is not None:
            held = self.copies * (self.n * ceil(self.k * self.weight_bits / 8) + self.beside_bytes)
            if self.group_size:
                groups = ceil(self.n / self.group_rows) * ceil(self.k / self.group_size)
                held += self.copies * groups * self._group_bytes
        operands = {"left": left * size, "right": held}
        bias, output = self.n * size * self.bias, self.batch * self.m * self.n * size
        weight = operands.get(self.weight, 0)
        read = left * size + held - weight
        return {"input": float(read), "weight": float(weight + bias), "output": float(output)}

    @property
    def _group_bytes(self) -> int:
        """What stands beside the codes of one group."""
        if self.scheme == "binary":
            offset = 0 if self.centred else self.scale_bytes
            return (self.terms or self.scale_bytes) * (self.weight_bits or 0) + offset
        return self.scale_bytes + {"zero_point": 1, "minimum": self.scale_bytes}.get(self.scheme, 0)


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(q kᵀ) v in one pass over the keys, no score in memory.

    causal: query i keeps the keys j <= i + (kv - q), at most kv. masked: a mask of one byte per
    score is read for one head. sinks: a number is read for each head. library: whose kernel it is,
    "torch" or "ridgeline". backward: the gradients of query, key and value are formed as well, from
    five products where the forward has two.
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
    backward: bool = False

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
        products = 7 if self.backward else 2
        return products * self.batch * self.heads * self.pairs * (self.head_dim + self.value_dim)

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
        if self.backward:  # reads what the forward read and wrote, and writes as much again
            moved = {role: 3 * count for role, count in moved.items()}
        return moved


@dataclass(frozen=True, slots=True)
class BinaryAttention:
    """Linear attention over binary codes of query and key: additions, and a division per query.

    With codes of `head_dim` bits, values of `value_dim` and `kv` keys: each key adds its value, and
    a count, to the sums that its code selects, and each query adds up the sums that its own
    selects. input_bytes: of queries and keys as they lie in memory; dtype: of values and result.
    """

    batch: int
    heads: int
    q: int
    kv: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    input_bytes: float = 0.0

    @property
    def additions(self) -> int:
        sums = self.batch * self.heads * (self.q + self.kv)
        return sums * (self.head_dim + 1) * self.value_dim

    @property
    def divisions(self) -> int:
        return self.batch * self.heads * self.q

    @property
    def flops(self) -> int:
        return self.additions + self.divisions

    @property
    def bytes(self) -> Roles:
        per_row = float(self.batch * self.heads * self.value_dim * self.dtype.itemsize)
        return {
            "input": float(self.input_bytes),
            "kv": per_row * self.kv,
            "output": per_row * self.q,
        }


@dataclass(frozen=True, slots=True)
class Norm:
    """One kernel that normalises `rows` rows of `size` elements of `dtype`, in fp32.

    center: LayerNorm instead of RMSNorm. residual: of the sum of two tensors, which is written too.
    library: who makes the kernel, "inductor" (from the steps that spell the norm) or "ridgeline".
    terms: coefficients of the rational function that is taken of each result in registers, 0 where
        there is none.
    """

    rows: int
    size: int
    dtype: torch.dtype = torch.float32
    center: bool = False
    residual: bool = False
    library: str = "inductor"
    terms: int = 0

    @property
    def flops(self) -> int:
        """Squares and their sum, scale, weight; mean and centring; the residual sum; a product and
        a sum per coefficient."""
        return self.rows * self.size * (4 + 3 * self.center + self.residual + 2 * self.terms)

    @property
    def bytes(self) -> Roles:
        moved = float(self.rows * self.size * self.dtype.itemsize * (1 + self.residual))
        parameters = float(self.size * self.dtype.itemsize * (1 + self.center))
        return {"input": moved + parameters, "output": moved}


@dataclass(frozen=True, slots=True)
class Stream:
    """A kernel that memory bounds: elementwise, reduction, gather, copy.

    flops run on the vector unit. access: "elementwise", "reduction" or "gather". chain: which chain
    of operations it is, "gate", "rotary", "rational" or "softmax", whoever's kernel runs it; "" for
    others. rows: of a softmax, the rows that are normalised.
    """

    bytes_read: float
    bytes_written: float
    flops: int = 0
    dtype: torch.dtype = torch.float32
    access: str = "elementwise"
    chain: str = ""
    rows: int = 0

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


Kernel = Gemm | Attention | BinaryAttention | Norm | Stream | Collective


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
