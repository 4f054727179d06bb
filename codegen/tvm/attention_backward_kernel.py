"""FlashAttention-2 backward on the host CPU, as one TVMScript function.

Law, for query head h of H reading key/value head h // (H / Hk), with the maximum m and
the total l of each row's softmax that the forward kernel left (`attention_kernel`):

    p[i,j]  = exp(z[i,j] - m[i] - log l[i]);  dp[i,j] = do[i]·v[j]
    ds[i,j] = scale p[i,j] (dp[i,j] - delta[i]) c'[i,j],   delta[i] = do[i]·o[i]
    dv[j]   = sum_i p[i,j] do[i];  dk[j] = sum_i ds[i,j] q[i];  dq[i] = sum_j ds[i,j] k[j]

c' = 1, or the slope 1 - tanh² of a soft cap. A row without keys has log l = inf, so p = 0. q, do
and dq [B,H,Sq,D or Dv], k and v [B,Hk,Sk,..], fp32, last dimension contiguous, any other strides.
Source: Dao, FlashAttention-2, section 3.1.2. Nothing of size Sq x Sk is stored; five products per
tile of 64 x 64, none of which is computed twice.

Here a lane is a key, or a column of the head: products read one operand as 16 lanes and the other
number by number, so that only k and v are ever turned, once per tile of keys. A thread takes key
tiles of one key head, walks the rows that see them, and sums dk and dv in the tile. dq is summed in
memory, chunk of key tiles by chunk, each in its own slice: no two threads meet, and the sums have
one order, whatever the threads do.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

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
)

ROWS = KEYS = 64
"""Queries and keys of a tile: with all that is made of it, it fits the second cache."""


class _Tensors(NamedTuple):
    """Arguments, and batch, query head and key head that are being worked on."""

    q: Any
    k: Any
    v: Any
    mask: Any
    grad: Any
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


class _Tiles(NamedTuple):
    """q, do [ROWS, D]; k [KEYS, D]; kt, vt [D, KEYS]; p, ds [ROWS, KEYS]; dk, dv [KEYS, D]."""

    q: Any
    do: Any
    k: Any
    kt: Any
    vt: Any
    p: Any
    ds: Any
    dk: Any
    dv: Any


def build(spec: Spec) -> Any:
    """The kernel for `spec`, whose dtype is fp32 and whose sinks are None:
    main(q, k, v, mask, do, stats, delta, dq, dk, dv, scale, diagonal, cap).

    mask and stats as the forward takes and leaves them; delta fp32 [B,H,Sq] contiguous; dq fp32
    [C,B,H,Sq,D'], D' = D up to a multiple of 16, contiguous and zero: C slices, the sum of which is
    dq; dk, dv fp32 [B,Hk,Sk,..] contiguous. cap: not read unless `spec.capped`.
    """
    depth, dim, masked = spec.head_dim, spec.value_dim, spec.mask is not None
    depth16, dim16 = -(-depth // LANES) * LANES, -(-dim // LANES) * LANES
    # Rows x vectors of sums held in registers; a generic vector is two registers or four.
    tall, wide = (2, 2) if spec.isa == "generic" else (4, 4)
    loop = T.parallel if spec.parallel else T.serial

    @T.inline
    def zero(tile, rows, columns):
        for r in T.serial(rows):
            for c in T.serial(columns // LANES):
                tile[r, lanes(c * LANES)] = splat(T.float32(0))

    @T.inline
    def copy(tile, source, b, h, first, count, columns):
        """`count` rows of [b, h] from `first` on; what is beyond the last is left as it is."""
        for r in T.serial(count):
            for c in T.unroll(columns // LANES):
                tile[r, lanes(c * LANES)] = source[b, h, first + r, lanes(c * LANES)]
            if columns % LANES != 0:
                for c in T.vectorized(8):
                    at = T.meta_var(columns // LANES * LANES + c)
                    tile[r, at] = source[b, h, first + r, at]

    @T.inline
    def turn(tile, source, b, h, first, count, columns):
        """The same, turned: tile[c, r]."""
        for r in T.serial(count):
            for c in T.serial(columns):
                tile[c, r] = source[b, h, first + r, c]

    @T.inline
    def outer(out, left, right, r, c, start, stop, nv):
        """out[r.., c..] += sum over i of left[i, r..] right[i, c..]."""
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                acc[m, n, lanes(0)] = out[r + m, lanes(c + n * LANES)]
        for i in T.serial(stop - start):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = fma(
                        splat(left[start + i, r + m]),
                        right[start + i, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                out[r + m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def inner(out, left, right, r, c, count, nv):
        """out[r.., c..] = sum over i of left[r.., i] right[i, c..]."""
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                acc[m, n, lanes(0)] = splat(T.float32(0))
        for i in T.serial(count):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = fma(
                        splat(left[r + m, i]),
                        right[i, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                out[r + m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def soften(x, w, i0, j0, r, n, limit):
        """p and ds of 16 keys of row r; `ds` held the products with k, `p` those with v."""
        z = registers((LANES,))
        slope = registers((LANES,))
        added = registers((LANES,))
        c = T.meta_var(n * LANES)
        z[lanes(0)] = w.ds[r, lanes(c)] * splat(x.factor)
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
        z[lanes(0)] = T.Select(
            lanes(c) < splat(limit),
            z[lanes(0)],
            splat(T.float32(0)),
        )
        drop = w.p[r, lanes(c)] - splat(x.delta[x.b, x.h, i0 + r])
        w.ds[r, lanes(c)] = T.Select(
            z[lanes(0)] > splat(T.float32(0)),
            z[lanes(0)] * drop * slope[lanes(0)],
            splat(T.float32(0)),
        )
        w.p[r, lanes(c)] = z[lanes(0)]

    @T.inline
    def into_rows(x, dq, w, slice_, i0, r, c, count, nv):
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                row = T.min(i0 + r + m, x.queries - 1)
                acc[m, n, lanes(0)] = dq[slice_, x.b, x.h, row, lanes(c + n * LANES)]
        for j in T.serial(count):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = fma(
                        splat(w.ds[r + m, j]),
                        w.k[j, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            if i0 + r + m < x.queries:
                for n in T.unroll(nv):
                    dq[slice_, x.b, x.h, i0 + r + m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def add_queries(x, dq, w, slice_, i0, j0, r, last):
        """dq += ds k, for `tall` rows."""
        for c in T.serial(depth16 // LANES // wide):
            into_rows(x, dq, w, slice_, i0, r, c * wide * LANES, last, wide)
        for c in T.serial(depth16 // LANES % wide):
            at = T.meta_var((depth16 // LANES // wide * wide + c) * LANES)
            into_rows(x, dq, w, slice_, i0, r, at, last, 1)

    @T.inline
    def add_keys(out, left, right, r, start, stop, columns):
        for c in T.serial(columns // LANES // wide):
            outer(out, left, right, r, c * wide * LANES, start, stop, wide)
        for c in T.serial(columns // LANES % wide):
            at = T.meta_var((columns // LANES // wide * wide + c) * LANES)
            outer(out, left, right, r, at, start, stop, 1)

    @T.inline
    def tile_pair(x, dq, w, slice_, i0, j0, diagonal):
        """All that the rows from i0 on and the keys from j0 on give each other."""
        rows = T.min(ROWS, x.queries - i0)
        copy(w.q, x.q, x.b, x.h, i0, rows, depth)
        copy(w.do, x.grad, x.b, x.h, i0, rows, dim)
        for block in T.serial((rows + tall - 1) // tall):
            r = block * tall
            seen = T.min(i0 + r + tall + diagonal, x.length) - j0
            last = T.Cast("int32", T.max(0, T.min(KEYS, seen)))
            for c in T.serial(KEYS // LANES // wide):
                if c * wide * LANES < last:
                    inner(w.ds, w.q, w.kt, r, c * wide * LANES, depth, wide)
                    inner(w.p, w.do, w.vt, r, c * wide * LANES, dim, wide)
            for m in T.serial(tall):
                limit = T.Cast("int32", T.min(i0 + r + m + diagonal + 1, x.length) - j0)
                for n in T.serial(KEYS // LANES):
                    if (n * LANES < limit) & (r + m < rows):
                        soften(x, w, i0, j0, r + m, n, limit)
                    else:
                        w.p[r + m, lanes(n * LANES)] = splat(T.float32(0))
                        w.ds[r + m, lanes(n * LANES)] = splat(T.float32(0))
            if last > 0:
                add_queries(x, dq, w, slice_, i0, j0, r, last)
        for block in T.serial(KEYS // tall):
            r = block * tall
            start = T.max(0, j0 + r - diagonal - i0)
            if (start < rows) & (j0 + r < x.length):
                add_keys(w.dv, w.p, w.do, r, start, rows, dim16)
                add_keys(w.dk, w.ds, w.q, r, start, rows, depth16)

    @T.inline
    def key_tile(x, dq, w, slice_, j0, group, diagonal, dk, dv):
        """dk and dv of the keys from j0 on, and their part of dq."""
        count = T.min(KEYS, x.length - j0)
        zero(w.k, KEYS, depth16)
        zero(w.kt, depth, KEYS)
        zero(w.vt, dim, KEYS)
        copy(w.k, x.k, x.b, x.hk, j0, count, depth)
        turn(w.kt, x.k, x.b, x.hk, j0, count, depth)
        turn(w.vt, x.v, x.b, x.hk, j0, count, dim)
        zero(w.dk, KEYS, depth16)
        zero(w.dv, KEYS, dim16)
        first = T.max(0, j0 - diagonal) // ROWS
        for g in T.serial(group):
            for tile in T.serial((x.queries + ROWS - 1) // ROWS - first):
                tile_pair(x.of(g), dq, w, slice_, (first + tile) * ROWS, j0, diagonal)
        for r in T.serial(count):
            for c in T.serial(depth // 8):
                dk[x.b, x.hk, j0 + r, T.ramp(c * 8, 1, 8)] = w.dk[r, T.ramp(c * 8, 1, 8)]
            for c in T.serial(dim // 8):
                dv[x.b, x.hk, j0 + r, T.ramp(c * 8, 1, 8)] = w.dv[r, T.ramp(c * 8, 1, 8)]

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        mask_: T.handle,
        grad_: T.handle,
        stats_: T.handle,
        delta_: T.handle,
        dq_: T.handle,
        dk_: T.handle,
        dv_: T.handle,
        scale: T.float32,
        diagonal: T.int64,
        soft_cap: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, key_heads = T.int64(), T.int64(), T.int64()
        queries, length, chunks = T.int64(), T.int64(), T.int64()
        mask_shape = (batch, heads, queries, length) if masked else (T.int64(1),) * 4
        q = tensor(q_, (batch, heads, queries, depth), "float32")
        k = tensor(k_, (batch, key_heads, length, depth), "float32")
        v = tensor(v_, (batch, key_heads, length, dim), "float32")
        mask = tensor(mask_, mask_shape, spec.mask or "float32", T.int64())
        grad = tensor(grad_, (batch, heads, queries, dim), "float32")
        stats = T.match_buffer(stats_, (T.int64(2), batch, heads, queries), "float32", align=1)
        delta = T.match_buffer(delta_, (batch, heads, queries), "float32", align=1)
        dq = T.match_buffer(dq_, (chunks, batch, heads, queries, depth16), "float32", align=1)
        dk = T.match_buffer(dk_, (batch, key_heads, length, depth), "float32", align=1)
        dv = T.match_buffer(dv_, (batch, key_heads, length, dim), "float32", align=1)
        with T.attr(0, "pragma_import_llvm", spec.helpers):
            group = heads // key_heads
            factor = factor_of(spec, scale)
            cap = cap_of(spec, soft_cap)
            slope = scale * soft_cap if spec.capped else scale
            tiles = (length + KEYS - 1) // KEYS
            for item in loop(batch * key_heads * chunks):
                qs = T.alloc_buffer((ROWS, depth16), "float32")
                do = T.alloc_buffer((ROWS, dim16), "float32")
                ks = T.alloc_buffer((KEYS, depth16), "float32")
                kt = T.alloc_buffer((depth, KEYS), "float32")
                vt = T.alloc_buffer((dim, KEYS), "float32")
                p = T.alloc_buffer((ROWS, KEYS), "float32")
                ds = T.alloc_buffer((ROWS, KEYS), "float32")
                dks = T.alloc_buffer((KEYS, depth16), "float32")
                dvs = T.alloc_buffer((KEYS, dim16), "float32")
                b = T.meta_var(item // chunks // key_heads)
                hk = T.meta_var(item // chunks % key_heads)
                slice_ = item % chunks

                x = T.meta_var(
                    _Tensors(
                        q, k, v, mask, grad, stats, delta, b, hk * group, hk,
                        queries, length, factor, slope, cap,
                    )
                )  # fmt: skip
                w = T.meta_var(_Tiles(qs, do, ks, kt, vt, p, ds, dks, dvs))
                zero(qs, ROWS, depth16)
                zero(do, ROWS, dim16)
                # A thread's chunks are every C-th tile: causal work falls with the tile.
                for turn_ in T.serial((tiles - slice_ + chunks - 1) // chunks):
                    j0 = (turn_ * chunks + slice_) * KEYS
                    key_tile(x, dq, w, slice_, j0, group, diagonal, dk, dv)

    return main
