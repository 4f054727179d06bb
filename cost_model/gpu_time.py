"""Seconds of one kernel of a `Work` on a GPU, by the laws and constants of `predict`.

    t = fixed + (compute⁴ + memory⁴)^¼, each times exp(residual)

A kernel is priced as the measured group of operators that it is most like, its bytes as counted:

    Gemm             gemm.<dtype>; weights of up to 4 bits gemm.w4a16, of more gemm.w8a16
    Attention        prefill; decode where the queries of a key head share one tile
    Norm, Stream     torch's own loops, by rows of float32: elementwise, "reduction" softmax, a norm
                     that reads its rows twice layernorm, which does so too
    Collective       its own name, by NCCL

What no row was measured for stands in this file. A dtype without a unit is multiplied at float32's
rate, misaligned rows at half of it; products that have a right operand each read as slowly as
float32 ones were measured to. Codes of planes and of shifts take longer to unpack, and no codes are
multiplied faster than a plain product is that is handed as few bytes. Attention is priced without
what serving engines run around it: metadata kernels (so floors of bare kernels), copies of queries,
pages of keys written; and a decode's keys are split whether or not heads share them. ridgeline's
prefill neither packs queries nor splits keys. A mask is read on the
way. Vector FLOPs of a stream run beside its bytes, those of binary attention are additions at half
of the rate; a rational function beside a product is added to it, at the rate of Triton's products.
Picked rows are copied as others are. Products have no residual: it is what one library chose at one
size, and would weigh in what is chosen between libraries.

A program's weights are read in turns, each once a step, so that one is found in L2 only if all of
them are: in place of a harness's copies of one weight stand the program's others. A weight of a
model that is larger than L2 comes from DRAM at every step, of one that fits from L2, however small
its layers are. Decoded keys have what the weights leave of L2, whether one kernel reads them or a
product of few rows. What else a product reads beside its weights was made by the kernel before it,
as in a harness.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.cost_model import laws, shapes
from ridgeline.cost_model.calibration import calibration
from ridgeline.cost_model.elementwise import root4
from ridgeline.cost_model.machine import (
    PCIE_BYTES_PER_S,
    machine_of,
    ring_bytes_per_s,
)
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import (
    Attention,
    BinaryAttention,
    Collective,
    Gemm,
    Kernel,
    Norm,
    Stream,
)

_UNITS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
MATRIX_UNITS = ("bf16", "fp16", "int8", "fp8")
UNALIGNED = 2.0
"""How much longer products take whose rows are no multiple of 16 bytes. Assumed."""
PLANE_US, SHIFT_US = 0.015, 0.02
"""Beyond a step's unpacking of integers: a plane of binary codes (a bit and a signed sum per
weight, where 4-bit codes come two at a time), a power of two of shift codes. Assumed."""
# Rate of ridgeline's dense products over cuBLAS's: that of the matrix product in Triton's tutorial,
# fp16, as users measured it on A100 (triton-lang/triton issue 6523, 2304 to 2944: 0.89 to 0.99) and
# on H100 (issue 3672, 2816 to 3072: 0.81 to 0.90). Of others and of fp32 it is assumed.
OWN_RATE, OTHER_RATE = {"sm_80": 0.93, "sm_86": 0.93, "sm_89": 0.93, "sm_90": 0.82}, 0.7
TILE_ROWS = 16
"""Rows of the law's lowest tile, that of a matrix instruction. Vector units multiply fewer rows by
themselves; no product of theirs was measured with less than 512."""
OWN_TILES = ((128, 128), (128, 64), (64, 64), (32, 64), (16, 64))
"""Of ridgeline's dense products (`codegen.triton.choose`), whose sums are never split."""
# Of a rational function, in flops of the fp32 unit: per coefficient, and of the division and the
# rest. sm_80's code has 10 FFMA and 10 others per element for 10 coefficients.
TERM_FLOPS, DIVISION_FLOPS = 2, 20
DECODE_ROWS = 64
"""Queries of one key head that share a tile; then keys are split over cores."""
BARE: Mapping[str, Mapping[str, float]] = {
    "prefill": {
        "floor_us": 1.9, "bare_us": 1.9, "copy_us": 0.0, "write": math.inf, "token_us": 0.0,
        "plan_us": 0.0,
    },
    "decode": {"floor_us": 3.0, "copy_us": 0.0, "grouped_us": 0.0},
}  # fmt: skip
"""Constants of attention's own kernels. The floors are a bare prefill's as measured on an A6000,
and that of a product, which also loads its operands and leaves."""
WIDTH = 4096
"""Elements of a row where a stream has none: those of a model's hidden state."""
# Elements of a row up to which a kernel reads it once: torch 2.13's
# InductorChoices.should_use_persistent_reduction; the largest block of ridgeline's kernel.
NORM_PERSISTENT = {"inductor": 1024, "ridgeline": 16384}
_STREAM_OPS = {"elementwise": "add", "gather": "add", "reduction": "softmax"}
_COLLECTIVE_OPS = {"all_to_all": "alltoall"}
_NODE = 8  # GPUs of a node


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds, and the (5 %, 95 %) quantiles of ln(measured / predicted) of kernels like it."""

    compute: float
    memory: float
    fixed: float
    interval: tuple[float, float]


@functools.lru_cache(maxsize=1 << 16)  # a model repeats its layers, a search its questions
def price(kernel: Kernel, target: Target, resident_bytes: float = 0.0) -> Price:
    """What a kernel takes; resident_bytes: of the program's weights, 0 where they aren't known, and
    products find in L2 what they did in the harness that timed them."""
    if isinstance(kernel, Gemm):
        return _gemm(kernel, target, resident_bytes)
    if isinstance(kernel, Attention):
        return _attention(kernel, target, resident_bytes)
    if isinstance(kernel, BinaryAttention):
        moved = sum(kernel.bytes.values())
        return _stream("softmax", moved, 2 * kernel.flops, target)
    if isinstance(kernel, Norm):
        return _norm(kernel, target)
    if isinstance(kernel, Stream):
        moved = sum(kernel.bytes.values())
        return _stream(_STREAM_OPS[kernel.access], moved, kernel.flops, target)
    if isinstance(kernel, Collective):
        return _collective(kernel, target)
    raise TypeError(f"expected a kernel of ridgeline.cost_model.work, found {kernel!r}")


def _by_law(
    op: str,
    dtype: str,
    known: tuple[Mapping[str, Any], str],
    s: Mapping[str, Any],
    changed: Mapping[str, float] | None = None,
    like: bool = True,
) -> Price:
    """By the law of `op`; changed: constants in place of the fitted ones; like: is the kernel
    like those that residuals were fitted to?"""
    group, (machine, name), model = shapes.group_of(op, dtype), known, calibration()
    constants = model.constants(group, name)
    if changed:
        named = zip(laws.CONSTANTS[group.law], constants, strict=True)
        constants = [changed.get(key, value) for key, value in named]
    fixed, compute, memory = laws.LAWS[group.law](constants, machine, s)
    parts = (fixed, compute, memory)
    interval = model.interval(group, name if like else "", max(range(3), key=parts.__getitem__))
    factor = model.factor(group, name, machine, s, parts, laws.total(parts)) if like else 1.0
    if group.law not in BARE:  # whose floor no residual was fitted around
        fixed *= factor
    return Price(compute * factor, memory * factor, fixed, interval)


def _empty(target: Target) -> Price:
    """A kernel that has nothing to do."""
    return _torch("add", 1, 1, 12.0, target)


def _unit(dtype: torch.dtype, target: Target) -> str:
    """The dtype, in the laws' terms, of the unit that multiplies it."""
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return "fp8" if any(p.startswith("float8") for p in target.peaks) else "fp32"
    return _UNITS.get(dtype, "fp32") if name in target.peaks else "fp32"


