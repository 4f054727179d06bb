"""The CPU kernel of `ridgeline::quantized_linear`, as one TVMScript function.

Law, for group g of the input features, with c = 2**(bits-1) and x rounded to the multiply dtype:

    acc[m,n,g] = start + sum_{k in g} x[m,k] (code[n,k] - c)      products formed exactly, fp32 sum
    y[m,n]     = bias[n] + sum_g ( scale[n,g] acc[m,n,g] + term )
    symmetric:   start = 0,                                term = 0
    zero_point:  start = (c - offset[n,g]) xsum[m,g],      term = 0
    minimum:     start = c xsum[m,g],                      term = offset[n,g] xsum[m,g]
    xsum[m,g]  = sum_{k in g} x[m,k]

which is `ridgeline.ir.quantized_linear` rearranged so that the inner loop sees centred codes, which
are exact in bf16, and scale and offset enter once per group in the dtype they are stored in.

Shape of the work: a vector lane is an output column. A panel is PANEL_VECTORS vectors of 16
columns; panels run in parallel, and each streams its codes once per block of rows, in memory order.
Source: the CPU forms of MARLIN and T-MAC, with a register table (`vpermw`, `vpermps`) as decoder.
"""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers
from ridgeline.codegen.tvm.quantized_linear_parts import (
    LANES,
    PANEL,
    PANEL_VECTORS,
    STEP,
    Spec,
    bf16_table,
    code_bits,
    float_of_byte,
    fma,
    fp32,
    lanes,
    pieces,
    splat,
)

MANY_ROWS = 16
"""Rows from which preparing them is shared among threads too: some 0.3 us each."""

PREFETCH_STEPS = 8
"""How far ahead of one row's products its codes are asked for: weights of some 500 KB, as a small
model has, are over before the hardware's own prefetching is up to speed (a seventh of their time,
measured cold; nothing for 8-bit codes, of which a step is four times longer)."""

ROWS_PER_TASK = 32
"""A task is one panel for so many rows: enough tasks to balance threads where panels are few."""

