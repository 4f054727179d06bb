"""FlashAttention-2 forward on the host CPU, as one TVMScript function.

Law, for query head h of H reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    or cap * tanh(scale * q[i]·k[j] / cap) + mask[i,j]
    z[i,j] excluded unless j <= i + diagonal
    p[i,j] = exp(z[i,j]) / (sum_n exp(z[i,n]) + exp(sinks[h]))      (no sinks: without that term)
    out[i] = sum_j p[i,j] * v[j]                    (a row with every j excluded gives 0)

q [B,H,Sq,D], k [B,Hk,Sk,D], v [B,Hk,Sk,Dv], out [B,H,Sq,Dv]; fp32, bf16 or fp16, last dimension
contiguous, any other strides. Scores, softmax and sums in fp32. Nothing of size Sq x Sk is stored.
Source: Dao, FlashAttention-2, section 3.1.

A vector lane is a query row, so maxima and sums over the keys need no step across lanes. The group
of G = H / Hk query heads that share a key head is one run of rows r = i G + g, so that a key is
read once for all of them. A block of up to 128 rows walks the keys in tiles of 64, copied into one
layout; a sub-block of 64 rows multiplies 4 keys at a time, in 16 accumulators. Where a tile is cut
(by the diagonal, by the end of the rows or of the keys), every 16 rows take just the keys they see.
For each tile, with running maximum m and total l of a row:

    m' = max(m, max_j z[j]),  a = exp(m - m'),  p[j] = exp(z[j] - m')
    l  = a l + sum_j p[j],    o = a o + sum_j p[j] v[j];          at the end, out = o / l

A sink is a key that was seen before the first and has no value: m = sink, l = 1, o = 0. For a
backward, m and log l are put out, in the units of `Spec.natural`; 0 and inf where a row has no key.
Their sum would lose log l beside a mask of finfo.min.
"""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_scores import (
    cap_of,
    factor_of,
    scores,
    sink_score,
    sink_total,
)
from ridgeline.codegen.tvm.attention_tiles import VECTORS, Head, Tiles, copies
from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    LOWEST,
    Spec,
    exponential,
    fma,
    kernel_of,
    lanes,
    multiply_add,
    per_head,
    registers,
    splat,
    statistics,
    tensor,
    vector,
    words,
)

KEYS = 64
"""Keys of a tile: with their values and the scores of 64 rows they stay in the first caches."""

FEW_KEYS = 4
"""Keys that are multiplied at a time, at least."""

SUB_BLOCK = VECTORS * LANES
SUB_BLOCKS = 2
"""Sub-blocks that share one copied tile, at most."""


