"""Seconds of attention: a prefill over tiles of 128 queries, a decode over splits of the keys.

prefill, with b h ⌈q/128⌉ thread blocks (b h_kv ⌈q h/h_kv/128⌉ where kernels pack a group's queries
into one tile) on C cores, share = blocks/C:
    u         = 128 · 4 d C (1 + v r 128/d) / (boost e_c) seconds a key of one tile: exponentials
                take the same time whatever the head's width, products of matrices don't;
                r: the tensor cores' peak over the vector units', an A100's being 1
    t_clock   = largest of  share' (block + mean keys · u)  and  block + most keys · u · alone
    share'    = w ⌈share⌉ + (1 - w) max(share, 1); keys: those of the mask, by whole tiles
    t_write   = the new keys and values into their pages, read and written, by a kernel that has a
                block of min(h_kv d, 512) threads for each token: those that a core holds at once
                take a chain of loads
    t_power   = 4 b h d pairs / (sustained attention FLOP/s e_p)
    t_compute = (t_clock⁸ + t_power⁸)^⅛
    t_fixed   = floor, and where kernels pack, a launch that plans their tiles; of a chunk (q < kv),
                which was measured as the kernel alone, a launch, and no t_write; its keys are split
                over idle cores where kernels pack, as FlashAttention-2's do for a single query, and
                merged by another launch
decode, with b h_kv (1 if heads are packed) blocks, each over kv/splits keys:
    splits    = min(⌈kv/128⌉, 2 C/blocks, √(kv key/part)), the last where a chain of loads and the
                merging take the least; 1 where every head has keys of its own
    t_compute = kv/splits · key: a core's chain of loads
    t_memory  = root of squares of (⌈share⌉ - 1) block √(d/128) and of K and V once, by whole pages
                of 16 keys, from DRAM or, where they fit, from L2
    t_fixed   = floor + (splits > 1) merge + splits · part + a copy of the queries
Sources: FlashAttention-2 (Dao, 2023), Flash-Decoding (Dao et al., 2023) and their launch code,
which copies the queries of grouped heads when there are several sequences and several key heads.
"""

from collections.abc import Mapping, Sequence

from ridgeline.cost_model.elementwise import (
    Numbers,
    ceil,
    choose,
    floor,
    largest,
    least,
    root4,
    sharp,
)

PREFILL = {
    "floor_us": 10.0, "compute": 0.97, "power": 1.02, "memory": 1.0, "block_us": 3.0,
    "wave_share": 0.5, "vector": 0.5, "copy_us": 5.0, "batch_us": 0.02, "resident": 1.0,
    "cache": 1.0, "write": 1.0, "alone": 0.7, "bare_us": 2.4, "token_us": 3.5,
    "plan_us": 2.4,
}  # fmt: skip
DECODE = {
    "floor_us": 11.0, "memory": 1.0, "block_us": 3.5, "key_us": 0.02, "merge_us": 4.0,
    "part_us": 0.15, "copy_us": 5.0, "grouped_us": 1.5, "resident": 1.0, "cache": 1.0,
    "batch_us": 0.005,
}  # fmt: skip
_TILE = 128
_LEAST_SPLIT = 512  # keys of a block for which a merge is worth its launch


def pairs(q: Numbers, kv: Numbers, window: Numbers) -> Numbers:
    """(query, key) pairs of causal attention; each query sees at most `window` keys (0: all)."""
    past = kv - q
    w = choose(window > 0, window, kv)
    # sum over i < q of min(past + i + 1, w): a ramp up to w, then a plateau
    ramp = least(largest(w - past, 0), q)
    return ramp * past + ramp * (ramp + 1) / 2 + (q - ramp) * least(w, kv)


def _streamed(
    moved: Numbers, machine: Mapping[str, Numbers], e_m: float, resident: float, cache: float
) -> Numbers:
    hit = 1 / (1 + (moved / (machine["l2"] * resident)) ** 8)
    slow, fast = machine["bandwidth"] * e_m, machine["l2_bandwidth"] * cache
    return moved * ((1 - hit) / slow + hit / largest(fast, slow))


def _copied(machine: Mapping[str, Numbers], s: Mapping[str, Numbers]) -> Numbers:
    """1.0 where the launch code copies queries and output of grouped heads."""
    h, kh = s["heads"], s["kv_heads"]
    return machine["copies"] * ((s["batch"] > 1) & (kh > 1) & (kh < h))