_PERMUTE_32 = "llvm.x86.avx512.permvar.sf.512"


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, codes, scale, offset, bias, row_scale, permutation, y),
    a `tvm.tirx.PrimFunc`.

    x [M, in_features] and y [M, out_features] are contiguous, [1, M, .] if `spec.lead`; X
    """
    n_out, n_in, group = spec.out_features, spec.in_features, spec.group_size
    panels, groups, steps, per_group = spec.panels, spec.groups, spec.steps, group // STEP
    nv, centre = PANEL_VECTORS, 2 ** (spec.bits - 1)
    dot, shared = spec.dot, pieces(spec)
    matrix, pair_code, prepare, store = (
        shared.matrix,
        shared.pair_code,
        shared.prepare,
        shared.store,
    )
    loop = T.parallel if spec.parallel else T.serial
    code_dtype = "int8" if spec.wide else "int16"
    code_shape = (panels, steps, spec.terms, 4 if spec.wide else 1, nv, 2 * LANES)
    group_shape = (panels, groups, nv, LANES)
    xw_row, xw_dtype = (groups * group // 2, "int32") if dot else (groups * group, "float32")
    most = spec.row_blocks[0]
    permute_32 = T.llvm_lookup_intrinsic_id(_PERMUTE_32) if spec.isa != "generic" else None

    def trips(g):
        """Steps of group g; a constant wherever it can be, so that the loop is unrolled."""
        return per_group if steps % per_group == 0 else T.min(per_group, steps - g * per_group)

    def order(t, features, width, rows):
        """Feature (or pair) and vector of decoding t. A few rows go through the columns first, so
        that no sum is touched again at once; otherwise the codes are read once, in order."""
        columns_first = 1 < rows <= 4
        return (t // width, t % width) if columns_first else (t % features, t // features)

    def chains(rows):
        """Sums per output that a CPU can keep in flight: one row alone has too few to fill it."""
        return 2 if rows == 1 and spec.isa != "generic" else 1

    def prefetched(rows):
        return rows == 1 and not spec.wide

    def widened(rows):
        """One row of 8-bit codes is multiplied in fp32, the pairs of features in neighbouring
        lanes: turning the codes to bf16 for one product takes longer than the product."""
        return dot and rows == 1 and spec.wide

    def code(table, codes, panel, step, field, j, i):
        """Codes of feature 8 step + i, as 16 fp32."""
        if spec.wide:
            word = codes[panel, step, field, i // 2, j, lanes(0, 32)]
            word = T.reinterpret(word, dtype="int16x16")
            top = T.shift_left(word, splat(T.Cast("int16", 8 - i % 2 * 8)))
            octet = T.shift_right(top, splat(T.int16(8)))
            return float_of(octet)
        word = T.reinterpret(codes[panel, step, field, 0, j, lanes(0, 32)], dtype="int32x16")
        word = T.shift_right(word, splat(i % 2 * 16 + i // 2 * 4))
        if spec.isa != "generic":
            table_row = T.reinterpret(table[lanes(0)], dtype="float32x16")
            return T.call_llvm_pure_intrin(permute_32, table_row, word, dtype="float32x16")
        nibble = T.bitwise_and(word, splat(15))
        return T.reinterpret(code_bits(spec, nibble), dtype="float32x16")

    def float_of(octet):
        """The value of wide codes."""
        return T.Cast("float32x16", octet) if spec.codec == "uniform" else float_of_byte(octet)

    def half_code(half, codes, panel, step, field, j, i):
        """Codes of features 8 step + 2 i + {0, 1} in turn, of the first or last 8 columns."""
        return float_of(codes[panel, step, field, i, j, lanes(half * LANES)])

    def start(offset, xsum, row, panel, g, j):
        if spec.scheme == "symmetric":
            return splat(T.float32(0))
        if spec.scheme == "minimum":
            return splat(T.float32(centre) * xsum[row, g])
        zero = fp32(offset[panel, g, j, lanes(0)], spec.offset)
        return (splat(T.float32(centre)) - zero) * splat(xsum[row, g])

    def term(offset, xsum, row, panel, g, j, total):
        if spec.scheme != "minimum":
            return total
        least = fp32(offset[panel, g, j, lanes(0)], spec.offset)
        return fma(least, splat(xsum[row, g]), total)

    @T.inline
    def multiply(table, codes, xw, acc, panel, first, width, step, field, row, rows):
        """One field of one step: STEP features of one panel against `rows` rows."""
        if widened(rows):
            pair = T.alloc_buffer((LANES,), "float32")
            for i in T.unroll(STEP // 2):
                word = T.meta_var(splat(xw[row, step * (STEP // 2) + i]))
                pair[lanes(0)] = T.call_extern("float32x16", "rl_pair_f32", word)
                for j in T.unroll(width):
                    low = T.meta_var(half_code(0, codes, panel, step, field, first + j, i))
                    high = T.meta_var(half_code(1, codes, panel, step, field, first + j, i))
                    acc[0, j, 0, lanes(0)] = fma(pair[lanes(0)], low, acc[0, j, 0, lanes(0)])
                    acc[0, j, 1, lanes(0)] = fma(pair[lanes(0)], high, acc[0, j, 1, lanes(0)])
        elif dot:
            if prefetched(rows):
                for j in T.unroll(width):
                    ahead = T.meta_var(codes[panel, step + PREFETCH_STEPS, field, 0, first + j, 0])
                    T.evaluate(T.call_extern("int32", "rl_prefetch", T.address_of(ahead)))
            pair = T.alloc_buffer((LANES,), "int32")
            for t in T.unroll(STEP // 2 * width):
                i, j = order(t, STEP // 2, width, rows)
                pair[lanes(0)] = pair_code(table, codes, panel, step, field, first + j, i)
                for m in T.unroll(rows):
                    acc[m, j, i % chains(rows), lanes(0)] = T.call_extern(
                        "float32x16",
                        "rl_dpbf16",
                        acc[m, j, i % chains(rows), lanes(0)],
                        splat(xw[row + m, step * (STEP // 2) + i]),
                        pair[lanes(0)],
                    )
        else:
            one = T.alloc_buffer((LANES,), "float32")
            for t in T.unroll(STEP * width):
                i, j = order(t, STEP, width, rows)
                one[lanes(0)] = code(table, codes, panel, step, field, first + j, i)
                for m in T.unroll(rows):
                    acc[m, j, i % chains(rows), lanes(0)] = fma(
                        splat(xw[row + m, step * STEP + i]),
                        one[lanes(0)],
                        acc[m, j, i % chains(rows), lanes(0)],
                    )

    @T.inline
    def block(
        table, codes, scale, offset, bias, row_scale, xw, xsum, y, panel, row, rows, first, width
    ):
        """`rows` rows of y from `row` on, and `width` vectors of the panel from `first` on."""
        total = T.alloc_buffer((rows, width, LANES), "float32")
        acc = T.alloc_buffer((rows, width, chains(rows), LANES), "float32")
        factor = T.alloc_buffer((LANES,), "float32")
        out = T.alloc_buffer((LANES,), "float32")
        for m in T.unroll(rows):
            for j in T.unroll(width):
                total[m, j, lanes(0)] = splat(T.float32(0))
        for g in T.serial(groups):
            for m in T.unroll(rows):
                for j in T.unroll(width):
                    for chain in T.unroll(chains(rows)):
                        acc[m, j, chain, lanes(0)] = splat(T.float32(0))
                    if not widened(rows):
                        acc[m, j, 0, lanes(0)] = start(offset, xsum, row + m, panel, g, first + j)
            for step in T.serial(trips(g)):
                for field in T.unroll(spec.terms):
                    multiply(
                        table,
                        codes,
                        xw,
                        acc,
                        panel,
                        first,
                        width,
                        g * per_group + step,
                        field,
                        row,
                        rows,
                    )
            for j in T.unroll(width):
                factor[lanes(0)] = fp32(scale[panel, g, first + j, lanes(0)], spec.scale)
                for m in T.unroll(rows):
                    if widened(rows):
                        acc[m, j, 0, lanes(0)] = T.call_extern(
                            "float32x16",
                            "rl_pair_sums",
                            acc[m, j, 0, lanes(0)],
                            acc[m, j, 1, lanes(0)],
                        ) + start(offset, xsum, row + m, panel, g, first + j)
                    elif chains(rows) == 2:
                        acc[m, j, 0, lanes(0)] = acc[m, j, 0, lanes(0)] + acc[m, j, 1, lanes(0)]
                    total[m, j, lanes(0)] = fma(
                        factor[lanes(0)],
                        acc[m, j, 0, lanes(0)],
                        term(offset, xsum, row + m, panel, g, first + j, total[m, j, lanes(0)]),
                    )
        for m in T.unroll(rows):
            for j in T.unroll(width):
                out[lanes(0)] = total[m, j, lanes(0)]
                store(y, bias, row_scale, out, panel * PANEL + (first + j) * LANES, row + m, n_out)

    @T.inline
    def rows_of(operands, row, rows, width):
        """A whole panel, `width` vectors at a time."""
        for part in T.serial(nv // width):
            block(*operands, row, rows, part * width, width)

    @T.prim_func(s_tir=True)
    def main(
        a: T.handle,
        b: T.handle,
        c: T.handle,
        d: T.handle,
        e: T.handle,
        f: T.handle,
        g: T.handle,
        h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        rows = T.int64()
        x = matrix(a, rows, n_in)
        codes = T.match_buffer(b, code_shape, code_dtype)
        scale = T.match_buffer(c, group_shape, spec.scale)
        offset = scale if spec.offset == "none" else T.match_buffer(d, group_shape, spec.offset)
        bias = scale if spec.bias == "none" else T.match_buffer(e, (n_out,), spec.bias)
        row_scale = (
            scale if spec.row_scale == "none" else T.match_buffer(f, (n_out,), spec.row_scale)
        )
        permutation = (
            scale if spec.permutation == "none" else T.match_buffer(g, (n_in,), spec.permutation)
        )
        y = matrix(h, rows, n_out)
        with T.attr(0, "pragma_import_llvm", llvm_helpers(spec.isa)):
            xw = T.alloc_buffer((rows, xw_row), xw_dtype)
            xsum = T.alloc_buffer((rows, groups), "float32")
            if rows >= MANY_ROWS:
                for m in loop(rows):
                    prepare(x, permutation, xw, xsum, m)
            else:
                for m in T.serial(rows):
                    prepare(x, permutation, xw, xsum, m)
            chunks = (rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK
            for task in loop(panels * chunks):
                table = T.alloc_buffer((LANES,), "int32")
                if dot:
                    table[lanes(0)] = bf16_table(spec)
                else:
                    table[lanes(0)] = code_bits(spec, lanes(0))
                panel = task // chunks
                first = task % chunks * ROWS_PER_TASK
                count = T.min(rows - first, ROWS_PER_TASK)
                weight = (table, codes, scale, offset, bias, row_scale, xw, xsum, y, panel)
                for n in T.serial(count // most):
                    rows_of(weight, first + n * most, most, 2)
                if most == 8:
                    if count % 8 >= 4:
                        rows_of(weight, first + count // 8 * 8, 4, 4)
                    if count % 4 >= 2:
                        rows_of(weight, first + count // 4 * 4, 2, 4)
                if count % 2 == 1:
                    rows_of(weight, first + count - 1, 1, nv)

    return main
