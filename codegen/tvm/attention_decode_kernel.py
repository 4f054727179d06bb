"""Attention of few query rows over many keys (decoding) on the host CPU, as one TVMScript function.

Law, for query head h of H reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    or cap * tanh(scale * q[i]·k[j] / cap) + mask[i,j]
    z[i,j] excluded unless j <= i + diagonal
    p[i,j] = exp(z[i,j]) / (sum_n exp(z[i,n]) + exp(sinks[h]))      (no sinks: without that term)
    out[i] = sum_j p[i,j] * v[j]                    (a row with every j excluded gives 0)

q [B,H,Sq,D], k [B,Hk,Sk,D], v [B,Hk,Sk,Dv], out [B,H,Sq,Dv]; fp32, bf16 or fp16, last dimension
contiguous, any other strides. Scores, softmax and sums in fp32.

The time is that of reading the keys and values, so they are read where they lie, once, for all
query heads of their group: a vector lane is a position in the head, and the sums over it are formed
for 16 keys together. The keys are cut into parts of about 256, which depends on Sk alone, so the
result depends neither on the batch nor on the number of threads. Part n leaves, for each row,

    m_n = max_j z[j],   l_n = sum_j exp(z[j] - m_n),   o_n = sum_j exp(z[j] - m_n) v[j]

    out = sum_n w_n o_n / sum_n w_n l_n,               w_n = exp(m_n - max_n m_n)

A sink is a key without a value that the first part has seen: it starts from m = sink, l = 1, o = 0.

Source: Dao, FlashAttention-2, section 3.1; Flash-Decoding for the parts.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_scores import (
    cap_of,
    factor_of,
    scores,
    sink_score,
    sink_total,
)
from ridgeline.codegen.tvm.attention_tiles import Head
from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    LOWEST,
    Spec,
    exponential,
    fma,
    kernel_of,
    lanes,
    load,
    mask_number,
    mask_vector,
    multiply_add,
    per_head,
    registers,
    splat,
    tensor,
    vector,
    words,
)

KEYS = 64
"""Keys whose scores are formed before their values are read."""

PART = 256
"""Keys of a part, at most: enough to make adding the parts cheap, few enough to share out."""

SHARED_ROWS = 3
"""Rows that share one reading of the values: 3 rows x 4 vectors of sums fit the registers."""


class State(NamedTuple):
    """qw: the query rows as words; s, p, alpha: scores, probabilities and rescaling of one tile;
    top, total, o: m_n, l_n (per lane) and o_n of every part, which `item` selects."""

    qw: Any
    s: Any
    p: Any
    alpha: Any
    top: Any
    total: Any
    o: Any
    item: Any


def _parts(length: Any) -> Any:
    return (length + PART - 1) // PART


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(q, k, v, mask, out, scale, diagonal, cap, sinks), for Sk > 0.

    mask [B,H,Sq,Sk] of any strides, or fp32 [1,1,1,1] where `spec.mask` is None; diagonal between
    -Sq and Sk; cap: not read unless `spec.capped`, where scale is that of the law over the cap;
    sinks [H], absent unless `spec.sinks` names their dtype.
    """
    depth, dim, pairs, dtype = spec.depth, spec.value_dim, spec.pairs, spec.dtype
    depth16, masked = -(-depth // LANES) * LANES, spec.mask is not None
    per_word = 2 if pairs else 1
    halves = per_word  # vectors of sums that one load of values feeds
    columns = halves * LANES
    loads = -(-dim // columns)
    at_once = (2 if spec.isa == "generic" else 4) // halves  # loads whose sums fit the registers
    blocks, tail_loads, tail_columns = (
        dim // columns // at_once,
        dim // columns % at_once,
        dim % columns,
    )
    probabilities = KEYS // per_word
    loop = T.parallel if spec.parallel else T.serial

    @T.inline
    def read_query(x, w, r, word, count):
        address = T.meta_var(T.address_of(x.query_row(x.q, r, word * per_word)))
        w.qw[r, lanes(word)] = load(spec, address, count)

    @T.inline
    def begin(x, w, r, start):
        """Row r of the part that starts at key `start`."""
        for c in T.serial(depth // LANES):
            read_query(x, w, r, c * LANES, LANES)
        if depth % LANES != 0:
            read_query(x, w, r, depth // LANES * LANES, depth % LANES)
        w.top[w.item, r, lanes(0)] = splat(T.float32(LOWEST))
        w.total[w.item, r, lanes(0)] = splat(T.float32(0))
        if spec.sinks is not None:  # noqa: SIM102 - decided as the kernel is built, the next as it runs
            if start == 0:
                # no T.let: TVM does not legalise a cast from bf16 there
                w.top[w.item, r, lanes(0)] = splat(sink_score(spec, x.sink(r)))
                w.total[w.item, r, 0] = sink_total(x.sink(r))
        for c in T.serial(loads * halves):
            w.o[w.item, r, c, lanes(0)] = splat(T.float32(0))

    @T.inline
    def start_scores(x, w, live, r, first, count, limit):
        """s[r] = mask, -inf from key `limit` on; live = its maximum with what it was."""
        for c in T.serial((count + LANES - 1) // LANES):
            key = T.meta_var(first + c * LANES)
            if masked:
                if (x.mask.strides[3] == 1) & (key + LANES <= first + count):
                    address = T.meta_var(T.address_of(x.query_row(x.mask, r, key)))
                    w.s[r, lanes(c * LANES)] = mask_vector(spec, address)
                else:
                    for j in T.serial(T.min(LANES, first + count - key)):
                        w.s[r, c * LANES + j] = mask_number(spec, x.query_row(x.mask, r, key + j))
            else:
                w.s[r, lanes(c * LANES)] = splat(T.float32(0))
            w.s[r, lanes(c * LANES)] = T.Select(
                splat(T.Cast("int32", key)) + lanes(0) < splat(T.Cast("int32", limit)),
                w.s[r, lanes(c * LANES)],
                splat(T.float32(float("-inf"))),
            )
            live[lanes(0)] = vector("rl_max", live[lanes(0)], w.s[r, lanes(c * LANES)])

    @T.inline
    def products(x, w, sums, r, first, final, word, count):
        """Adds `count` words of the products of row r with the 16 keys from `first` on."""
        for j in T.unroll(LANES):
            # beyond the last key it is read again, and its score stays -inf
            address = T.meta_var(
                T.address_of(x.k[x.b, x.h, T.min(first + j, final), word * per_word])
            )
            sums[j, lanes(0)] = multiply_add(
                spec, load(spec, address, count), w.qw[r, lanes(word)], sums[j, lanes(0)]
            )

    @T.inline
    def score(x, w, r, chunk, first, final):
        """s[r, 16 chunk + j] += factor q[r]·k[first + j] for 16 keys."""
        sums = registers((LANES, LANES))
        for j in T.unroll(LANES):
            sums[j, lanes(0)] = splat(T.float32(0))
        for c in T.serial(depth // LANES):
            products(x, w, sums, r, first, final, c * LANES, LANES)
        if depth % LANES != 0:
            products(x, w, sums, r, first, final, depth // LANES * LANES, depth % LANES)
        added = T.meta_var(vector("rl_sum16", *[sums[j, lanes(0)] for j in range(LANES)]))
        w.s[r, lanes(chunk * LANES)] = scores(spec, x, added, w.s[r, lanes(chunk * LANES)])

    @T.inline
    def soften(w, r, chunks):
        """p[r] = exp(s[r] - maximum), rounded as the product with v takes it."""
        peak = registers((LANES,))
        one = registers((LANES,))
        added = registers((LANES,))
        before = T.meta_var(w.top[w.item, r, lanes(0)])
        peak[lanes(0)] = before
        for c in T.serial(chunks):
            peak[lanes(0)] = vector("rl_max", peak[lanes(0)], w.s[r, lanes(c * LANES)])
        peak[lanes(0)] = splat(T.call_extern("float32", "rl_hmax", peak[lanes(0)]))
        w.alpha[r, lanes(0)] = exponential(spec, before - peak[lanes(0)])
        w.top[w.item, r, lanes(0)] = peak[lanes(0)]
        added[lanes(0)] = splat(T.float32(0))
        for c in T.serial(chunks):
            one[lanes(0)] = exponential(spec, w.s[r, lanes(c * LANES)] - peak[lanes(0)])
            added[lanes(0)] = added[lanes(0)] + one[lanes(0)]
            if pairs:
                w.p[r, lanes(c * LANES // 2, LANES // 2)] = T.reinterpret(
                    T.call_extern("int16x16", "rl_cvtbf16", one[lanes(0)]), dtype="int32x8"
                )
            else:
                w.p[r, lanes(c * LANES)] = one[lanes(0)]
        w.total[w.item, r, lanes(0)] = fma(
            w.total[w.item, r, lanes(0)], w.alpha[r, lanes(0)], added[lanes(0)]
        )

    @T.inline
    def read_values(x, values, c, j, first, final, column, nc):
        """`nc` columns of the values of key `first` + j, or of the pair of keys from 2 j on."""
        if pairs:
            one = T.meta_var(T.address_of(x.v[x.b, x.h, first + 2 * j, column]))
            # where the last key has no partner, the partner's p is 0
            two = T.meta_var(T.address_of(x.v[x.b, x.h, T.min(first + 2 * j + 1, final), column]))
            values[c, 0, lanes(0)] = words(spec, f"rl_halves_low_{nc}", one, two)
            values[c, 1, lanes(0)] = words(spec, f"rl_halves_high_{nc}", one, two)
        else:
            address = T.meta_var(T.address_of(x.v[x.b, x.h, first + j, column]))
            values[c, 0, lanes(0)] = vector(f"rl_load_{dtype}_{nc}", address)

    @T.inline
    def weigh_columns(x, w, r, nr, first, count, final, column, nl, nc):
        """o[r] = alpha o[r] + sum_j p[r,j] v[j] for `nr` rows and `nl` loads of `nc` columns."""
        acc = registers((nr, nl * halves, LANES))
        values = registers((nl, halves, LANES), spec.word)
        for i in T.unroll(nr):
            for c in T.unroll(nl * halves):
                before = T.meta_var(w.o[w.item, r + i, column // LANES + c, lanes(0)])
                acc[i, c, lanes(0)] = before * w.alpha[r + i, lanes(0)]
        for j in T.serial((count + 1) // 2 if pairs else count):
            for c in T.unroll(nl):
                read_values(x, values, c, j, first, final, column + c * columns, nc)
                for i in T.unroll(nr):
                    for half in T.unroll(halves):
                        acc[i, c * halves + half, lanes(0)] = multiply_add(
                            spec,
                            splat(w.p[r + i, j]),
                            values[c, half, lanes(0)],
                            acc[i, c * halves + half, lanes(0)],
                        )
        for i in T.unroll(nr):
            for c in T.unroll(nl * halves):
                w.o[w.item, r + i, column // LANES + c, lanes(0)] = acc[i, c, lanes(0)]

    @T.inline
    def weigh(x, w, r, nr, first, count, final):
        """All columns of `nr` rows."""
        for block in T.serial(blocks):
            at = T.meta_var(block * at_once * columns)
            weigh_columns(x, w, r, nr, first, count, final, at, at_once, columns)
        if tail_loads != 0:
            start = T.meta_var(blocks * at_once * columns)
            weigh_columns(x, w, r, nr, first, count, final, start, tail_loads, columns)
        if tail_columns != 0:
            last = T.meta_var(dim // columns * columns)
            weigh_columns(x, w, r, nr, first, count, final, last, 1, tail_columns)

    @T.inline
    def attend_tile(x, w, first, count, final, diagonal):
        """All rows take in `count` keys from `first` on."""
        live = registers((LANES,))
        live[lanes(0)] = splat(T.float32(float("-inf")))
        for r in T.serial(x.rows):
            limit = T.meta_var(T.min(final + 1, r // x.group + diagonal + 1))
            start_scores(x, w, live, r, first, count, limit)
        # A tile that no row may see is not read: the unwritten end of a static cache.
        if T.call_extern("float32", "rl_hmax", live[lanes(0)]) > T.float32(float("-inf")):
            for c in T.serial((count + LANES - 1) // LANES):
                key = T.meta_var(first + c * LANES)
                for r in T.serial(x.rows):
                    if key + LANES - 1 <= final:
                        score(x, w, r, c, key, key + LANES - 1)
                    else:
                        score(x, w, r, c, key, final)
            for r in T.serial(x.rows):
                soften(w, r, (count + LANES - 1) // LANES)
            for n in T.serial(x.rows // SHARED_ROWS):
                weigh(x, w, n * SHARED_ROWS, SHARED_ROWS, first, count, final)
            for n in T.serial(x.rows % SHARED_ROWS):
                weigh(x, w, x.rows // SHARED_ROWS * SHARED_ROWS + n, 1, first, count, final)

    @T.inline
    def attend_part(x, w, start, final, diagonal):
        """Keys `start` to `final`."""
        for r in T.serial(x.rows):
            begin(x, w, r, start)
        end = T.meta_var(T.min(final, (x.rows - 1) // x.group + diagonal) + 1)
        for tile in T.serial((T.max(end - start, 0) + KEYS - 1) // KEYS):
            first = T.meta_var(start + tile * KEYS)
            attend_tile(x, w, first, T.min(KEYS, end - first), final, diagonal)

    @T.inline
    def store(x, row, r, column, count):
        head = T.meta_var(x.h * x.group + r % x.group)
        i = T.meta_var(r // x.group)
        if dtype == "float32":
            x.out[x.b, head, i, lanes(column, count)] = row[lanes(column, count)]
        else:
            done = T.meta_var(T.Cast(f"{dtype}x{count}", row[lanes(column, count)]))
            x.out[x.b, head, i, lanes(column, count)] = done

    @T.inline
    def combine(x, w, parts, r):
        """Adds the parts of row r, in order, and writes it."""
        peak = registers((LANES,))
        total = registers((LANES,))
        scale = registers((LANES,))
        row = T.alloc_buffer((loads * columns,), "float32")
        peak[lanes(0)] = splat(T.float32(LOWEST))
        total[lanes(0)] = splat(T.float32(0))
        for n in T.serial(parts):
            peak[lanes(0)] = vector("rl_max", peak[lanes(0)], w.top[w.item + n, r, lanes(0)])
        for c in T.serial(loads * halves):
            row[lanes(c * LANES)] = splat(T.float32(0))
        for n in T.serial(parts):
            scale[lanes(0)] = exponential(spec, w.top[w.item + n, r, lanes(0)] - peak[lanes(0)])
            total[lanes(0)] = fma(
                w.total[w.item + n, r, lanes(0)], scale[lanes(0)], total[lanes(0)]
            )
            for c in T.serial(loads * halves):
                row[lanes(c * LANES)] = fma(
                    w.o[w.item + n, r, c, lanes(0)], scale[lanes(0)], row[lanes(c * LANES)]
                )
        total[lanes(0)] = splat(T.call_extern("float32", "rl_hsum", total[lanes(0)]))
        scale[lanes(0)] = T.Select(
            total[lanes(0)] > splat(T.float32(0)),
            splat(T.float32(1)) / total[lanes(0)],
            splat(T.float32(0)),
        )
        for c in T.serial(loads):
            if pairs:
                low: T.let = row[lanes(c * columns)] * scale[lanes(0)]
                high: T.let = row[lanes(c * columns + LANES)] * scale[lanes(0)]
                row[lanes(c * columns)] = vector("rl_columns_low", low, high)
                row[lanes(c * columns + LANES)] = vector("rl_columns_high", low, high)
            else:
                row[lanes(c * LANES)] = row[lanes(c * LANES)] * scale[lanes(0)]
        for c in T.serial(dim // LANES):
            store(x, row, r, c * LANES, LANES)
        if dim % LANES != 0:
            store(x, row, r, dim // LANES * LANES, dim % LANES)

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        mask_: T.handle,
        out_: T.handle,
        scale: T.float32,
        diagonal: T.int64,
        soft_cap: T.float32,
        sinks_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, key_heads = T.int64(), T.int64(), T.int64()
        queries, length = T.int64(), T.int64()
        mask_shape = T.meta_var((batch, heads, queries, length) if masked else (T.int64(1),) * 4)
        q = tensor(q_, (batch, heads, queries, spec.head_dim), dtype)
        k = tensor(k_, (batch, key_heads, length, spec.head_dim), dtype)
        v = tensor(v_, (batch, key_heads, length, dim), dtype)
        mask = tensor(mask_, mask_shape, spec.mask or "float32", T.int64())
        out = tensor(out_, (batch, heads, queries, dim), dtype)
        sinks = T.meta_var(per_head(sinks_, heads, spec.sinks))
        with T.attr(0, "pragma_import_llvm", spec.helpers):
            items = T.meta_var(batch * key_heads * _parts(length))
            group = T.meta_var(heads // key_heads)
            rows = T.meta_var(queries * (heads // key_heads))
            factor: T.let = factor_of(spec, scale)
            cap: T.let = cap_of(spec, soft_cap)
            parts = T.meta_var(_parts(length))
            part_keys = T.meta_var((length + parts - 1) // parts)
            top = T.alloc_buffer((items, rows, LANES), "float32")
            total = T.alloc_buffer((items, rows, LANES), "float32")
            o = T.alloc_buffer((items, rows, loads * halves, LANES), "float32")
            for item in loop(items):
                qw = T.alloc_buffer((rows, depth16), spec.word)
                s = T.alloc_buffer((rows, KEYS), "float32")
                p = T.alloc_buffer((rows, probabilities), spec.word)
                alpha = T.alloc_buffer((rows, LANES), "float32")
                b = T.meta_var(item // parts // key_heads)
                h = T.meta_var(item // parts % key_heads)
                start = T.meta_var(item % parts * part_keys)
                attend_part(
                    Head(q, k, v, mask, sinks, out, b, h, group, rows, length, factor, cap),
                    State(qw, s, p, alpha, top, total, o, item),
                    start,
                    T.min(length, start + part_keys) - 1,
                    diagonal,
                )
            for n in T.serial(batch * key_heads):
                b = T.meta_var(n // key_heads)
                h = T.meta_var(n % key_heads)
                for r in T.serial(rows):
                    combine(
                        Head(q, k, v, mask, sinks, out, b, h, group, rows, length, factor, cap),
                        State(None, None, None, None, top, total, o, n * parts),
                        parts,
                        r,
                    )

    return kernel_of(main, spec)
