"""The CPU kernel of `ridgeline::binary_attention`, as one TVMScript function.

Law: `ridgeline.ir.binary_attention`, in the order that has no products. One task is one head:

    keys     A1[i,e] = sum of v[t,e] over keys t above the threshold in channel i; lanes are 16
             channels i, so that a masked addition takes one number v[t,e] for all of them
    tables   A0 = sum of v - A1; both doubled (an addition), rows 2 i and 2 i + 1 of one table
    queries  out[m] = (sum of v + sum_i table[2 i + bit i of query m]) / the same of ones;
             lanes are 16 columns e, rows are chosen by an index made of 16 comparisons at a time
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    kernel_helpers,
    lanes,
    registers,
    splat,
    tensor,
    vector,
)

COLUMNS = 16
"""Columns of the value that the keys' masked sums hold in registers at a time."""

VECTORS = 4
"""Vectors of one query's sums that are held in registers at a time."""


class Spec(NamedTuple):
    """What a compiled kernel is specialised on; batch, heads, lengths and strides are not.

    head_dim, value_dim: D and E. code: dtype of query and key; value: that of value and result,
    each "float32", "bfloat16" or "float16". isa: one of `isa.ISAS`. parallel: over threads?
    """

    head_dim: int
    value_dim: int
    code: str
    value: str
    isa: str
    parallel: bool