def _slower(dtype: torch.dtype, target: Target) -> float:
    """How much slower than the unit of `_unit` products are."""
    return target.peaks["float32"] / target.peak(dtype) if dtype == torch.float64 else 1.0


def _gemm(g: Gemm, target: Target, resident_bytes: float) -> Price:
    if not g.flops:
        return _empty(target)
    unit = _unit(g.dtype, target)
    bits = g.weight_bits
    if bits is None or bits >= 8 * g.dtype.itemsize:
        found = _product(g, unit, target, resident_bytes)
        return _own(g, found, target) if g.library == "ridgeline" else found
    unpack = PLANE_US * bits * (g.scheme == "binary") + SHIFT_US * g.terms * (g.scheme == "shift")
    found = _product(g, "w4a16" if bits <= 4 else "w8a16", target, resident_bytes, unpack)
    if g.m <= TILE_ROWS and unit in MATRIX_UNITS:  # it is the weights that take long
        return found
    # No faster than a product that is handed as few bytes.
    handed = _product(g, unit, target, resident_bytes, unpack)
    return dataclasses.replace(found, compute=max(found.compute, handed.compute))


def _product(
    g: Gemm, law: str, target: Target, resident_bytes: float, unpack: float = 0.0
) -> Price:
    """law: "bf16", ..., "w4a16"; unpack: microseconds that a step of 64 columns takes longer."""
    machine, name = machine_of(target, "gemm", law)
    changed = {}
    if unpack:
        changed["step_us"] = _constant("gemm", law, name, "step_us") + unpack
    if g.copies > 1:
        changed["memory"] = _constant("gemm", law, name, "memory") * _batched()
    unit, per_row = _unit(g.dtype, target), 16 // g.dtype.itemsize
    slower = _slower(g.dtype, target)
    if unit in MATRIX_UNITS and (g.n % per_row or g.k % per_row):
        slower *= UNALIGNED
    if slower != 1.0 or shapes.UNIT[law] != shapes.UNIT[unit]:
        rates = machine_of(target, "gemm", unit)[0]
        machine = {**machine, **{key: rates[key] / slower for key in ("peak", "boost")}}
    shape = {"batch": g.batch, "m": g.m, "n": g.n, "k": g.k}
    # x comes in the dtype of the products
    moved = g.bytes
    if resident_bytes and moved["weight"]:
        changed["copies"] = max(resident_bytes / moved["weight"], 1.0)
    if g.weight == "none" and g.m <= DECODE_ROWS:  # read as attention's decode reads its keys
        machine = {**machine, "l2": max(machine["l2"] - resident_bytes, 1.0)}
    counted = {"bytes": sum(moved.values()), "quantized": 0.0}
    counted |= {"weights": moved["weight"], "written": moved["output"]}
    s = shapes.law_inputs("gemm", law, shape) | counted
    found = _by_law("gemm", law, (machine, name), s, changed, like=False)
    if unit not in MATRIX_UNITS and g.m < TILE_ROWS:
        found = dataclasses.replace(found, compute=found.compute * g.m / TILE_ROWS)
    return found


