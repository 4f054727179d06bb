"""Operations of a kernel, by kind and dtype: what an arithmetic unit is asked for.

    product       m n k multiplications in the products' dtype, as many additions in the accumulator
    uniform       a product; one lookup of a level per weight, one scaling per row and group
    binary        a product; 2**q sums of ±α per group, one lookup among them per weight
    binary int16  no product: 16 sums of four activations per four columns (the table), q lookups
                  and q additions per four weights and row; per plane and 32 columns one scaling
                  by α, per 32 columns one by the activations' step
    shift         a product; `terms` shifts and terms - 1 additions per weight
    shift int16   no product: `terms` shifts and additions per weight and row; scalings as above
    rational      of results or left operands: a product per coefficient, and a division
    attention     (d + dv) products per kept pair
    binary attention  additions, and a division per query

A scaling by a sum of T powers of two is T shifts and additions instead of a multiplication. Weights
are decoded once, however many rows are multiplied. "float32" elsewhere: half of a kernel's FLOPs
are taken to be multiplications. Laws: `ridgeline.ir.quantized_linear`.
"""

from collections import Counter
from math import ceil

import torch

from ridgeline.cost_model.work import Attention, BinaryAttention, Collective, Gemm, Kernel
from ridgeline.ir.quantized_linear import FIXED_POINT_BLOCK

Operations = Counter[tuple[str, str]]
LOOKUP_COLUMNS = 4
"""Activations whose 16 signed sums make one table."""


def operations(kernel: Kernel) -> Operations:
    """How often each (kind, dtype name) occurs: "multiply", "add", "shift", "lookup", "divide"."""
    if isinstance(kernel, Gemm):
        return _gemm(kernel)
    if isinstance(kernel, Attention):
        return _products(kernel.flops // 2, kernel.dtype)
    if isinstance(kernel, BinaryAttention):
        return Counter(
            {("add", "float32"): kernel.additions, ("divide", "float32"): kernel.divisions}
        )
    if isinstance(kernel, Collective):
        return Counter()
    half = kernel.flops // 2
    return Counter({("multiply", "float32"): half, ("add", "float32"): kernel.flops - half})


def lookups(g: Gemm) -> int:
    """Table entries that a `lookup` product reads."""
    return g.batch * g.m * g.n * (g.weight_bits or 0) * ceil(g.k / LOOKUP_COLUMNS)


def _products(count: int, dtype: torch.dtype) -> Operations:
    accumulator = "float32" if dtype.is_floating_point else "int32"
    if dtype == torch.float64:
        accumulator = "float64"
    return Counter({("multiply", _name(dtype)): count, ("add", accumulator): count})


def _gemm(g: Gemm) -> Operations:
    weights, outputs = g.copies * g.n * g.k, g.batch * g.m * g.n
    found = Counter({("add", "float32"): outputs * g.bias})
    for elements, terms in ((outputs, g.output_terms), (g.batch * g.m * g.k, g.input_terms)):
        if terms:
            found += _products(elements * terms, torch.float32)
            found["divide", "float32"] += elements
    if g.weight_bits is None:
        return found + _products(outputs * g.k, g.dtype)
    groups = ceil(g.k / (g.group_size or g.k))
    fixed = g.dtype == torch.int16
    if fixed:
        blocks = ceil(g.k / FIXED_POINT_BLOCK)
        found["multiply", "float32"] += g.batch * g.m * g.k + outputs * blocks
        found["add", "float32"] += outputs * blocks
    if g.scheme == "binary" and fixed:
        planes = outputs * g.weight_bits * ceil(g.k / FIXED_POINT_BLOCK)
        found["add", "int16"] += 2**LOOKUP_COLUMNS * g.batch * g.m * ceil(g.k / LOOKUP_COLUMNS)
        found["lookup", "int16"] += lookups(g)
        found["add", "int32"] += lookups(g)
        return found + _scalings(planes, g.terms)
    if g.scheme == "shift" and fixed:
        found["shift", "int32"] += outputs * g.k * g.terms
        found["add", "int32"] += outputs * g.k * g.terms
        return found + _scalings(outputs * groups, 0)
    found += _products(outputs * g.k, g.dtype)
    if g.scheme == "binary":
        shared = g.copies * ceil(g.n / g.group_rows) * groups
        found["add", "float32"] += shared * 2**g.weight_bits
        found["lookup", _name(g.dtype)] += weights
        return found + (_scalings(shared * g.weight_bits, g.terms) if g.terms else Counter())
    if g.scheme == "shift":
        found["shift", _name(g.dtype)] += weights * g.terms
        found["add", _name(g.dtype)] += weights * (g.terms - 1)
    else:
        found["lookup", _name(g.dtype)] += weights
    return found + _scalings(outputs * groups, 0)


def _scalings(count: int, terms: int) -> Operations:
    """Scaled and added: by numbers, or by sums of `terms` powers of two."""
    if terms:
        return Counter({("shift", "float32"): count * terms, ("add", "float32"): count * terms})
    return Counter({("multiply", "float32"): count, ("add", "float32"): count})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