def build(spec: Spec) -> Any:
    """The kernel for `spec`:
    main(q, k, v, mask, out, scale, diagonal, sub_blocks, units, cap, stats, sinks).

    mask [B,H,Sq,Sk] of any strides, or fp32 [1,1,1,1] where `spec.mask` is None; diagonal between
    -Sq and Sk; sub_blocks: how many sub-blocks a thread takes at once, 1 or `SUB_BLOCKS`; units:
    runs of blocks, which threads take; what they work in is made once for a run; cap: not
    read unless `spec.capped`, where scale is that of the law over the cap; stats fp32 [2,B,H,Sq]
    contiguous, absent unless `spec.saved`; sinks [H], absent unless `spec.sinks` names their dtype.
    """
    depth, dim, pairs, masked = spec.depth, spec.value_dim, spec.pairs, spec.mask is not None
    depth16, dim16 = -(-depth // LANES) * LANES, -(-dim // LANES) * LANES
    value_rows = KEYS // 2 if pairs else KEYS
    # Vectors of rows x keys held in registers: 16 and 8 of 32; 4 where a vector is two registers.
    (wide, wide_keys), narrow_keys = ((1, 4), 4) if spec.isa == "generic" else ((VECTORS, 4), 8)
    loop = T.parallel if spec.parallel else T.serial
    copy = copies(spec)

    def parts(x, row):
        """Vectors that the rows from `row` on fill, of those of a sub-block."""
        return T.max(T.min(VECTORS, (x.rows - row + LANES - 1) // LANES), 0)

    @T.inline
    def score_block(x, w, peak, sub, part, first, j0, nv, nk, cut):
        """s = z for the `nk` keys from `j0` on."""
        z = registers((nk, nv, LANES))
        for j in T.unroll(nk):
            for v in T.unroll(nv):
                z[j, v, lanes(0)] = splat(T.float32(0))
        for d in T.serial(depth):
            for j in T.unroll(nk):
                for v in T.unroll(nv):
                    z[j, v, lanes(0)] = multiply_add(
                        spec,
                        splat(w.kt[j0 + j, d]),
                        w.qt[sub, d, part + v, lanes(0)],
                        z[j, v, lanes(0)],
                    )
        for j in T.unroll(nk):
            for v in T.unroll(nv):
                if masked:
                    bias = T.meta_var(w.bias[j0 + j, part + v, lanes(0)])
                    z[j, v, lanes(0)] = scores(spec, x, z[j, v, lanes(0)], bias)
                else:
                    z[j, v, lanes(0)] = scores(spec, x, z[j, v, lanes(0)])
                if cut:
                    z[j, v, lanes(0)] = T.Select(
                        splat(T.Cast("int32", first + j0 + j)) < w.limit[sub, part + v, lanes(0)],
                        z[j, v, lanes(0)],
                        splat(T.float32(float("-inf"))),
                    )
                w.s[j0 + j, part + v, lanes(0)] = z[j, v, lanes(0)]
                peak[v, lanes(0)] = vector("rl_max", peak[v, lanes(0)], z[j, v, lanes(0)])

    @T.inline
    def score(x, w, peak, sub, part, first, count, nv, nk, cut):
        """s = z for `count` keys and `nv` vectors of rows; peak = m'."""
        for block in T.serial((count + FEW_KEYS - 1) // nk):
            score_block(x, w, peak, sub, part, first, block * nk, nv, nk, cut)
        if (count + FEW_KEYS - 1) % nk >= FEW_KEYS:
            score_block(x, w, peak, sub, part, first, count // nk * nk, nv, FEW_KEYS, cut)

    @T.inline
    def soften(w, peak, alpha, sub, part, count, nv):
        """alpha = a, the total l, and p, rounded as the product with v takes it."""
        added = registers((nv, LANES))
        two = registers((nv, 2, LANES))
        for v in T.unroll(nv):
            before = w.top[sub, part + v, lanes(0)]
            alpha[v, lanes(0)] = exponential(spec, before - peak[v, lanes(0)])
            w.top[sub, part + v, lanes(0)] = peak[v, lanes(0)]
            added[v, lanes(0)] = splat(T.float32(0))
        for j in T.serial(count // 2):
            for v in T.unroll(nv):
                for i in T.unroll(2):
                    z = w.s[2 * j + i, part + v, lanes(0)]
                    two[v, i, lanes(0)] = exponential(spec, z - peak[v, lanes(0)])
                added[v, lanes(0)] = added[v, lanes(0)] + (
                    two[v, 0, lanes(0)] + two[v, 1, lanes(0)]
                )
                if pairs:
                    w.p[j, part + v, lanes(0)] = words(
                        spec, "rl_round_pairs", two[v, 0, lanes(0)], two[v, 1, lanes(0)]
                    )
                else:
                    for i in T.unroll(2):
                        w.p[2 * j + i, part + v, lanes(0)] = two[v, i, lanes(0)]
        for v in T.unroll(nv):
            w.total[sub, part + v, lanes(0)] = fma(
                w.total[sub, part + v, lanes(0)], alpha[v, lanes(0)], added[v, lanes(0)]
            )

    @T.inline
    def weigh(w, alpha, sub, part, count, nv, nd):
        """o = a o + sum_j p[j] v[j], `nd` columns at a time."""
        for block in T.serial(dim // nd):
            acc = registers((nd, nv, LANES))
            for d in T.unroll(nd):
                for v in T.unroll(nv):
                    before = w.o[sub, block * nd + d, part + v, lanes(0)]
                    acc[d, v, lanes(0)] = before * alpha[v, lanes(0)]
            for j in T.serial(count // 2 if pairs else count):
                for d in T.unroll(nd):
                    for v in T.unroll(nv):
                        acc[d, v, lanes(0)] = multiply_add(
                            spec,
                            splat(w.vt[j, block * nd + d]),
                            w.p[j, part + v, lanes(0)],
                            acc[d, v, lanes(0)],
                        )
            for d in T.unroll(nd):
                for v in T.unroll(nv):
                    w.o[sub, block * nd + d, part + v, lanes(0)] = acc[d, v, lanes(0)]

    @T.inline
    def attend(x, w, sub, part, first, count, nv, nk, cut):
        """`nv` vectors of rows take in `count` keys (an even number) of the tile."""
        peak = registers((nv, LANES))
        alpha = registers((nv, LANES))
        for v in T.unroll(nv):
            peak[v, lanes(0)] = w.top[sub, part + v, lanes(0)]
        score(x, w, peak, sub, part, first, count, nv, nk, cut)
        soften(w, peak, alpha, sub, part, count, nv)
        weigh(w, alpha, sub, part, count, nv, nk)

    @T.inline
    def attend_tile(x, w, row, sub, first, diagonal):
        """The 64 rows from `row` on take in the tile that starts at key `first`."""
        if (row + SUB_BLOCK <= x.rows) & (
            first + KEYS <= T.min(x.query(row) + diagonal + 1, x.length)
        ):
            if masked:
                for part in T.serial(VECTORS):
                    copy.mask(x, w, row + part * LANES, part, first, KEYS)
            for part in T.serial(VECTORS // wide):
                attend(x, w, sub, part * wide, first, KEYS, wide, wide_keys, False)
        else:
            for part in T.serial(parts(x, row)):
                start = row + part * LANES
                final = T.min(x.rows, start + LANES) - 1
                seen = T.min(x.query(final) + diagonal + 1, x.length) - first
                count = (T.min(KEYS, seen) + 1) // 2 * 2
                if count > 0:
                    if masked:
                        copy.mask(x, w, start, part, first, count)
                    attend(x, w, sub, part, first, count, 1, narrow_keys, True)

    @T.inline
    def attend_block(x, w, row0, sub_blocks, diagonal):
        """`sub_blocks` x 64 rows from `row0` on, from the first key to the last they see."""
        for sub in T.serial(sub_blocks):
            for part in T.serial(parts(x, row0 + sub * SUB_BLOCK)):
                row = row0 + sub * SUB_BLOCK + part * LANES
                if diagonal < x.length:
                    for lane in T.serial(LANES):
                        seen = x.query(T.min(row + lane, x.rows - 1)) + diagonal + 1
                        w.limit[sub, part, lane] = T.Cast("int32", T.min(seen, x.length))
                else:
                    w.limit[sub, part, lanes(0)] = splat(T.Cast("int32", x.length))
                if spec.sinks is not None:
                    for lane in T.serial(LANES):
                        entry = T.meta_var(x.sink(T.min(row + lane, x.rows - 1)))
                        w.top[sub, part, lane] = sink_score(spec, entry)
                        w.total[sub, part, lane] = sink_total(entry)
                else:
                    w.top[sub, part, lanes(0)] = splat(T.float32(LOWEST))
                    w.total[sub, part, lanes(0)] = splat(T.float32(0))
                for d in T.serial(dim16):
                    w.o[sub, d, part, lanes(0)] = splat(T.float32(0))
                copy.queries(x, w, row, sub, part)
        final = T.min(x.rows, row0 + sub_blocks * SUB_BLOCK) - 1
        end = T.max(T.min(x.query(final) + diagonal + 1, x.length), 0)
        for tile in T.serial((end + KEYS - 1) // KEYS):
            first = tile * KEYS
            copy.keys(x, w, first, T.min(KEYS, end - first + FEW_KEYS - 1))
            for sub in T.serial(sub_blocks):
                attend_tile(x, w, row0 + sub * SUB_BLOCK, sub, first, diagonal)
        for sub in T.serial(sub_blocks):
            for part in T.serial(parts(x, row0 + sub * SUB_BLOCK)):
                copy.store(x, w, row0 + sub * SUB_BLOCK + part * LANES, sub, part)

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        mask_: T.handle,
        out_: T.handle,
        scale: T.float32,
        diagonal: T.int64,
        sub_blocks: T.int64,
        units: T.int64,
        soft_cap: T.float32,
        stats_: T.handle,
        sinks_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, key_heads = T.int64(), T.int64(), T.int64()
        queries, length = T.int64(), T.int64()
        mask_shape = (batch, heads, queries, length) if masked else (T.int64(1),) * 4
        q = tensor(q_, (batch, heads, queries, spec.head_dim), spec.dtype)
        k = tensor(k_, (batch, key_heads, length, spec.head_dim), spec.dtype)
        v = tensor(v_, (batch, key_heads, length, dim), spec.dtype)
        mask = tensor(mask_, mask_shape, spec.mask or "float32", T.int64())
        out = tensor(out_, (batch, heads, queries, dim), spec.dtype)
        shape = T.meta_var((T.int64(2), batch, heads, queries))
        stats = T.meta_var(statistics(stats_, shape, spec.saved))
        sinks = T.meta_var(per_head(sinks_, heads, spec.sinks))
        with T.attr(0, "pragma_import_llvm", spec.helpers):
            group = heads // key_heads
            rows = queries * group
            factor: T.let = factor_of(spec, scale)
            cap: T.let = cap_of(spec, soft_cap)
            blocks = (rows + sub_blocks * SUB_BLOCK - 1) // (sub_blocks * SUB_BLOCK)
            items = batch * key_heads * blocks
            for unit in loop(units):
                qt = T.alloc_buffer((SUB_BLOCKS, depth16, VECTORS, LANES), spec.word)
                kt = T.alloc_buffer((KEYS, depth16), spec.word)
                vt = T.alloc_buffer((value_rows, dim16), spec.word)
                bias = T.alloc_buffer((KEYS, VECTORS, LANES), "float32")
                limit = T.alloc_buffer((SUB_BLOCKS, VECTORS, LANES), "int32")
                s = T.alloc_buffer((KEYS, VECTORS, LANES), "float32")
                p = T.alloc_buffer((value_rows, VECTORS, LANES), spec.word)
                top = T.alloc_buffer((SUB_BLOCKS, VECTORS, LANES), "float32")
                total = T.alloc_buffer((SUB_BLOCKS, VECTORS, LANES), "float32")
                o = T.alloc_buffer((SUB_BLOCKS, dim16, VECTORS, LANES), "float32")
                square = T.alloc_buffer((LANES, LANES), "float32")
                turned = T.alloc_buffer((LANES, LANES), "float32")
                word_square = T.alloc_buffer((LANES, LANES), spec.word)
                zeros = T.alloc_buffer((LANES,), "int32")
                zeros[lanes(0)] = splat(T.int32(0))
                start = unit * items // units
                for turn_ in T.serial((unit + 1) * items // units - start):
                    item = start + turn_
                    b: T.let = item // blocks // key_heads
                    h: T.let = item // blocks % key_heads
                    # Causal work grows with the block: long and short ones alternate, so that any
                    # run of items, which is what a thread gets, has its even share.
                    turn = item % blocks
                    block = T.if_then_else(turn % 2 == 0, turn // 2, blocks - 1 - turn // 2)
                    attend_block(
                        Head(
                            q, k, v, mask, sinks, out, b, h, group, rows, length, factor, cap, stats
                        ),
                        Tiles(
                            qt,
                            kt,
                            vt,
                            bias,
                            limit,
                            s,
                            p,
                            top,
                            total,
                            o,
                            square,
                            turned,
                            word_square,
                            zeros,
                        ),
                        block * sub_blocks * SUB_BLOCK,
                        sub_blocks,
                        diagonal,
                    )

    return kernel_of(main, spec)
