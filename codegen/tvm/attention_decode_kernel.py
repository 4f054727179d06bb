"""Attention for a handful of query rows per key head: a decoding step, bound by reading the cache.

The law and the online softmax are those of `attention_kernel`. Keys and values are read where they
lie, once for all query heads that share them; a lane is a feature in both products. The keys are
cut into `splits` parts that run in parallel; part c leaves its maximum m_c, sum l_c and acc_c, and

    m = max_c m_c;  out = sum_c exp(m_c - m) acc_c / sum_c exp(m_c - m) l_c

Source: FlashAttention's split over keys for decoding. bf16 inputs are widened in registers.
"""

import math
from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_kernel import (
    LANES,
    LLVM_HELPERS,
    LOWEST,
    Spec,
    across,
    fma,
    lanes,
    maximum,
    splat,
    vector_exp,
)

CHUNK = 64
"""Keys whose scores are formed before their maximum is taken."""


def build(spec: Spec) -> Any:
    """main(query, key, value, mask, out, scale, diagonal, splits), a `tvm.tirx.PrimFunc`.

    Shapes as in `attention_kernel.build`, but bf16 tensors come as int16; D and Dv are multiples
    of 16.
    """
    d, dv, group = spec.head_dim, spec.value_dim, spec.group
    nd, nv, nc = d // LANES, dv // LANES, CHUNK // LANES
    pairs = spec.dtype == "bfloat16"
    half = "int16" if pairs else "float32"
    minus_inf = T.float32(-math.inf)

    def wide(vector):
        return T.call_extern("float32x16", "rl_cvtf32", vector) if pairs else vector

    @T.inline
    def chunk_scores(query, key, mask, s, batch, head, kv, row, first, end, keys, scale, diagonal):
        """z of one row against CHUNK keys, -inf where excluded or past the end."""
        dot = T.alloc_buffer((LANES,), "float32", scope="local")
        for n in T.serial(CHUNK):
            s[n] = minus_inf
            keep = first + n < end
            if spec.causal:
                keep = T.And(keep, first + n <= row + diagonal)
            if keep:
                dot[lanes(0)] = splat(T.float32(0))
                for i in T.unroll(nd):
                    dot[lanes(0)] = fma(
                        wide(query[batch, head, row, lanes(i * LANES)]),
                        wide(key[batch, kv, first + n, lanes(i * LANES)]),
                        dot[lanes(0)],
                    )
                s[n] = across("sum", dot[lanes(0)]) * scale
                if spec.mask == "uint8":  # noqa: SIM102 - the outer test is made while compiling
                    if mask[batch, head, row, first + n] == T.uint8(0):
                        s[n] = minus_inf
                if spec.mask == "float32":
                    s[n] = s[n] + mask[batch, head, row, first + n]

    @T.inline
    def chunk_update(value, s, acc, stats, batch, kv, first, end):
        """The online softmax over one chunk; stats holds (maximum, sum)."""
        new = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((LANES,), "float32", scope="local")
        new[0] = T.max(
            stats[0],
            across(
                "max",
                maximum(
                    maximum(s[lanes(0)], s[lanes(LANES)]),
                    maximum(s[lanes(2 * LANES)], s[lanes(3 * LANES)]),
                ),
            ),
        )
        if new[0] > minus_inf:
            if new[0] > stats[0]:
                total[lanes(0)] = vector_exp(
                    splat(T.max(stats[0], T.float32(LOWEST)) - new[0]), spec.isa
                )
                for v in T.unroll(nv):
                    acc[v, lanes(0)] = acc[v, lanes(0)] * total[lanes(0)]
                stats[1] = stats[1] * total[0]
                stats[0] = new[0]
            total[lanes(0)] = splat(T.float32(0))
            for j in T.unroll(nc):
                s[lanes(j * LANES)] = T.Select(
                    s[lanes(j * LANES)] == splat(minus_inf),
                    splat(T.float32(0)),
                    vector_exp(
                        maximum(s[lanes(j * LANES)], splat(T.float32(LOWEST))) - splat(new[0]),
                        spec.isa,
                    ),
                )
                total[lanes(0)] = total[lanes(0)] + s[lanes(j * LANES)]
            stats[1] = stats[1] + across("sum", total[lanes(0)])
            for n in T.serial(T.min(CHUNK, end - first)):
                for v in T.unroll(nv):
                    acc[v, lanes(0)] = fma(
                        splat(s[n]),
                        wide(value[batch, kv, first + n, lanes(v * LANES)]),
                        acc[v, lanes(0)],
                    )

    @T.prim_func(s_tir=True)
    def main(
        a: T.handle,
        b: T.handle,
        c: T.handle,
        e: T.handle,
        f: T.handle,
        scale: T.float32,
        diagonal: T.int64,
        splits: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch = T.int64()
        heads = T.int64()
        kv_heads = T.int64()
        length = T.int64()
        keys = T.int64()
        q0 = T.int64()
        q1 = T.int64()
        q2 = T.int64()
        k0 = T.int64()
        k1 = T.int64()
        k2 = T.int64()
        v0 = T.int64()
        v1 = T.int64()
        v2 = T.int64()
        o0 = T.int64()
        o1 = T.int64()
        o2 = T.int64()
        m0 = T.int64()
        m1 = T.int64()
        m2 = T.int64()
        mb = T.int64()
        mh = T.int64()
        mq = T.int64()
        mk = T.int64()
        query = T.match_buffer(a, (batch, heads, length, d), half, strides=(q0, q1, q2, 1))
        key = T.match_buffer(b, (batch, kv_heads, keys, d), half, strides=(k0, k1, k2, 1))
        value = T.match_buffer(c, (batch, kv_heads, keys, dv), half, strides=(v0, v1, v2, 1))
        mask = T.match_buffer(
            e, (mb, mh, mq, mk), spec.mask or "uint8", strides=(m0, m1, m2, T.int64(1))
        )
        out = T.match_buffer(f, (batch, heads, length, dv), half, strides=(o0, o1, o2, 1))
        with T.attr(0, "pragma_import_llvm", LLVM_HELPERS):
            partial = T.alloc_buffer((batch * heads * length, splits, dv), "float32")
            summary = T.alloc_buffer((batch * heads * length, splits, 2), "float32")
            for t in T.parallel(batch * kv_heads * splits):
                bat = t // (kv_heads * splits)
                kv = t // splits % kv_heads
                piece = t % splits
                start = piece * ((keys + splits - 1) // splits)
                end = T.min(keys, start + (keys + splits - 1) // splits)
                for r in T.serial(length * group):
                    head = kv * group + r % group
                    row = r // group
                    line = (bat * heads + head) * length + row
                    acc = T.alloc_buffer((nv, LANES), "float32", scope="local")
                    s = T.alloc_buffer((CHUNK,), "float32", scope="local")
                    stats = T.alloc_buffer((2,), "float32", scope="local")
                    stats[0] = minus_inf
                    stats[1] = T.float32(0)
                    for v in T.unroll(nv):
                        acc[v, lanes(0)] = splat(T.float32(0))
                    for chunk in T.serial(T.max(end - start + CHUNK - 1, T.int64(0)) // CHUNK):
                        first = start + chunk * CHUNK
                        chunk_scores(
                            query, key, mask, s, bat, head, kv, row, first, end, keys, scale,
                            diagonal,
                        )  # fmt: skip
                        chunk_update(value, s, acc, stats, bat, kv, first, end)
                    summary[line, piece, 0] = stats[0]
                    summary[line, piece, 1] = stats[1]
                    for v in T.unroll(nv):
                        partial[line, piece, lanes(v * LANES)] = acc[v, lanes(0)]
            for line in T.serial(batch * heads * length):
                whole = T.alloc_buffer((2,), "float32", scope="local")
                weight = T.alloc_buffer((LANES,), "float32", scope="local")
                result = T.alloc_buffer((nv, LANES), "float32", scope="local")
                whole[0] = minus_inf
                whole[1] = T.float32(0)
                for v in T.unroll(nv):
                    result[v, lanes(0)] = splat(T.float32(0))
                for piece in T.serial(splits):
                    whole[0] = T.max(whole[0], summary[line, piece, 0])
                for piece in T.serial(splits):
                    if summary[line, piece, 1] > T.float32(0):
                        weight[lanes(0)] = vector_exp(
                            splat(summary[line, piece, 0] - whole[0]), spec.isa
                        )
                        whole[1] = whole[1] + weight[0] * summary[line, piece, 1]
                        for v in T.unroll(nv):
                            result[v, lanes(0)] = fma(
                                weight[lanes(0)],
                                partial[line, piece, lanes(v * LANES)],
                                result[v, lanes(0)],
                            )
                for v in T.unroll(nv):
                    result[v, lanes(0)] = result[v, lanes(0)] * splat(
                        T.if_then_else(
                            whole[1] > T.float32(0), T.float32(1) / whole[1], T.float32(0)
                        )
                    )
                    if pairs:
                        out[
                            line // (heads * length),
                            line // length % heads,
                            line % length,
                            lanes(v * LANES),
                        ] = T.call_extern("int16x16", "rl_cvtbf16", result[v, lanes(0)])
                    else:
                        out[
                            line // (heads * length),
                            line // length % heads,
                            line % length,
                            lanes(v * LANES),
                        ] = result[v, lanes(0)]

    return main
