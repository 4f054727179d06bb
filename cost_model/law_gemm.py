"""Seconds of a matrix product, as the least over tiles (Tm, Tn) and split-K s.

b products of (m, k) by (k, n) on C cores; share = ⌈m/Tm⌉ ⌈n/Tn⌉ b s / C thread blocks a core:
    waves     = q ⌈share⌉ + (1 - q) max(share, 1)
    t_clock   = waves · 2 Tm Tn (⌈k/s⌉₆₄ + fill) C / (boost e_c e(T)) + ⌈k/s⌉₆₄/64 · step
    t_power   = 2 b m n k / (sustained e_p): what the board's power allows; idle cores draw none
    t_compute = (t_clock⁴ + t_power⁴)^¼
    e(T)      = 1 / (1 + loss · 64 (1/Tm + 1/Tn)), relative to that of 256 x 128
    t_memory  = bytes ((1 - h)/(bandwidth e_m) + h/(l2 bandwidth e_l2)) / min(1, share/g)
    h         = 1 / (1 + (bytes / (resident · l2))⁴): what a replayed kernel finds in the L2 cache
    t_fixed   = floor + row log₂(1 + m) + split-K's second pass
                + m row_q + m k / (rate_q C clock), a kernel in front that quantizes rows of x
                + m n · unfused bytes / bandwidth, where scales are multiplied after the product
Sources: the tile and wave model follows NeuSight (Lee et al., ASPLOS 2025) and LLMCompass (Zhang et
al., ISCA 2024); the set of tiles is cuBLAS's and CUTLASS's.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ridgeline.cost_model.elementwise import Numbers, log2

TILES = np.array(
    [
        (tm, tn, s)
        for tm, tn in (
            (256, 128), (128, 256), (128, 128), (64, 256), (128, 64), (64, 128),
            (64, 64), (32, 128), (32, 64), (16, 128), (16, 64), (16, 32),
        )
        for s in (1, 2, 4, 8, 16)
    ],
    dtype=np.float64,
)  # fmt: skip
"""Rows, columns and parts of the sum: what a library's kernels may work on at once."""
_TM, _TN, _SPLIT = TILES.T
_PER_TM, _PER_TN, _PER_DEPTH = 1 / _TM, 1 / _TN, 1 / (64 * _SPLIT)
_AREA = 2 * _TM * _TN
_EDGES = 64 * (1 / _TM + 1 / _TN)
_LARGEST_EDGES = 64 * (1 / 256 + 1 / 128)
_SPLITS = (_SPLIT > 1).astype(np.float64)

CONSTANTS = {
    "floor_us": 3.0, "compute": 1.0, "loss": 0.25, "fill": 150.0, "step_us": 0.16,
    "wave_share": 0.45, "memory": 0.95, "saturation": 0.3, "split_us": 2.2, "partial": 0.3,
    "row_us": 0.01, "resident": 0.2, "cache": 1.0, "power": 1.0,
    "quantized_row_ns": 7.0, "quantized": 1.5, "unfused_bytes": 6.0,
}  # fmt: skip


def gemm(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(fixed, compute, memory) seconds of the fastest candidate.

    c: CONSTANTS in order; s: batch, m, n, k, bytes, quantized (1: x is quantized on the way, 0:
    not); arrays need a last axis of one, over which the candidates are laid.
    """
    floor, e_c, loss, fill, step, q, e_m, g, split, partial, row, resident, cache, e_p, *rest = c
    row_q, rate_q, again = rest
    m, n, k, b = s["m"], s["n"], s["k"], s["batch"]
    cores, bandwidth = machine["cores"], machine["bandwidth"]
    moved = s["bytes"]
    share = np.ceil(m * _PER_TM) * np.ceil(n * _PER_TN)
    share = share * (_SPLIT * (b / cores))
    q = q * machine["uneven"]
    waves = q * np.ceil(share) + (1 - q) * np.maximum(share, 1.0)
    depth = np.ceil(k * _PER_DEPTH)
    work = _AREA * ((1 + loss * _EDGES) * (64 / (1 + loss * _LARGEST_EDGES)))
    rate = cores / (machine["boost"] * e_c)
    clocked = waves * work * (depth + fill * machine["prologue"] / 64) * rate
    clocked = clocked + depth * (step * 1e-6 * machine["cycle"] ** 0.5)
    power = 2.0 * b * m * n * k / (machine["peak"] * e_p)
    square = clocked * clocked
    compute = np.sqrt(np.sqrt(square * square + power**4))
    hit = 1 / (1 + (moved / (machine["l2"] * resident)) ** 4)
    streamed = moved * ((1 - hit) / (bandwidth * e_m) + hit / (machine["l2_bandwidth"] * cache))
    memory = streamed / np.minimum(1.0, share / g)
    twice = _SPLITS * (split * 1e-6 * machine["floor"])
    twice = twice + (_SPLITS * _SPLIT) * (8.0 * partial / 3 * b * m * n / bandwidth)
    square_c, square_m = compute * compute, memory * memory
    total = np.sqrt(np.sqrt(square_c * square_c + square_m * square_m)) + twice
    fixed = (floor + row * log2(1 + m)) * (machine["floor"] * 1e-6)
    busy = cores * machine["clock"] * rate_q
    later = machine["unfused"] * n * again / (bandwidth * e_m)
    fixed = fixed + s["quantized"] * b * m * (row_q * 1e-9 + k / busy + later)
    best = total.argmin(-1)
    if best.ndim == 0:
        return float(fixed + twice[best]), float(compute[best]), float(memory[best])
    at = best[:, None]
    chosen = [np.take_along_axis(x, at, -1)[:, 0] for x in (twice, compute, memory)]
    return fixed[:, 0] + chosen[0], chosen[1], chosen[2]