def _own(g: Gemm, found: Price, target: Target) -> Price:
    """What ridgeline's kernel takes where the library's takes `found`: a slower loop on its best
    tile, then its rational functions, as nothing is taken to overlap; an element of the input is
    computed anew for each column of tiles."""
    slower = 1 / OWN_RATE.get(target.arch, OTHER_RATE)
    rate = target.peak(g.dtype) * target.gemm_efficiency / (target.cores * slower)
    vector = target.peak(torch.float32) / target.cores
    of_output, of_input = (
        (TERM_FLOPS * terms + DIVISION_FLOPS) * (terms > 0) / vector
        for terms in (g.output_terms, g.input_terms)
    )

    def taken(tile: tuple[int, int]) -> tuple[float, float]:
        rows, columns = tile
        blocks = g.batch * math.ceil(g.m / rows) * math.ceil(g.n / columns)
        work = max(blocks / target.cores, 1.0) * rows
        return work * 2 * columns * g.k / rate, work * (columns * of_output + g.k * of_input)

    products, rational = min(map(taken, OWN_TILES), key=sum)
    compute = max(found.compute * slower, products) + rational
    return dataclasses.replace(found, compute=compute)


def _constant(op: str, dtype: str, name: str, key: str) -> float:
    group = shapes.group_of(op, dtype)
    return calibration().constants(group, name)[list(laws.CONSTANTS[group.law]).index(key)]


@functools.cache
def _batched() -> float:
    """How fast products read that have a right operand each, to one product: only float32 ones were
    measured, over all machines."""
    return _constant("bmm", "fp32", "", "memory") / _constant("gemm", "fp32", "", "memory")