def _whole(count: int) -> int:
    return -(-count // LANES) * LANES


def build(spec: Spec) -> Any:
    """main(query [B,H,M,D], key [B,H,N,D], value [B,H,N,E], query_threshold, key_threshold [H,D],
    out [B,H,M,E]): last dimensions contiguous; query and key of one dtype, thresholds fp32."""
    depth, width = spec.head_dim, spec.value_dim
    deep, wide = _whole(depth), _whole(width)
    loop = T.parallel if spec.parallel else T.serial

    @T.inline
    def codes(into, source, b, h, t, at, count):
        """`count` channels of a query or key from channel `at` on, then zeros."""
        if count == LANES:
            into[lanes(0)] = vector(f"rl_load_{spec.code}_16", T.address_of(source[b, h, t, at]))
        else:
            into[lanes(0)] = splat(T.float32(0))
            for i in T.serial(count):
                into[i] = T.Cast("float32", source[b, h, t, at + i])

    @T.inline
    def threshold(into, source, h, at, count):
        """The thresholds of these channels, then such that nothing is above."""
        into[lanes(0)] = splat(T.float32(3.0e38))
        for i in T.serial(count):
            into[i] = source[h, at + i]

    @T.inline
    def masked_sums(key, value, limit, above, b, h, length, at, channels, column, columns):
        """above[e,i] = A1[i,e] for 16 channels i and up to 16 columns e."""
        x = registers((LANES,))
        sums = registers((COLUMNS, LANES))
        for e in T.unroll(columns):
            sums[e, lanes(0)] = splat(T.float32(0))
        for t in T.serial(length):
            codes(x, key, b, h, t, at, channels)
            for e in T.unroll(columns):
                sums[e, lanes(0)] = T.Select(
                    x[lanes(0)] > limit[lanes(0)],
                    sums[e, lanes(0)] + splat(T.Cast("float32", value[b, h, t, column + e])),
                    sums[e, lanes(0)],
                )
        for e in T.unroll(columns):
            above[column + e, lanes(at)] = sums[e, lanes(0)]

    @T.inline
    def keys(key, value, thresholds, above, counts, b, h, length, at, channels):
        """The masked sums of 16 channels, and counts[i] = keys above the threshold."""
        limit = registers((LANES,))
        x = registers((LANES,))
        held = registers((LANES,))
        threshold(limit, thresholds, h, at, channels)
        held[lanes(0)] = splat(T.float32(0))
        for t in T.serial(length):
            codes(x, key, b, h, t, at, channels)
            held[lanes(0)] = T.Select(
                x[lanes(0)] > limit[lanes(0)],
                held[lanes(0)] + splat(T.float32(1)),
                held[lanes(0)],
            )
        counts[lanes(at)] = held[lanes(0)]
        for block in T.serial(width // COLUMNS):
            masked_sums(
                key, value, limit, above, b, h, length, at, channels, block * COLUMNS, COLUMNS
            )
        if width % COLUMNS > 0:
            column = T.meta_var(width // COLUMNS * COLUMNS)
            masked_sums(
                key, value, limit, above, b, h, length, at, channels, column, width % COLUMNS
            )

    @T.inline
    def tables(value, above, counts, total, table, weights, b, h, length):
        for e in T.serial(wide):
            total[e] = T.float32(0)
        for t in T.serial(length):
            for e in T.serial(width):
                total[e] = total[e] + T.Cast("float32", value[b, h, t, e])
        for i in T.serial(depth):
            for e in T.serial(width):
                table[2 * i, e] = (total[e] - above[e, i]) + (total[e] - above[e, i])
                table[2 * i + 1, e] = above[e, i] + above[e, i]
            for e in T.serial(wide - width):
                table[2 * i, width + e] = T.float32(0)
                table[2 * i + 1, width + e] = T.float32(0)
            weights[2 * i] = (T.Cast("float32", length) - counts[i]) * T.float32(2)
            weights[2 * i + 1] = counts[i] + counts[i]

    @T.inline
    def choose(query, thresholds, chosen, b, h, m, at, channels):
        """Of each channel the row of the table that the query's bit takes."""
        x = registers((LANES,))
        limit = registers((LANES,))
        threshold(limit, thresholds, h, at, channels)
        codes(x, query, b, h, m, at, channels)
        even = T.meta_var(T.ramp(at * 2, 2, LANES))
        chosen[lanes(at)] = T.Select(
            x[lanes(0)] > limit[lanes(0)], even + T.broadcast(1, LANES), even
        )

    @T.inline
    def gather(total, table, chosen, scale, tail, out, b, h, m, first, vectors):
        """Up to 4 vectors of one query's result."""
        sums = registers((VECTORS, LANES))
        for j in T.unroll(vectors):
            sums[j, lanes(0)] = total[lanes(first + j * LANES)]
        for i in T.serial(depth):
            for j in T.unroll(vectors):
                sums[j, lanes(0)] = sums[j, lanes(0)] + table[chosen[i], lanes(first + j * LANES)]
        for j in T.unroll(vectors):
            column = T.meta_var(first + j * LANES)
            sums[j, lanes(0)] = sums[j, lanes(0)] * splat(scale[0])
            if column + LANES <= width:
                if spec.value == "float32":
                    out[b, h, m, lanes(column)] = sums[j, lanes(0)]
                else:
                    out[b, h, m, lanes(column)] = T.Cast(f"{spec.value}x{LANES}", sums[j, lanes(0)])
            else:
                tail[lanes(0)] = sums[j, lanes(0)]
                for e in T.serial(width - column):
                    out[b, h, m, column + e] = T.Cast(spec.value, tail[e])

    @T.inline
    def queries(query, thresholds, total, table, weights, out, b, h, rows, length):
        chosen = T.alloc_buffer((deep,), "int32")
        tail = T.alloc_buffer((LANES,), "float32")
        for m in T.serial(rows):
            scale = registers((1,))
            for block in T.serial(depth // LANES):
                choose(query, thresholds, chosen, b, h, m, block * LANES, LANES)
            if depth % LANES > 0:
                at = T.meta_var(depth // LANES * LANES)
                choose(query, thresholds, chosen, b, h, m, at, depth % LANES)
            scale[0] = T.Cast("float32", length)
            for i in T.serial(depth):
                scale[0] = scale[0] + weights[chosen[i]]
            scale[0] = T.float32(1) / scale[0]
            for block in T.serial(wide // (VECTORS * LANES)):
                first = T.meta_var(block * VECTORS * LANES)
                gather(total, table, chosen, scale, tail, out, b, h, m, first, VECTORS)
            if wide // LANES % VECTORS > 0:
                first = T.meta_var(wide // (VECTORS * LANES) * VECTORS * LANES)
                vectors = T.meta_var(wide // LANES % VECTORS)
                gather(total, table, chosen, scale, tail, out, b, h, m, first, vectors)

    @T.prim_func(s_tir=True)
    def main(
        query_: T.handle,
        key_: T.handle,
        value_: T.handle,
        query_threshold_: T.handle,
        key_threshold_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, rows, length = T.int64(), T.int64(), T.int64(), T.int64()
        query = tensor(query_, (batch, heads, rows, depth), spec.code)
        key = tensor(key_, (batch, heads, length, depth), spec.code)
        value = tensor(value_, (batch, heads, length, width), spec.value)
        query_threshold = T.match_buffer(query_threshold_, (heads, depth), "float32", align=1)
        key_threshold = T.match_buffer(key_threshold_, (heads, depth), "float32", align=1)
        out = tensor(out_, (batch, heads, rows, width), spec.value)
        with T.attr(0, "pragma_import_llvm", kernel_helpers(spec.isa)):
            for task in loop(batch * heads):
                b = T.meta_var(task // heads)
                h = T.meta_var(task % heads)
                above = T.alloc_buffer((wide, deep), "float32")
                counts = T.alloc_buffer((deep,), "float32")
                total = T.alloc_buffer((wide,), "float32")
                table = T.alloc_buffer((2 * depth, wide), "float32")
                weights = T.alloc_buffer((2 * depth,), "float32")
                for block in T.serial(depth // LANES):
                    at = T.meta_var(block * LANES)
                    keys(key, value, key_threshold, above, counts, b, h, length, at, LANES)
                if depth % LANES > 0:
                    at = T.meta_var(depth // LANES * LANES)
                    keys(key, value, key_threshold, above, counts, b, h, length, at, depth % LANES)
                tables(value, above, counts, total, table, weights, b, h, length)
                queries(query, query_threshold, total, table, weights, out, b, h, rows, length)

    return main
