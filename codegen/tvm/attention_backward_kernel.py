"""FlashAttention-2 backward on the host CPU, as one TVMScript function.

Law, for query head h of H reading key/value head h // (H / Hk), with the scores z and the maximum m
and the total l of each row's softmax that the forward kernel left (`attention_kernel`):

    p[i,j]  = exp(z[i,j] - m[i] - log l[i]);  dp[i,j] = do[i]·v[j]
    ds[i,j] = scale p[i,j] (dp[i,j] - delta[i]) c'[i,j],   delta[i] = do[i]·o[i]
    dv[j]   = sum_i p[i,j] do[i];  dk[j] = sum_i ds[i,j] q[i];  dq[i] = sum_j ds[i,j] k[j]

c' = 1, or the slope 1 - tanh² of a soft cap. A row without keys has log l = inf, so p = 0. q, do
[B,H,Sq,D or Dv], k and v [B,Hk,Sk,..], fp32 or bf16, last dimension contiguous, any other strides.
Source: Dao, FlashAttention-2, section 3.1.2. Nothing of size Sq x Sk is stored; five products per
tile of 64 x 64, none of which is computed twice. In bf16, p and ds are rounded for the products,
as the forward rounds p; all sums are fp32.

Here a lane is a key, or a column of the head: products read one operand as 16 lanes and the other
word by word, so that only k and v are ever turned, once per tile of keys. A word (see
`attention_vectors`) is a number, or a pair of bf16: neighbours in a row where the sum is over the
columns, in a column where it is over the rows; what is summed both ways is kept both ways.

What falls short of a tile is worked on in vectors of 16 keys and blocks of 4 rows. A thread takes
key tiles of one key head, walks the rows that see them, and sums dk and dv in the
tile. dq is summed in memory, chunk of key tiles by chunk, each in its own slice: no two threads
meet, and the sums have one order, whatever the threads do.

What an inner loop reads is a `T.let` where it takes divisions: an assignment is a cell in memory,
from which each use would compute it again.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_backward_tiles import KEYS, ROWS, Tiles, copies, products
from ridgeline.codegen.tvm.attention_scores import cap_of, factor_of, tanh
from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    Spec,
    exponential,
    fma,
    lanes,
    mask_number,
    mask_vector,
    registers,
    splat,
    tensor,
    vector,
    words,
)


class _Tensors(NamedTuple):
    """Arguments, and batch, query head and key head that are being worked on."""

    q: Any
    k: Any
    v: Any
    mask: Any
    grad: Any
    out: Any
    stats: Any
    delta: Any
    b: Any
    h: Any
    hk: Any
    queries: Any
    length: Any
    factor: Any
    scale: Any
    cap: Any

    def of(self, g: Any) -> "_Tensors":
        """The same for query head g of those that read the key head."""
        return self._replace(h=self.h + g)


def build(spec: Spec) -> Any:
    """The kernel for `spec`, whose dtype is fp32, or bf16 where words are pairs, without sinks:
    main(q, k, v, mask, do, o, stats, delta, dq, dk, dv, scale, diagonal, cap, units).

    mask, o and stats as the forward takes and leaves them; delta fp32 [C,B,H,Sq], put out, C times
    the same; dq fp32 [C,B,H,Sq,D'], D' = D up to a multiple of 16: C slices, the sum of which is
    dq; dk, dv [B,Hk,Sk,..] of the operands' dtype; these contiguous. cap: not read unless
    `spec.capped`. units: runs of heads, which threads take; what they work in is made once for one.
    """
    dims, masked, pairs = (spec.head_dim, spec.value_dim), spec.mask is not None, spec.pairs
    columns, columns_v = (-(-d // LANES) * LANES for d in dims)
    per_word = 2 if pairs else 1
    depth, depth_v = (d // per_word for d in dims)
    wide_depth, wide_depth_v = (-(-d // LANES) * LANES for d in (depth, depth_v))
    loop = T.parallel if spec.parallel else T.serial
    copy, product = copies(spec), products(spec)
    tall = product.tall

    @T.inline
    def soften(x, w, slice_, i0, j0, m, r, c, limit, p, ds):
        """p and ds of row r and 16 keys from column c on, from the products of row m."""
        z = registers((LANES,))
        slope = registers((LANES,))
        added = registers((LANES,))
        z[lanes(0)] = w.s[m, lanes(c)] * splat(x.factor)
        if spec.capped:
            slope[lanes(0)] = tanh(z[lanes(0)])
            z[lanes(0)] = slope[lanes(0)] * splat(x.cap)
            slope[lanes(0)] = splat(x.scale) * fma(
                splat(T.float32(0)) - slope[lanes(0)], slope[lanes(0)], splat(T.float32(1))
            )
        else:
            slope[lanes(0)] = splat(x.scale)
        if masked:
            if (x.mask.strides[3] == 1) & (j0 + c + LANES <= x.length):
                address = T.address_of(x.mask[x.b, x.h, i0 + r, j0 + c])
                added[lanes(0)] = mask_vector(spec, address)
            else:
                for lane in T.serial(LANES):
                    at = T.min(j0 + c + lane, x.length - 1)
                    added[lane] = mask_number(spec, x.mask[x.b, x.h, i0 + r, at])
            z[lanes(0)] = z[lanes(0)] + added[lanes(0)]
        z[lanes(0)] = z[lanes(0)] - splat(x.stats[0, x.b, x.h, i0 + r])
        z[lanes(0)] = exponential(spec, z[lanes(0)] - splat(x.stats[1, x.b, x.h, i0 + r]))
        p[lanes(0)] = T.Select(lanes(c) < splat(limit), z[lanes(0)], splat(T.float32(0)))
        drop: T.let = w.dp[m, lanes(c)] - splat(x.delta[slice_, x.b, x.h, i0 + r])
        ds[lanes(0)] = T.Select(
            p[lanes(0)] > splat(T.float32(0)),
            p[lanes(0)] * drop * slope[lanes(0)],
            splat(T.float32(0)),
        )

    @T.inline
    def row(x, w, slice_, i0, j0, m, r, c, rows, diagonal, p, ds):
        """The same; zeros for rows beyond the last and keys that none of the 16 lanes sees."""
        limit = T.Cast("int32", T.min(i0 + r + diagonal + 1, x.length) - j0)
        if (c < limit) & (r < rows):
            soften(x, w, slice_, i0, j0, m, r, c, limit, p, ds)
        else:
            p[lanes(0)] = splat(T.float32(0))
            ds[lanes(0)] = splat(T.float32(0))

    @T.inline
    def rounded(x, w, slice_, i0, j0, m, r, c, rows, diagonal):
        """p and ds of two rows as pairs down the columns, ds of each along its row too."""
        p0 = registers((LANES,))
        p1 = registers((LANES,))
        ds0 = registers((LANES,))
        ds1 = registers((LANES,))
        row(x, w, slice_, i0, j0, m, r, c, rows, diagonal, p0, ds0)
        row(x, w, slice_, i0, j0, m + 1, r + 1, c, rows, diagonal, p1, ds1)
        w.p[r // 2, lanes(c)] = words(spec, "rl_round_pairs", p0[lanes(0)], p1[lanes(0)])
        w.ds_down[r // 2, lanes(c)] = words(spec, "rl_round_pairs", ds0[lanes(0)], ds1[lanes(0)])
        w.ds[r, T.ramp(c // 2, 1, 8)] = T.call_extern("int32x8", "rl_round_row", ds0[lanes(0)])
        w.ds[r + 1, T.ramp(c // 2, 1, 8)] = T.call_extern("int32x8", "rl_round_row", ds1[lanes(0)])

    @T.inline
    def kept(x, w, slice_, i0, j0, m, r, c, rows, diagonal):
        """p and ds of a row as they are."""
        p = registers((LANES,))
        ds = registers((LANES,))
        row(x, w, slice_, i0, j0, m, r, c, rows, diagonal, p, ds)
        w.p[r, lanes(c)] = p[lanes(0)]
        w.ds[r, lanes(c)] = ds[lanes(0)]

    @T.inline
    def tile_pair(x, dq, w, slice_, i0, j0, diagonal):
        """All that the rows from i0 on and the keys from j0 on give each other."""
        rows = T.min(ROWS, x.queries - i0)
        copy.along(w.q, x.q, x.b, x.h, i0, rows, depth)
        copy.along(w.do, x.grad, x.b, x.h, i0, rows, depth_v)
        in_blocks = (rows + tall - 1) // tall * tall
        copy.zero(w.q, rows, in_blocks, wide_depth)
        copy.zero(w.do, rows, in_blocks, wide_depth_v)
        if pairs:
            copy.down(w.q_down, w.zeros, x.q, x.b, x.h, i0, rows, spec.head_dim)
            copy.down(w.do_down, w.zeros, x.grad, x.b, x.h, i0, rows, spec.value_dim)
        for block in T.serial((rows + tall - 1) // tall):
            r = block * tall
            seen = T.min(i0 + r + tall + diagonal, x.length) - j0
            last = T.Cast("int32", T.max(0, T.min(KEYS, seen)))
            vectors = (last + LANES - 1) // LANES
            product.scores(w.s, w.q, w.kt, r, vectors, depth)
            product.scores(w.dp, w.do, w.vt, r, vectors, depth_v)
            for n in T.serial(vectors):
                for m in T.serial(tall // per_word):
                    at = m * per_word
                    if pairs:
                        rounded(x, w, slice_, i0, j0, at, r + at, n * LANES, rows, diagonal)
                    else:
                        kept(x, w, slice_, i0, j0, at, r + at, n * LANES, rows, diagonal)
            if last > 0:
                count = (last + per_word - 1) // per_word
                product.into_queries(x, dq, w.ds, w.k, slice_, i0, r, count, columns)
        stop = (rows + per_word - 1) // per_word
        for block in T.serial((T.min(KEYS, x.length - j0) + tall - 1) // tall):
            r = block * tall
            start = T.max(0, j0 + r - diagonal - i0) // per_word
            if start < stop:
                product.into_keys(w.dv, w.p, w.do_down, r, start, stop, columns_v)
                product.into_keys(w.dk, w.ds_down, w.q_down, r, start, stop, columns)

    def eight(sums):
        """Eight sums as they are put out."""
        return sums if spec.dtype == "float32" else T.Cast(f"{spec.dtype}x8", sums)

    @T.inline
    def add_dots(x, acc, row, c, count):
        ours = vector(f"rl_load_{spec.dtype}_{count}", T.address_of(x.grad[x.b, x.h, row, c]))
        theirs = vector(f"rl_load_{spec.dtype}_{count}", T.address_of(x.out[x.b, x.h, row, c]))
        acc[lanes(0)] = fma(ours, theirs, acc[lanes(0)])

    @T.inline
    def prepare(x, dq, slice_):
        """delta of all rows of a query head, and zeros where their dq is summed."""
        for row in T.serial(x.queries):
            for c in T.serial(columns // LANES):
                dq[slice_, x.b, x.h, row, lanes(c * LANES)] = splat(T.float32(0))
            acc = registers((LANES,))
            acc[lanes(0)] = splat(T.float32(0))
            for c in T.serial(spec.value_dim // LANES):
                add_dots(x, acc, row, c * LANES, LANES)
            if spec.value_dim % LANES != 0:
                add_dots(x, acc, row, spec.value_dim // LANES * LANES, spec.value_dim % LANES)
            x.delta[slice_, x.b, x.h, row] = T.call_extern("float32", "rl_hsum", acc[lanes(0)])

    @T.inline
    def key_tile(x, dq, w, slice_, j0, group, diagonal, dk, dv):
        """dk and dv of the keys from j0 on, and their part of dq."""
        count = T.min(KEYS, x.length - j0)
        copy.turned(w.kt, w.square, x.k, x.b, x.hk, j0, count, depth)
        copy.turned(w.vt, w.square, x.v, x.b, x.hk, j0, count, depth_v)
        if pairs:
            copy.down(w.k, w.zeros, x.k, x.b, x.hk, j0, count, spec.head_dim)
        else:
            copy.along(w.k, x.k, x.b, x.hk, j0, count, depth)
        in_blocks = (count + tall - 1) // tall * tall
        copy.clear(w.dk, in_blocks, columns)
        copy.clear(w.dv, in_blocks, columns_v)
        first = T.max(0, j0 - diagonal) // ROWS
        for g in T.serial(group):
            for tile in T.serial((x.queries + ROWS - 1) // ROWS - first):
                tile_pair(x.of(g), dq, w, slice_, (first + tile) * ROWS, j0, diagonal)
        for r in T.serial(count):
            for c in T.serial(spec.head_dim // 8):
                dk[x.b, x.hk, j0 + r, T.ramp(c * 8, 1, 8)] = eight(w.dk[r, T.ramp(c * 8, 1, 8)])
            for c in T.serial(spec.value_dim // 8):
                dv[x.b, x.hk, j0 + r, T.ramp(c * 8, 1, 8)] = eight(w.dv[r, T.ramp(c * 8, 1, 8)])

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        mask_: T.handle,
        grad_: T.handle,
        out_: T.handle,
        stats_: T.handle,
        delta_: T.handle,
        dq_: T.handle,
        dk_: T.handle,
        dv_: T.handle,
        scale: T.float32,
        diagonal: T.int64,
        soft_cap: T.float32,
        units: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, key_heads = T.int64(), T.int64(), T.int64()
        queries, length, chunks = T.int64(), T.int64(), T.int64()
        mask_shape = (batch, heads, queries, length) if masked else (T.int64(1),) * 4
        q = tensor(q_, (batch, heads, queries, dims[0]), spec.dtype)
        k = tensor(k_, (batch, key_heads, length, dims[0]), spec.dtype)
        v = tensor(v_, (batch, key_heads, length, dims[1]), spec.dtype)
        mask = tensor(mask_, mask_shape, spec.mask or "float32", T.int64())
        grad = tensor(grad_, (batch, heads, queries, dims[1]), spec.dtype)
        out = tensor(out_, (batch, heads, queries, dims[1]), spec.dtype)
        stats = T.match_buffer(stats_, (T.int64(2), batch, heads, queries), "float32", align=1)
        delta = T.match_buffer(delta_, (chunks, batch, heads, queries), "float32", align=1)
        dq = T.match_buffer(dq_, (chunks, batch, heads, queries, columns), "float32", align=1)
        dk = T.match_buffer(dk_, (batch, key_heads, length, dims[0]), spec.dtype, align=1)
        dv = T.match_buffer(dv_, (batch, key_heads, length, dims[1]), spec.dtype, align=1)
        with T.attr(0, "pragma_import_llvm", spec.helpers):
            group = heads // key_heads
            factor: T.let = factor_of(spec, scale)
            cap: T.let = cap_of(spec, soft_cap)
            slope: T.let = scale * soft_cap if spec.capped else scale
            tiles = (length + KEYS - 1) // KEYS
            items = batch * key_heads * chunks
            for unit in loop(units):
                qs = T.alloc_buffer((ROWS, wide_depth), spec.word)
                do = T.alloc_buffer((ROWS, wide_depth_v), spec.word)
                square = T.alloc_buffer((LANES, LANES), spec.word)
                kt = T.alloc_buffer((wide_depth, KEYS), spec.word)
                vt = T.alloc_buffer((wide_depth_v, KEYS), spec.word)
                ks = T.alloc_buffer((KEYS // per_word, columns), spec.word)
                s = T.alloc_buffer((tall, KEYS), "float32")
                dp = T.alloc_buffer((tall, KEYS), "float32")
                p = T.alloc_buffer((ROWS // per_word, KEYS), spec.word)
                ds = T.alloc_buffer((ROWS, KEYS // per_word), spec.word)
                dks = T.alloc_buffer((KEYS, columns), "float32")
                dvs = T.alloc_buffer((KEYS, columns_v), "float32")
                zeros = T.alloc_buffer((LANES,), "int32")
                zeros[lanes(0)] = splat(T.int32(0))
                down = T.meta_var(ROWS // 2 if pairs else 1)
                q_down = T.alloc_buffer((down, columns), spec.word)
                do_down = T.alloc_buffer((down, columns_v), spec.word)
                ds_down = T.alloc_buffer((down, KEYS), spec.word)
                w = T.meta_var(
                    Tiles(
                        qs, q_down if pairs else qs, do, do_down if pairs else do, square,
                        ks, kt, vt,
                        s, dp, p, ds, ds_down if pairs else ds, dks, dvs, zeros,
                    )
                )  # fmt: skip
                start = unit * items // units
                for turn in T.serial((unit + 1) * items // units - start):
                    item = start + turn
                    slice_ = item % chunks
                    b: T.let = item // chunks // key_heads
                    hk: T.let = item // chunks % key_heads
                    head: T.let = hk * group
                    x = T.meta_var(
                        _Tensors(
                            q, k, v, mask, grad, out, stats, delta, b, head, hk,
                            queries, length, factor, slope, cap,
                        )
                    )  # fmt: skip
                    for g in T.serial(group):
                        prepare(x.of(g), dq, slice_)
                    # A slice takes every C-th tile: causal work falls with the tile.
                    for tile in T.serial((tiles - slice_ + chunks - 1) // chunks):
                        j0 = (tile * chunks + slice_) * KEYS
                        key_tile(x, dq, w, slice_, j0, group, diagonal, dk, dv)

    return main
