"""Seconds of one kernel on a CPU.

    t = dispatch + fork + smoothmax(flops / (peak · parallel), bytes / bandwidth(working set))

bandwidth: that of the innermost cache that holds the working set, else DRAM's; weights come from
the level that holds all that the program reads between two uses of one of them. parallel: chunks
over ceil(chunks/threads) threads' rounds. A norm's compute is that of its passes over a row that
lies in the first cache, in equivalents of the fp32 unit's flops. Integer weights add two vector
operations per element and pass of 32 rows, 128 where the weight is decoded first (unpack, scale),
on the fp32 unit; binary codes add one per plane, shift codes take more. Binary codes that aren't
decoded first are looked up: the compute is that of the tables, made once for each row, and of the
lookups, both in equivalents of the fp32 unit's flops. Additions alone run at half of its rate. A
softmax is bound by its exponentials, taken of whole vectors, and by what a row costs beside them. A
product of a batch computes whole vectors of its columns, and each matrix costs its call.
"""

from math import ceil

import torch

from ridgeline.cost_model.cpu_attention import LANES, multiply_adds
from ridgeline.cost_model.operations import lookups
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import Attention, BinaryAttention, Gemm, Kernel, Norm, Stream
from ridgeline.ir.quantized_linear import MANY_ROWS

CHUNK_M, CHUNK_N = 32, 64  # one thread's share of a GEMM
MANY_CHUNK_M = 128  # the same where the weight is decoded before it is multiplied
# Decoding one weight, in flops of the fp32 unit: of integers; what each plane adds where binary
# codes are decoded first; of shift codes, whatever their terms. One lookup, for four weights of one
# plane, in a table of fixed-point numbers and of fp32 ones (four weights of 4 bits take 12, with
# bf16 products). A table, per activation. From 2048x2048 and 11008x4096 weights on one Zen 4 core,
# 1 and 8 rows, beside other work: 2, 3 and 4 bits took 62, 84 and 109 us by lookup where plain 4
# bits took 101. To measure again: the kernels at M = 1, weights in the second-level cache, in units
# of the time of plain 4 bits / (3 K N).
UNPACK_FLOPS, PLANE_FLOPS, SHIFT_FLOPS = 2, 1, 4.5
LOOKUP_FLOPS, FP32_LOOKUP_FLOPS, TABLE_FLOPS = 3.25, 5.5, 16
ATTENTION_ROWS = 32
# A norm's passes over a row, in flops per element: RMSNorm, and what LayerNorm's centring and a
# residual sum add; and its call beyond a dispatch in seconds: plain, and what two results add. From
# chains of norms between opaque calls, compiled by Inductor, on one Zen 4 core, 1 to 256 rows of
# 576 to 4096: Inductor's loops convert 16-bit numbers apart from using them and follow Welford's
# recurrence in LayerNorm, while its calls cost less than a kernel's that stands by itself.
NORM_FLOPS = {"inductor": (26, 28, 20), "ridgeline": (15, 11, 10)}
NORM_CALL_S = {"inductor": (0.0, 0.0), "ridgeline": (1.2e-6, 1.8e-6)}
# Batched products of plain numbers: what each matrix costs beside its arithmetic, its call and the
# packing of its edges; of bf16, what oneDNN takes to set one call up, in seconds. A softmax: of
# each element in Inductor's three passes over a row (largest, exponentials and their sum,
# division), most of it the exponential, and what converting one of 16 bits adds; of each row, the
# sums across a vector's lanes. In flops of the fp32 unit. From [8, S, D] x [8, D, S] and [8, S, S]
# x [8, S, D] by torch.bmm, and 8 S rows of softmax as Inductor compiles it, 10 lengths S from 8 to
# 512, D of 16 and 64, on one core of a Xeon with AVX-512 and AMX, interleaved, the fastest of 15
# rounds beside other work: products run at 0.75 to 0.95 of the fp32 peak where S fills its vectors
# and at half of it at S = 33; bf16 ones take 14 us at S = 8. The softmax takes 0.85 to 1.1 ns an
# element from S = 64 on, 2.5 at S = 33, 1.2 to 1.4 in bf16: twice what both products of 16
# dimensions take. One after the other they take a quarter more, in memory that each of them touches
# for the first time, which is not counted.
MATRIX_FLOPS = 15_000
BF16_BATCH_CALL_S = 12e-6
SOFTMAX_FLOPS, SOFTMAX_16_BIT_FLOPS, SOFTMAX_ROW_FLOPS = 150, 55, 2900
GRAIN_BYTES = 32768 * 4  # at::parallel_for runs smaller elementwise work on one thread

Parts = tuple[float, float, float, float]
"""Seconds of (compute, memory, dispatch, fork)."""


def bandwidth(working_set: float, target: Target) -> float:
    """Bytes per second of the level that holds `working_set` bytes."""
    for size, speed in target.caches:
        if working_set <= size:
            return speed
    return target.bandwidth_bytes_per_s


