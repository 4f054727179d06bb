"""Seconds of a kernel from its shape, as laws whose few constants are fitted.

    t = floor + (t_compute⁴ + t_memory⁴)^¼ + t_extra

gemm, the least over tiles (Tm, Tn) and split-K s, with b products of (m, k) by (k, n):
    share     = ⌈m/Tm⌉ ⌈n/Tn⌉ b s / cores;  waves = q ⌈share⌉ + (1 - q) max(share, 1)
    t_compute = waves · 2 Tm Tn (⌈k/s⌉₆₄ + fill) cores / (peak e_c e(T)) + k/(64 s) · step
    e(T)      = 1 / (1 + loss · 64 (1/Tm + 1/Tn)), relative to that of 256 x 128
    t_memory  = bytes / (bandwidth e_m min(1, share/g));  t_extra: partial sums through L2
attention prefill: 4 b h d pairs FLOPs in tiles of 128 queries;  decode: the keys and values once,
    split over the cores;  window-clamped and causal pairs are counted exactly
stream: bytes / (bandwidth e_m) · (1 + half cores/bytes), the share that L2 holds at L2's
    bandwidth; no faster than the bytes that the cores of an element-wise kernel keep in flight
collective: α + (p - 1) β + wire / (link e),  wire = c (p - 1)/p · bytes

Every argument may be a number or an array that broadcasts; nothing here knows of graphs or files.
Constants are logarithms where they must be positive. Sources: the tile and wave model of cuBLAS
follows NeuSight (Lee et al., ASPLOS 2025) and LLMCompass (Zhang et al., ISCA 2024); collectives
follow Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = Any  # float or an array that broadcasts with the others

_TILES = np.array(
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
_TM, _TN, _SPLIT = _TILES.T
_AREA = 2 * _TM * _TN
_EDGES = 64 * (1 / _TM + 1 / _TN)
_SPLITS = (_SPLIT > 1).astype(np.float64)

# law -> its constants, in the order of the fitted vectors, with where the fit begins
CONSTANTS: Mapping[str, Mapping[str, float]] = {
    "gemm": {
        "floor_us": np.log(2.0), "compute": 0.0, "loss": np.log(0.19), "fill": np.log(100.0),
        "step_us": np.log(0.1), "quantization": 0.0, "memory": 0.0, "saturation": np.log(0.5),
        "split_us": np.log(1.5), "partial": 0.0, "row_us": np.log(0.01),
    },
    "prefill": {
        "floor_us": np.log(8.0), "compute": 0.0, "memory": 0.0, "fill": np.log(100.0),
        "quantization": 0.0, "block_us": np.log(1.0), "batch_us": np.log(0.02), "small": 0.0,
    },
    "decode": {
        "floor_us": np.log(8.0), "memory": 0.0, "saturation": np.log(0.3), "fill": np.log(32.0),
        "block_us": np.log(0.5), "batch_us": np.log(0.02), "key_us": np.log(0.002),
        "l2": np.log(1.5), "split_us": np.log(3.0),
    },
    "stream": {
        "floor_us": np.log(2.0), "memory": 0.0, "half": np.log(20.0), "l2": 0.0,
        "width": 0.0, "narrow": np.log(100.0), "resident": np.log(0.5),
        "core": np.log(20.0),
    },
    "collective": {
        "floor_us": np.log(10.0), "step_us": np.log(1.0), "link": np.log(0.7),
        "half": np.log(0.5), "ranks": 0.0,
    },
}  # fmt: skip


def _ceil(a: Numbers, b: Numbers) -> Numbers:
    return np.ceil(a / b)


def _root4(a: Numbers, b: Numbers) -> Numbers:
    return np.sqrt(np.sqrt(np.square(a * a) + np.square(b * b)))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + np.exp(-x))


def gemm(c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]) -> Numbers:
    """Seconds; s: batch, m, n, k, bytes; arrays need a last axis of one for the tiles."""
    floor, e_c, loss, fill, step, q, e_m, g, split, partial, row = c
    m, n, k, b = s["m"], s["n"], s["k"], s["batch"]
    exp = np.exp((floor, e_c, loss, fill, step, e_m, g, split, partial, row))
    cores, bandwidth = machine["cores"], machine["bandwidth"] * exp[5]
    tile = (1 + exp[2] * _EDGES) / (1 + exp[2] * 64 * (1 / 256 + 1 / 128))
    share = _ceil(m, _TM) * _ceil(n, _TN) * (b * _SPLIT / cores)
    q = _sigmoid(q)
    waves = q * np.ceil(share) + (1 - q) * np.maximum(share, 1.0)
    depth = _ceil(k, _SPLIT * 64) * 64
    rate = machine["peak"] * exp[1] / cores
    compute = waves * (_AREA * tile * (depth + exp[3]) / rate) + depth * (exp[4] * 1e-6 / 64)
    memory = s["bytes"] / (bandwidth * np.minimum(1.0, share / exp[6]))
    extra = _SPLITS * exp[7] * 1e-6
    extra = extra + _SPLITS * _SPLIT * (8.0 * exp[8] / 3 * b * m * n / machine["bandwidth"])
    total = (_root4(compute, memory) + extra).min(-1)
    return total + _last((exp[0] + exp[9] * np.log2(1 + m)) * (machine["slow"] * 1e-6))


def _last(x: Numbers) -> Numbers:
    return x[..., 0] if np.ndim(x) > 1 else x


def pairs(q: Numbers, kv: Numbers, window: Numbers) -> Numbers:
    """(query, key) pairs of causal attention; each query sees at most `window` keys (0: all)."""
    past = kv - q
    w = np.where(np.asarray(window) > 0, window, kv)
    # sum over i < q of min(past + i + 1, w): a ramp up to w, then a plateau
    ramp = np.clip(w - past, 0, q)
    return ramp * past + ramp * (ramp + 1) / 2 + (q - ramp) * np.minimum(w, kv)


def prefill(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> Numbers:
    """Seconds; s: batch, heads, kv_heads, head_dim, q_len, kv_len, window, itemsize."""
    floor, e_c, e_m, fill, q_, block, batch, small = c
    b, h, d, q, kv = s["batch"], s["heads"], s["head_dim"], s["q_len"], s["kv_len"]
    cores = machine["cores"]
    rows = _ceil(q, 128)
    blocks = b * h * rows
    seen = pairs(q, kv, s["window"])
    # A tile of 128 queries runs over whole tiles of keys, and fills and drains once.
    padded = seen + (np.exp(fill) + 64) * rows * 128 / 2
    share = blocks / cores
    wave = _sigmoid(q_)
    idle = (wave * np.ceil(share) + (1 - wave) * np.maximum(share, 1.0)) / share
    # The longest row of tiles bounds a kernel with fewer blocks than cores.
    rate = machine["peak"] * machine["attention"] * np.exp(e_c) * np.minimum(1.0, (d / 128) ** 0.3)
    work = 4.0 * b * h * d * np.minimum(padded, rows * 128 * (kv + 128.0))
    compute = work * idle ** _sigmoid(small) / rate
    moved = 2.0 * b * d * (2 * h * q + 2 * s["kv_heads"] * kv)
    memory = moved / (machine["bandwidth"] * np.exp(e_m))
    tail = np.exp(block) * np.log2(1 + kv / 128) + np.exp(batch) * b
    return (np.exp(floor) + tail) * machine["cycle"] * 1e-6 + _root4(compute, memory)


def decode(c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]) -> Numbers:
    """Seconds; s: batch, heads, kv_heads, head_dim, kv_len, window."""
    floor, e_m, g, fill, block, batch, key, l2, split = c
    b, h, d, kv = s["batch"], s["heads"], s["head_dim"], s["kv_len"]
    kv = np.where(np.asarray(s["window"]) > 0, np.minimum(kv, s["window"]), kv)
    blocks = b * s["kv_heads"] * _ceil(kv, 256)
    share = blocks / machine["cores"]
    moved = 4.0 * b * d * (s["kv_heads"] * (kv + np.exp(fill)) + h)
    busy = np.minimum(1.0, share / np.exp(g))
    hits = np.clip(2 - 2 * moved / machine["l2"], 0, 1)
    speed = machine["bandwidth"] * np.exp(e_m) * (1 + hits * np.exp(l2))
    memory = moved / (speed * busy)
    per_block = np.exp(block) * share
    second = np.exp(split) * (kv > 256)  # partial results of the splits are merged
    fixed = np.exp(floor) + np.exp(batch) * b + np.exp(key) * np.minimum(kv, 4096) / 16 + second
    return fixed * machine["cycle"] * 1e-6 + _root4(memory, per_block * 1e-6)


def stream(c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]) -> Numbers:
    """Seconds; s: rows, width, bytes, scalar (1: a kernel without vector accesses, 0: with)."""
    floor, e_m, half, l2, width, narrow, resident, core = c
    moved, bandwidth = s["bytes"], machine["bandwidth"] * np.exp(e_m)
    hits = np.clip((1.0 - moved / machine["l2"]) / _sigmoid(resident), 0, 1)
    speed = bandwidth * (1 + hits * np.exp(l2))
    ramp = 1 + np.exp(half) * 1024 * machine["cores"] / moved
    # Rows shorter than a block's reach leave lanes idle; longer ones are read again.
    shape = (1 + np.exp(narrow) / 10 / s["width"]) * (1 + s["width"] / 16384) ** width
    # A core keeps so many bytes in flight: bytes in a cycle, whatever the memory could deliver.
    cores = s["scalar"] * moved / (np.exp(core) * machine["cores"] * machine["clock"])
    busy = _root4(moved / speed, cores)
    return np.exp(floor) * machine["slow"] * 1e-6 + busy * (1 + 0.1 * (ramp - 1)) * shape


def collective(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> Numbers:
    """Seconds; s: world, per_node, bytes, phases (2 for all-reduce), wire (share of bytes)."""
    floor, step, link, half, ranks = c
    p = s["world"]
    size = s["bytes"] * s["wire"]
    rate = machine["link"] * np.exp(link) * (p / 2.0) ** ranks
    t0 = np.exp(floor) + np.exp(step) * s["phases"] * (p - 1)
    # Protocols for small messages reach a fraction of the link: a square-root ramp between.
    wire = size / rate
    return t0 * 1e-6 + wire + np.sqrt(wire * np.exp(half) * 1e-6 * t0)


LAWS = {
    "gemm": gemm,
    "prefill": prefill,
    "decode": decode,
    "stream": stream,
    "collective": collective,
}
