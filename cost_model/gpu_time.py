"""Seconds of one kernel on a GPU.

    t = floor + smoothmax(t_compute, t_memory) + t_extra        smoothmax_p(a, b) = (aᵖ + bᵖ)^(1/p)

GEMM, least over tiles (Tm, Tn) and split-K s:
    blocks = ceil(m/Tm) ceil(n/Tn) b s,  waves = a blend of blocks/cores and its ceiling
    t_compute = waves 2 Tm Tn (ceil64(k/s) + fill) / (peak/cores · efficiency · tile efficiency)
                + ceil(k/s / 64) · step
    t_memory  = bytes / (bandwidth · efficiency · min(1, blocks / (SATURATION cores)))
    t_extra   = s > 1: the partial sums through L2
    Ours with a rational function: tiles of its own without a split, the rate of the library's times
    OWN_RATE, and, as nothing is taken to overlap, waves Tm (Tn e_output + k e_input) / vector rate,
    e the operations per element: an element of the input is computed anew for each column of tiles.
Attention: tiles of 128 queries, or with few queries the keys split over the cores.
Stream: bytes / bandwidth with a share of the bytes in L2 where the working set fits.
Binary attention: its additions on the vector unit at half of its rate, its bytes as a stream's.
Norm: a stream; Inductor's kernel keeps rows of up to 1024 elements in registers and reads longer
ones a second time, through L2, ours do so beyond 16384. That counts only with a row for every core:
fewer rows are bound by latency.

The GEMM constants were fitted on public CUDA-graph measurements of an A100 (cuBLAS in bf16; for
integer weights TensorRT-LLM's kernels on A100 and L40S), L1 loss of log time; the efficiencies of
a product stand in its target file. Attention's floor is that of a bare kernel: serving systems
add several microseconds of metadata kernels around theirs.
"""

import functools
from math import ceil

import numpy as np
import torch

from ridgeline.cost_model.law_gemm import TILES
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

P = 4
# Large-tile operand traffic: the efficiency of a tile relative to that of 256 x 128.
TILE_LOSS = 0.19
FILL_K = 120  # k elements that fill the pipeline
STEP = 120e-9  # latency of one 64-deep step of a block's loop, beyond its arithmetic
DEQUANTIZE_STEP = 150e-9  # the same where the step also unpacks integer weights
# Beyond that, per plane of a binary code (a bit and a signed sum per weight, where 4-bit codes come
# two at a time) and per power of two of a shift code. Assumed, not measured.
PLANE_STEP, SHIFT_STEP = 15e-9, 20e-9
QUANTIZATION = 0.05  # share of wave quantization paid: libraries pick tiles that avoid it
SATURATION = 0.8  # below this share of busy cores DRAM is not saturated
GEMM_FLOOR = 1.2e-6  # setup and epilogue beyond the launch floor
SPLIT_FLOOR = 1.9e-6
DEQUANTIZE_FLOOR = 2.5e-6
DEQUANTIZE_EFFICIENCY = 0.97
# Rate of ridgeline's dense products over cuBLAS's: that of the matrix product in Triton's tutorial,
# fp16, as users measured it on A100 (triton-lang/triton issue 6523, 2304 to 2944: 0.89 to 0.99) and
# on H100 (issue 3672, 2816 to 3072: 0.81 to 0.90). Of others and of fp32 it is assumed.
OWN_RATE, OTHER_RATE = {"sm_80": 0.93, "sm_86": 0.93, "sm_89": 0.93, "sm_90": 0.82}, 0.7
# Of a rational function, in flops of the fp32 unit: per coefficient, and of the division and the
# rest. sm_80's code has 10 FFMA and 10 others per element for 10 coefficients.
TERM_FLOPS, DIVISION_FLOPS = 2, 20
ATTENTION_FLOOR = 1.5e-6
ATTENTION_QUANTIZATION, ATTENTION_SATURATION = 0.5, 0.17
QUERY_TILE, KEY_TILE = 128, 256
ACCESS_EFFICIENCY = {"elementwise": 1.05, "reduction": 0.8, "gather": 0.8}
L2_FULL, L2_NONE = 0.3, 1.0  # working set / L2: everything hits below, nothing above
# Elements of a row up to which a kernel reads it once: torch 2.13's
# InductorChoices.should_use_persistent_reduction; the largest block of ridgeline's kernel.
NORM_PERSISTENT = {"inductor": 1024, "ridgeline": 16384}
UNALIGNED = 0.5  # 16-bit operands whose rows aren't multiples of 16 bytes
COLLECTIVE_LATENCY, COLLECTIVE_STEP, COLLECTIVE_EFFICIENCY = 5.0e-6, 1.1e-6, 0.72