def prefill(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(fixed, compute, memory) seconds.

    c: PREFILL in order; s: batch, heads, kv_heads, head_dim, q_len, kv_len, window, itemsize, pairs
    (of a head, that the mask keeps).
    """
    empty, e_c, e_p, e_m, block, wave, v, copy, per_batch, resident, cache, write, *rest = c
    alone, bare, token, plan = rest
    b, h, d, q, kv = s["batch"], s["heads"], s["head_dim"], s["q_len"], s["kv_len"]
    cores, kh = machine["cores"], s["kv_heads"]
    packed = choose(q > 1, machine["packed"], 1.0)
    blocks = b * (packed * kh * ceil(q * h / kh / _TILE) + (1 - packed) * h * ceil(q / _TILE))
    chunk = (q < kv) * 1.0
    windowed = (s["window"] > 0) * (s["window"] < kv) * 1.0
    wide = choose(windowed > 0, least(s["window"] + 2 * _TILE, kv), kv)
    seen = s["pairs"]
    # Tiles on the diagonal and on the window's edge are computed whole; while they are masked, the
    # exponentials don't hide behind the products: half as long again.
    queries = _TILE / (packed * h / kh + 1 - packed)  # of one tile, if q has as many
    edges = queries + 0.5 * least(s["window"] + 160.0, 288.0)
    mean = seen / q + 32.0 + windowed * edges
    narrow = 128.0 / d
    u = 4.0 * _TILE * d * cores * (1 + v * machine["vector"] * narrow) / (machine["boost"] * e_c)
    start = block * 1e-6 * machine["cycle"] ** 0.5

    def of_parts(splits: Numbers) -> Numbers:
        share = blocks * splits / cores
        busy = wave * ceil(share) + (1 - wave) * largest(share, 1.0)
        return root4(busy * (start + mean / splits * u), start + wide / splits * u * alone)

    # More parts with more keys, as smoothly as over all lengths of a tile; and only where it pays.
    most = largest(least(floor(cores / blocks), mean / _LEAST_SPLIT), 1.0)
    whole, apart = of_parts(1.0), of_parts(most)
    merged = bare * machine["merge"] * 1e-6
    split = chunk * packed * (apart + merged < whole)
    clocked = split * apart + (1 - split) * whole
    x = machine["attention"]
    sustained = machine["attention_peak"] * e_p / (x + (1 - x) * narrow)
    compute = sharp(clocked, 4.0 * b * h * d * seen / sustained)
    kept = choose(windowed > 0, least(kv, q + s["window"]), kv)
    moved = 2.0 * s["itemsize"] * b * d * (h * q + kh * kept)
    memory = _streamed(moved, machine, e_m, resident, cache)
    written = _streamed(4.0 * s["itemsize"] * b * d * kh * q, machine, write, resident, cache)
    threads = b * q * least(kh * d, 512.0) / (machine["threads"] * cores)
    written = (written * written + (threads * token * 1e-6 * machine["cycle"]) ** 2) ** 0.5
    written = written * (1 - chunk)
    single = _copied(machine, s) * (q == 1) * (1 - chunk)
    # FlashAttention-3 and after plan their tiles by a kernel of its own.
    planned = empty * machine["slow"] + plan * machine["packed"]
    fixed = chunk * bare * machine["slow"] + (1 - chunk) * planned
    fixed = fixed + copy * single * machine["slow"] + per_batch * b
    return fixed * 1e-6 + split * merged, compute + written, memory + written


def decode(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(fixed, compute, memory) seconds.

    c: DECODE in order; s: batch, heads, kv_heads, head_dim, kv_len, window, itemsize.
    """
    empty, e_m, block, key, merge, part, copy, grouped, resident, cache, per_batch = c
    b, h, d, kv, kh = s["batch"], s["heads"], s["head_dim"], s["kv_len"], s["kv_heads"]
    kv = choose(s["window"] > 0, least(kv, s["window"]), kv)
    kv = ceil(kv / 16) * 16
    cores = machine["cores"]
    blocks = b * kh
    share = blocks / cores
    shared = (kh < h) * 1.0
    most = largest(least(ceil(kv / 128), floor(2 * cores / blocks)), 1.0)
    chain = kv * (d / 128.0) * machine["key"] * key
    best = (chain / (part * machine["slow"])) ** 0.5
    splits = choose(shared > 0, largest(least(most, best), 1.0), 1.0)
    serial = chain / splits
    moved = 2.0 * s["itemsize"] * b * d * (kh * kv + h)
    start = block * 1e-6 * machine["start"] * (d / 128.0) ** 0.5
    later = (ceil(share) - 1) * start
    memory = (_streamed(moved, machine, e_m, resident, cache) ** 2 + later * later) ** 0.5
    several = (splits > 1) * 1.0
    fixed = (
        empty
        + shared * grouped * machine["copies"]
        + several * (merge * machine["merge"] + part * splits)
    )
    fixed = (fixed + copy * _copied(machine, s)) * machine["slow"] + per_batch * b
    return fixed * 1e-6, serial * 1e-6, memory