def _attention(a: Attention, target: Target, resident_bytes: float) -> Price:
    if not a.flops:
        return _empty(target)
    rows = a.q * (a.heads // max(a.kv_heads, 1))
    unit = _unit(a.dtype, target)
    law = "decode" if rows <= DECODE_ROWS else "prefill"
    op = f"attn_{law}"
    dtype = unit if unit in shapes.ITEMSIZE else "bf16"
    machine, name = machine_of(target, op, dtype)
    if a.library == "ridgeline":  # whose prefill packs no queries into one tile and splits no keys
        machine = {**machine, "packed": 0.0}
    shape = {
        "batch": a.batch, "heads": a.heads, "kv_heads": a.kv_heads, "q_len": a.q, "kv_len": a.kv,
        "head_dim": (a.head_dim + a.value_dim) / 2, "window": 0,
    }  # fmt: skip
    # A training step's products are those of so many pairs in a forward.
    pairs = a.flops / (2 * a.batch * a.heads * (a.head_dim + a.value_dim))
    counted = {"itemsize": a.dtype.itemsize, "bytes": sum(a.bytes.values()), "pairs": pairs}
    s = shapes.law_inputs(op, dtype, shape) | counted
    if law == "decode":
        # The law splits keys where heads share them; these kernels do so in any case.
        s["heads"] = max(a.heads * a.q, a.kv_heads + 1)
        machine = {**machine, "l2": max(machine["l2"] - resident_bytes, 1.0)}
    found = _by_law(op, dtype, (machine, name), s, BARE[law], law == "decode" or a.q == a.kv)
    compute = found.compute * _slower(a.dtype, target)
    if law == "decode":  # on a tile of the matrix instruction's 16 rows
        tile = max(rows, 16 if unit in MATRIX_UNITS else 1) / rows
        compute = root4(compute, tile * a.flops / machine["peak"] * _slower(a.dtype, target))
    beside = a.bytes.get("mask", 0.0) + a.bytes.get("sinks", 0.0)
    memory = found.memory + beside / machine["bandwidth"]
    return dataclasses.replace(found, compute=compute, memory=memory)


def _stream(op: str, moved: float, flops: float, target: Target) -> Price:
    if not moved:
        return _empty(target)
    rows = moved / (4.0 * sum(shapes.STREAMS[op]) * WIDTH)  # of float32, that move as many bytes
    return _torch(op, max(rows, 1.0), WIDTH, moved, target, flops)


def _norm(n: Norm, target: Target) -> Price:
    if not n.rows * n.size:
        return _empty(target)
    # Fewer rows than cores are bound by latency, and their second reading hits the first cache.
    twice = n.size > NORM_PERSISTENT[n.library] and n.rows >= target.cores
    op = "layernorm" if twice else "add"
    return _torch(op, n.rows, n.size, sum(n.bytes.values()), target, n.flops)


def _torch(
    op: str, rows: float, width: int, moved: float, target: Target, flops: float = 0.0
) -> Price:
    """A kernel as torch's own in float32, that moves `moved` bytes; with `flops` of the vector
    unit."""
    s = shapes.law_inputs(op, "fp32", {"rows": rows, "width": width}) | {"bytes": moved}
    found = _by_law(op, "fp32", machine_of(target, op, "fp32"), s)
    compute = found.compute + flops / target.peaks["float32"]
    return dataclasses.replace(found, compute=compute)


def _collective(c: Collective, target: Target) -> Price:
    op = _COLLECTIVE_OPS.get(c.name, c.name)
    if c.ranks < 2:
        return Price(0.0, 0.0, 0.0, (0.0, 0.0))
    shape = {"world": c.ranks, "per_node": min(c.ranks, _NODE), "bytes": max(c.payload_bytes, 1)}
    machine, name = machine_of(target, op, "fp16", c.ranks, shape["per_node"])
    if target.link_bytes_per_s <= PCIE_BYTES_PER_S[True]:  # cards without links meet on PCIe
        link = ring_bytes_per_s(target, "pcie", c.ranks, shape["per_node"])
        name = name.removesuffix("nvswitch") + "pcie"
        machine = {**machine, "link": link, "meshed": float(c.ranks == 2)}
    return _by_law(op, "fp16", (machine, name), shapes.law_inputs(op, "fp16", shape))
