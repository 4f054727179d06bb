"""Seconds of a matrix product, as the least over tiles (Tm, Tn) and split-K s.

b products of (m, k) by (k, n) on C cores; share = ⌈m/Tm⌉ ⌈n/Tn⌉ b s / C thread blocks a core:
    waves     = q ⌈share⌉ + (1 - q) max(share, 1)
    t_clock   = ⌈k/s⌉₆₄/64 · (pace⁴ + step⁴)^¼ + fill/64 · pace: units or loads pace the loop;
                pace + step where each step also unpacks weights
    pace      = waves · 2 Tm Tn 64 C / (boost e_c e(T)) seconds for 64 of the depth
    t_power   = 2 b m n k / (sustained e_p): what the board's power allows; idle cores draw none
    t_compute = (t_clock⁸ + t_power⁸)^⅛ + stored · the time of y's bytes: a tile is written after
                its products
    e(T)      = 1 / (1 + loss · 64 (1/Tm + 1/Tn)), relative to that of 256 x 128
    t_memory  = t / min(1, share/g) + √(t ramp): loads in flight while the queues fill
    t         = bytes ((1 - h)/(bandwidth e_m) + h/(l2 bandwidth e_l2))
    h         = 1 / (1 + (reuse / (resident · l2))⁸): what a replayed kernel finds in the L2 cache;
                reuse: bytes touched since, of x and y a call's, of w also those of all copies of w
                that a harness takes in turns
    t_fixed   = floor + row log₂(1 + m) + split-K's second pass, but for kernels of few rows
                + m row_q + m k / (rate_q C clock), a kernel in front that quantizes rows of x
                + m n · unfused bytes / bandwidth, where scales are multiplied after the product
Matrix units that read shared memory by themselves (Hopper's, B200's) come with kernels whose tiles
have any multiple of 8 columns: among the candidates are those that just fill one or two waves.
Sources: the tile and wave model follows NeuSight (Lee et al., ASPLOS 2025) and LLMCompass (Zhang et
al., ISCA 2024); the set of tiles is cuBLAS's and CUTLASS's.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from ridgeline.cost_model.elementwise import Numbers, log2, sharp

_LARGE = ((256, 128), (128, 256), (128, 128))
_SMALL = (
    (64, 256), (128, 64), (64, 128), (64, 64), (32, 128), (32, 64), (16, 128), (16, 64), (16, 32),
)  # fmt: skip
TILES = np.array(
    [(*tile, parts) for tile in _LARGE for parts in (1, 2, 3, 4, 5, 6, 8, 16)]
    + [(*tile, parts) for tile in _SMALL for parts in (1, 2, 4, 8, 16)],
    dtype=np.float64,
)
"""Rows, columns and parts of the sum: what a library's kernels may work on at once."""
_FITTED = np.array(
    [(tm, 0, s, w) for tm in (64, 128, 192, 256) for s in (1, 2, 4) for w in (1, 2)], np.float64
)
"""Rows, no columns, parts and waves of tiles that are as wide as just fills so many waves."""
_WAVES_PER_PART = _FITTED[:, 3] / _FITTED[:, 2]
_WIDEST = np.minimum(256.0, 40960 // _FITTED[:, 0] // 8 * 8)  # an accumulator's numbers, at most
_NONE = 1e-3  # columns of a tile that is no candidate: none is slower
_WITHIN = 0.15  # of a second pass over parts, where a block adds them up
_NEVER = 1.0  # second that splitting takes where kernels don't
_ONE = np.array(1.0)
_LARGEST_EDGES = 64 * (1 / 256 + 1 / 128)


def _table(tiles: np.ndarray) -> tuple[np.ndarray, ...]:
    tm, tn, split = tiles.T
    several = (split > 1).astype(np.float64)
    per_tn = 1 / np.maximum(tn, 1.0)
    return tm, tn, split, 1 / tm, per_tn, 1 / (64 * split), several, several * split


_FIXED, _ALL = _table(TILES), _table(np.concatenate([TILES, _FITTED[:, :3]]))

CONSTANTS = {
    "floor_us": 2.8, "compute": 0.97, "loss": 0.7, "fill": 135.0, "step_us": 0.29,
    "wave_share": 0.9, "memory": 1.0, "saturation": 0.28, "split_us": 2.2, "partial": 0.6,
    "row_us": 0.01, "resident": 0.95, "cache": 1.05, "power": 0.95,
    "quantized_row_ns": 7.0, "quantized": 1.5, "unfused_bytes": 6.0, "copies": 5.5,
    "stored_share": 0.34, "ramp_us": 0.22,
}  # fmt: skip


def gemm(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(fixed, compute, memory) seconds of the fastest candidate.

    c: CONSTANTS in order; s: batch, m, n, k, bytes, weights and written (of them, those of w and
    of y), quantized (1: x is quantized on the way, 0: not), whole (1: the sum over k is never
    split), serial (1: a step of the loop waits for its chain of instructions); arrays need a last
    axis of one, over which the candidates are laid.
    """
    floor, e_c, loss, fill, step, q, e_m, g, split, partial, row, resident, cache, e_p, *rest = c
    row_q, rate_q, again, copies, stored, ramp = rest
    m, n, k, b = s["m"], s["n"], s["k"], s["batch"]
    cores, bandwidth = machine["cores"], machine["bandwidth"]
    moved = s["bytes"]
    fine = machine["fine"]
    table = _ALL if (fine if isinstance(fine, float) else fine.max()) > 0 else _FIXED
    tm, tn, parts, per_tm, per_tn, per_depth, several, written = table
    # numpy converts a Python number in each operation, which takes as long as the operation does.
    down = np.ceil(np.asarray(m) * per_tm)
    # With the machine's share of its rate
    rate = 2 * 64 / (1 + loss * _LARGEST_EDGES) * cores / (machine["boost"] * e_c)
    if table is _ALL:
        tn = _columns(tn, down, n, b, machine)
        per_tn = 1 / tn
        work = _work(tm, tn, loss, rate)
    else:
        work = _fixed_work(loss, rate) if isinstance(rate, float) else _work(tm, tn, loss, rate)
    share = down * np.ceil(np.asarray(n) * per_tn) * (parts * np.asarray(b / cores))
    waves = np.asarray(q) * np.ceil(share) + np.asarray(1 - q) * np.maximum(share, _ONE)
    pace = waves * work
    chain, serial = step * 1e-6 * machine["chain"], s["serial"]
    loads = chain * (1 - serial)
    each = np.sqrt(np.hypot(pace * pace, np.asarray(loads * loads))) + np.asarray(chain * serial)
    filling = np.asarray(fill * machine["prologue"] / 64)
    clocked = np.ceil(np.asarray(k) * per_depth) * each + pace * filling
    slow, fast = bandwidth * e_m, machine["l2_bandwidth"] * cache
    weights = s["weights"]
    kept = machine["l2"] * resident
    warm = 1 / (1 + (moved / kept) ** 8)
    hit = 1 / (1 + ((moved + (copies - 1) * weights) / kept) ** 8)
    of_weights = weights * ((1 - hit) / slow + hit / fast)
    of_others = (1 - warm) / slow + warm / fast
    streamed = of_weights + (moved - weights) * of_others
    filled = (streamed * (ramp * 1e-6 * machine["floor"])) ** 0.5
    unfilled = np.asarray(streamed * g) / share
    memory = np.maximum(np.asarray(streamed), unfilled) + np.asarray(filled)
    power = 2.0 * b * m * n * k / (machine["peak"] * e_p)
    compute = sharp(clocked, power) + np.asarray(stored * s["written"] * of_others)
    # Libraries have kernels of vectors for one row, where weights are unpacked for four, which add
    # up within a block.
    many = (m > 1 + 3 * serial) * 1.0
    second = many + (1 - many) * _WITHIN * serial
    twice = several * np.asarray(split * 1e-6 * machine["floor"] * second + _NEVER * s["whole"])
    twice = twice + written * np.asarray(8.0 * partial / 3 * b * m * n / bandwidth)
    total = np.sqrt(np.hypot(compute * compute, memory * memory)) + twice
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


def _work(tm: np.ndarray, tn: np.ndarray, loss: Numbers, rate: Numbers) -> np.ndarray:
    """Tm Tn / e(T), times `rate`."""
    return tm * tn * rate + (tm + tn) * (64 * loss * rate)


@functools.lru_cache(maxsize=256)  # a machine asks for the same tiles in every call
def _fixed_work(loss: float, rate: float) -> np.ndarray:
    return _work(_FIXED[0], _FIXED[1], loss, rate)


def _columns(
    tn: np.ndarray, down: np.ndarray, n: Numbers, b: Numbers, machine: Mapping[str, Numbers]
) -> np.ndarray:
    """Columns of every candidate's tile; tn: of the fixed ones, and zeros; down: rows of tiles."""
    fixed = len(TILES)
    per_wave = machine["cores"] / b
    across = np.floor(_WAVES_PER_PART * per_wave / down[..., fixed:])
    fitted = np.ceil(n / 8 / np.maximum(across, 1.0)) * 8
    possible = (across >= 1) & (fitted <= _WIDEST) & (machine["fine"] > 0)
    fitted = np.where(possible, fitted, _NONE)
    if fitted.ndim == 1:
        return np.concatenate([tn[:fixed], fitted])
    return np.concatenate([np.broadcast_to(tn[:fixed], (len(fitted), fixed)), fitted], -1)