_TM, _TN, _SPLIT = TILES.T
_TILE_EFFICIENCY = (1 + TILE_LOSS * 64 * (1 / 256 + 1 / 128)) / (
    1 + TILE_LOSS * 64 * (1 / _TM + 1 / _TN)
)
_AREA = _TM * _TN
_FLOPS_PER_K = 2 * _AREA / _TILE_EFFICIENCY
_SPLITS = _SPLIT > 1
_PARTIAL_BYTES = _SPLITS * 8.0 * _SPLIT  # fp32, written and read
OWN_TILES = ((128, 128), (128, 64), (64, 64), (32, 64), (16, 64))
"""Of ridgeline's dense products (`codegen.triton.choose`)."""
_NOT_OWN = np.array([(tm, tn) not in OWN_TILES or s > 1 for tm, tn, s in TILES.tolist()])

Parts = tuple[float, float, float]


def smoothmax(compute: float, memory: float) -> float:
    """(compute**P + memory**P)**(1/P), scaled so that nothing under- or overflows."""
    top = max(compute, memory)
    return top * ((compute / top) ** P + (memory / top) ** P) ** (1 / P) if top > 0 else 0.0


def kernel_parts(kernel: Kernel, target: Target, resident_bytes: float) -> Parts:
    """(compute, memory, fixed) seconds of one kernel; its time is smoothmax of two plus fixed.

    resident_bytes is not read: weights are taken to come from DRAM whatever the program's size.
    """
    if isinstance(kernel, Gemm):
        return _gemm(kernel, target)
    if isinstance(kernel, Attention):
        return _attention(kernel, target)
    if isinstance(kernel, BinaryAttention):
        moved = sum(kernel.bytes.values())
        streamed = Stream(moved, 0.0, 2 * kernel.flops, kernel.dtype, "reduction")
        return _stream(streamed, target)
    if isinstance(kernel, Norm):
        return _norm(kernel, target)
    if isinstance(kernel, Stream):
        return _stream(kernel, target)
    raise TypeError(f"expected a kernel of ridgeline.cost_model.work, found {kernel!r}")


def _gemm(g: Gemm, target: Target) -> Parts:
    moved = sum(g.bytes.values())
    if not g.batch * g.m * g.n:
        return 0.0, 0.0, target.launch_s
    rate = target.peak(g.dtype) / target.cores * target.gemm_efficiency * _alignment(g)
    fixed, step = target.launch_s + GEMM_FLOOR, STEP
    if g.weight_bits is not None and g.weight_bits < 8 * g.dtype.itemsize:
        rate *= DEQUANTIZE_EFFICIENCY
        fixed, step = fixed + DEQUANTIZE_FLOOR, DEQUANTIZE_STEP
        step += PLANE_STEP * g.weight_bits * (g.scheme == "binary")
        step += SHIFT_STEP * g.terms * (g.scheme == "shift")
    rational = (0.0, 0.0)
    if g.library == "ridgeline" and g.weight_bits is None:
        rate *= OWN_RATE.get(target.arch, OTHER_RATE)
        vector = target.cores / target.peak(torch.float32)
        terms = (g.output_terms, g.input_terms)
        flops = ((TERM_FLOPS * t + DIVISION_FLOPS) * (t > 0) for t in terms)
        rational = tuple(each * vector for each in flops)
    bandwidth = target.bandwidth_bytes_per_s * target.bandwidth_efficiency
    compute, memory, extra = _best_tile(
        (g.m, g.n, g.k, g.batch),
        target.cores,
        rate,
        moved / bandwidth,
        target.l2_bandwidth_bytes_per_s,
        step,
        rational,
        g.library == "ridgeline" and g.weight_bits is None,
    )
    return compute, memory, fixed + extra