def kernel_parts(kernel: Kernel, target: Target, resident_bytes: float) -> Parts:
    """Of one kernel; its time is smoothmax of the first two plus the others."""
    moved = sum(kernel.bytes.values())
    dispatch, fork = target.launch_s, target.fork_s if moved > GRAIN_BYTES else 0.0
    weights = kernel.bytes.get("weight", 0.0)
    memory = (
        weights / bandwidth(max(moved, resident_bytes), target)
        + (moved - weights) / bandwidth(moved, target)
    ) / target.bandwidth_efficiency
    if isinstance(kernel, Gemm):
        slow_call = _batched(kernel) and kernel.dtype == torch.bfloat16
        return _gemm_compute(kernel, target), memory, dispatch + BF16_BATCH_CALL_S * slow_call, fork
    if isinstance(kernel, Attention):
        return _attention_compute(kernel, target), memory, dispatch, fork
    if isinstance(kernel, BinaryAttention):
        busy = _parallel(kernel.batch * kernel.heads, target)
        return 2 * kernel.flops / (target.peak(torch.float32) * busy), memory, dispatch, fork
    if isinstance(kernel, Norm):
        plain, second = NORM_CALL_S[kernel.library]
        call = dispatch + plain + second * kernel.residual
        return _norm_compute(kernel, target), memory, call, fork
    if isinstance(kernel, Stream):
        return _stream_compute(kernel, target), memory, dispatch, fork
    raise TypeError(f"expected a kernel of ridgeline.cost_model.work, found {kernel!r}")


def _attention_compute(a: Attention, target: Target) -> float:
    heads = a.batch * a.heads
    rate = target.peak(torch.float32) * target.attention_efficiency
    busy = _parallel(heads * ceil(a.q / ATTENTION_ROWS), target)
    return heads * 2 * multiply_adds(a, target) / (rate * busy)


def _gemm_compute(g: Gemm, target: Target) -> float:
    rate = target.peak(g.dtype)
    if g.weight_bits is not None:  # our kernels widen what is multiplied faster so
        rate = max(rate, target.peak(torch.float32))
    pairs = g.dtype == torch.bfloat16 and rate > target.peak(torch.float32)
    decoded_first = g.weight_bits is not None and pairs and g.m >= MANY_ROWS
    if g.scheme == "binary" and not decoded_first:
        tables = TABLE_FLOPS * g.batch * g.m * g.k * max(target.threads, 1)  # by one thread
        busy = _parallel(g.batch * ceil(g.n / CHUNK_N), target)
        each = LOOKUP_FLOPS if g.lookup else FP32_LOOKUP_FLOPS
        return (tables + each * lookups(g) / busy) / target.peaks["float32"]
    rows = ceil(g.m / (MANY_CHUNK_M if decoded_first else CHUNK_M))
    parallel = _parallel(g.batch * rows * ceil(g.n / CHUNK_N), target)
    compute = g.flops / (rate * target.gemm_efficiency * parallel)
    if _batched(g):
        compute *= ceil(g.n / LANES) * LANES / g.n
        compute += g.batch * MATRIX_FLOPS / (target.peaks["float32"] * parallel)
    if g.weight_bits is not None:
        unpacked = _unpack_flops(g) * g.batch * g.n * g.k * rows
        compute += unpacked / (target.peaks["float32"] * parallel)
    return compute


def _batched(g: Gemm) -> bool:
    """Is it a batch of products of plain numbers, and no convolution?"""
    return g.batch > 1 and g.weight_bits is None and g.left_elements is None


def _unpack_flops(g: Gemm) -> float:
    if g.scheme == "binary":
        return UNPACK_FLOPS + PLANE_FLOPS * (g.weight_bits or 0)
    return SHIFT_FLOPS if g.scheme == "shift" else UNPACK_FLOPS


def _norm_compute(n: Norm, target: Target) -> float:
    plain, center, residual = NORM_FLOPS[n.library]
    per_element = plain + center * n.center + residual * n.residual + 2 * n.terms
    return n.rows * n.size * per_element / _rate_of_rows(n, n.rows, target)


def _stream_compute(s: Stream, target: Target) -> float:
    if s.chain != "softmax" or not s.rows:
        return s.flops / target.peak(torch.float32)
    size = s.bytes_written / s.dtype.itemsize / s.rows
    each = SOFTMAX_FLOPS + SOFTMAX_16_BIT_FLOPS * (s.dtype.itemsize == 2)
    per_row = each * ceil(size / LANES) * LANES + SOFTMAX_ROW_FLOPS
    return s.rows * per_row / _rate_of_rows(s, s.rows, target)


def _rate_of_rows(kernel: Kernel, rows: int, target: Target) -> float:
    """FLOP/s of fp32 on rows, one of which one thread takes."""
    parallel = _parallel(rows, target) if sum(kernel.bytes.values()) > GRAIN_BYTES else 0.0
    return target.peak(torch.float32) * max(parallel, 1 / max(target.threads, 1))


def _parallel(chunks: int, target: Target) -> float:
    """The busy share of the threads that work on `chunks` equal chunks."""
    threads = max(target.threads, 1)
    return chunks / (ceil(chunks / threads) * threads) if chunks else 1.0