@functools.lru_cache(maxsize=4096)  # a model repeats its layers
def _best_tile(
    shape: tuple[int, int, int, int],
    cores: int,
    rate: float,
    memory_s: float,
    l2_bandwidth: float,
    step: float,
    rational: tuple[float, ...],
    own: bool,
) -> Parts:
    """(compute, memory, extra) seconds of the fastest tile and split.

    rate: FLOP/s of one core with the largest tile; memory_s: with DRAM saturated; rational: seconds
    of a core per element of the output, and of the input; own: of OWN_TILES.
    """
    m, n, k, batch = shape
    share = np.ceil(m / _TM) * np.ceil(n / _TN) * (batch * _SPLIT / cores)
    waves = QUANTIZATION * np.ceil(share) + (1 - QUANTIZATION) * np.maximum(share, 1.0)
    depth = np.ceil(k / _SPLIT / 64) * 64
    compute = waves * (_FLOPS_PER_K * (depth + FILL_K) / rate) + depth / 64 * step
    compute = compute + waves * _TM * (_TN * rational[0] + k * rational[1])
    memory = memory_s / np.minimum(1.0, share / SATURATION)
    extra = _SPLITS * SPLIT_FLOOR + _PARTIAL_BYTES * (batch * m * n / l2_bandwidth)
    # The fourth power and root by squares and square roots, which numpy does much faster.
    total = np.sqrt(np.sqrt(np.square(compute * compute) + np.square(memory * memory))) + extra
    best = int(np.argmin(np.where(_NOT_OWN, np.inf, total) if own else total))
    return float(compute[best]), float(memory[best]), float(extra[best])


def _alignment(g: Gemm) -> float:
    """Matrix units load rows of 16 bytes; other row lengths take a slower path."""
    per_row = 16 // g.dtype.itemsize
    return 1.0 if g.n % per_row == 0 and g.k % per_row == 0 else UNALIGNED


def _attention(a: Attention, target: Target) -> Parts:
    moved = sum(a.bytes.values())
    if not a.batch * a.heads * a.q:
        return 0.0, 0.0, target.launch_s
    group = a.heads // max(a.kv_heads, 1)
    if a.q * group <= QUERY_TILE:  # the queries of one key head share a tile; keys are split
        blocks = a.batch * a.kv_heads * max(1, ceil(a.kv / KEY_TILE))
    else:
        blocks = a.batch * a.heads * ceil(a.q / QUERY_TILE)
    share = blocks / target.cores
    # Tiles are padded to the matrix instruction's 16 rows, and a partial wave leaves cores idle.
    padding = max(1.0, 16 / (a.q * group))
    partial = ATTENTION_QUANTIZATION
    idle = (partial * ceil(share) + (1 - partial) * max(share, 1.0)) / share
    rate = target.peak(a.dtype) * min(target.attention_efficiency, target.gemm_efficiency)
    compute = a.flops * padding * idle / rate
    bandwidth = target.bandwidth_bytes_per_s * target.bandwidth_efficiency
    memory = moved / (bandwidth * min(1.0, share / ATTENTION_SATURATION))
    return compute, memory, target.launch_s + ATTENTION_FLOOR


def _stream(s: Stream, target: Target) -> Parts:
    moved = sum(s.bytes.values())
    if not moved:
        return 0.0, 0.0, target.launch_s
    hits = (L2_NONE - moved / target.l2_bytes) / (L2_NONE - L2_FULL)
    hits = min(1.0, max(0.0, hits))
    efficiency = min(0.95, target.bandwidth_efficiency * ACCESS_EFFICIENCY[s.access])
    slow, fast = target.bandwidth_bytes_per_s, target.l2_bandwidth_bytes_per_s
    memory = moved * (hits / fast + (1 - hits) / slow) / efficiency
    return s.flops / target.peak(torch.float32), memory, target.launch_s


def _norm(n: Norm, target: Target) -> Parts:
    read, written = n.bytes["input"], n.bytes["output"]
    stream = Stream(read, written, n.flops, n.dtype, "reduction")
    compute, memory, fixed = _stream(stream, target)
    twice = n.size > NORM_PERSISTENT[n.library] and n.rows >= target.cores
    again = read if twice else 0.0
    through_l2 = (read + written + again) / target.l2_bandwidth_bytes_per_s
    return compute, smoothmax(memory, through_l2), fixed


def collective_seconds(c: Collective, target: Target) -> float:
    """Ring algorithms: latency + steps · step + bytes on the wire / (link · efficiency)."""
    p = c.ranks
    if p < 2:
        return 0.0
    phases = 2 if c.name == "all_reduce" else 1
    wire = phases * (p - 1) / p * c.payload_bytes
    steps = phases * (p - 1) * COLLECTIVE_STEP
    return COLLECTIVE_LATENCY + steps + wire / (target.link_bytes_per_s * COLLECTIVE_EFFICIENCY)
