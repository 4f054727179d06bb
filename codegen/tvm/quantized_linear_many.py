"""The CPU kernel of `ridgeline::quantized_linear` for many rows, as one TVMScript function.

Law, for 16-bit products from `ridgeline.ir.quantized_linear.MANY_ROWS` rows on:

    ŵ[n,k] rounded to bf16,   y[m,n] = bias[n] + sum_k bf16(x[m,k]) bf16(ŵ[n,k])    in fp32

Each panel of 64 columns is decoded once, scale and offset included, into a tile that stays in the
second-level cache, and all rows of the task are multiplied with it: what `quantized_linear_kernel`
does per block of 8 rows and per group is done once. Shape of the inner loop: 6 rows x 4 vectors of
sums stay in registers over the whole of K. Needs AVX512_BF16.
"""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.llvm_helpers import LLVM_HELPERS
from ridgeline.codegen.tvm.quantized_linear_parts import (
    LANES,
    PANEL,
    PANEL_VECTORS,
    STEP,
    Spec,
    fma,
    fp32,
    lanes,
    pieces,
    splat,
)

ROWS = 6
"""Rows of a block: 6 x 4 sums, 4 vectors of weights and a pair of x fill the 32 registers."""

ROWS_PER_TASK = 128
"""A task is one panel for so many rows: decoding costs some 5 % of their products."""


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, codes, scale, offset, bias, y), a `tvm.tirx.PrimFunc`.

    The arguments are those of `quantized_linear_kernel.build`; `spec.dot` must hold.
    """
    n_out, n_in, group = spec.out_features, spec.in_features, spec.group_size
    panels, groups, steps, per_group = spec.panels, spec.groups, spec.steps, group // STEP
    nv, centre, pairs = PANEL_VECTORS, 2 ** (spec.bits - 1), spec.steps * STEP // 2
    loop = T.parallel if spec.parallel else T.serial
    code_dtype = "int16" if spec.bits == 4 else "int8"
    code_shape = (panels, steps, 1 if spec.bits == 4 else 4, nv, 2 * LANES)
    group_shape = (panels, groups, nv, LANES)
    ramp = lanes(0)
    even = T.bitwise_and(ramp * splat(2), splat(15)) - splat(centre)
    even_bits = T.reinterpret(T.Cast("float32x16", even), dtype="int32x16")
    odd_bits = T.reinterpret(T.Cast("float32x16", even + splat(1)), dtype="int32x16")
    low_half = T.bitwise_and(T.shift_right(even_bits, splat(16)), splat(0xFFFF))
    bf16_table = T.bitwise_or(low_half, odd_bits)
    shared = pieces(spec)
    matrix, pair_code, prepare, store = (
        shared.matrix,
        shared.pair_code,
        shared.prepare,
        shared.store,
    )

    def base(scale, offset, panel, g, j):
        """What ŵ is where the centred code is 0."""
        if spec.scheme == "symmetric":
            return splat(T.float32(0))
        factor = fp32(scale[panel, g, j, lanes(0)], spec.scale)
        least = fp32(offset[panel, g, j, lanes(0)], spec.offset)
        if spec.scheme == "minimum":
            return fma(factor, splat(T.float32(centre)), least)
        return factor * (splat(T.float32(centre)) - least)

    def bf16_bits(vector):
        return T.Cast("int32x16", T.call_extern("uint16x16", "rl_cvtbf16", vector))

    @T.inline
    def decode(table, codes, scale, offset, tile, panel):
        """The panel as bf16 pairs: lane l of tile[i, j] holds features 2 i + {0, 1}."""
        factor = T.alloc_buffer((nv, LANES), "float32")
        zero = T.alloc_buffer((nv, LANES), "float32")
        pair = T.alloc_buffer((LANES,), "int32")
        for g in T.serial(groups):
            for j in T.unroll(nv):
                factor[j, lanes(0)] = fp32(scale[panel, g, j, lanes(0)], spec.scale)
                zero[j, lanes(0)] = base(scale, offset, panel, g, j)
            for s in T.serial(T.min(per_group, steps - g * per_group)):
                for j in T.unroll(nv):
                    for i in T.unroll(STEP // 2):
                        pair[lanes(0)] = pair_code(table, codes, panel, g * per_group + s, j, i)
                        tile[(g * per_group + s) * (STEP // 2) + i, j, lanes(0)] = T.bitwise_or(
                            bf16_bits(
                                fma(
                                    factor[j, lanes(0)],
                                    T.reinterpret(
                                        T.shift_left(pair[lanes(0)], splat(16)),
                                        dtype="float32x16",
                                    ),
                                    zero[j, lanes(0)],
                                )
                            ),
                            T.shift_left(
                                bf16_bits(
                                    fma(
                                        factor[j, lanes(0)],
                                        T.reinterpret(
                                            T.bitwise_and(pair[lanes(0)], splat(-65536)),
                                            dtype="float32x16",
                                        ),
                                        zero[j, lanes(0)],
                                    )
                                ),
                                splat(16),
                            ),
                        )

    @T.inline
    def block(tile, bias, xw, y, panel, row, rows):
        """`rows` rows of y from `row` on, and the panel's 64 columns."""
        acc = T.alloc_buffer((rows, nv, LANES), "float32")
        out = T.alloc_buffer((LANES,), "float32")
        for m in T.unroll(rows):
            for j in T.unroll(nv):
                acc[m, j, lanes(0)] = splat(T.float32(0))
        for i in T.serial(pairs):
            for m in T.unroll(rows):
                for j in T.unroll(nv):
                    acc[m, j, lanes(0)] = T.call_extern(
                        "float32x16",
                        "rl_dpbf16",
                        acc[m, j, lanes(0)],
                        splat(xw[row + m, i]),
                        tile[i, j, lanes(0)],
                    )
        for m in T.unroll(rows):
            for j in T.unroll(nv):
                out[lanes(0)] = acc[m, j, lanes(0)]
                store(y, bias, out, panel * PANEL + j * LANES, row + m)

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, c: T.handle, d: T.handle, e: T.handle, f: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        rows = T.int64()
        x = matrix(a, rows, n_in)
        codes = T.match_buffer(b, code_shape, code_dtype)
        scale = T.match_buffer(c, group_shape, spec.scale)
        offset = scale if spec.offset == "none" else T.match_buffer(d, group_shape, spec.offset)
        bias = scale if spec.bias == "none" else T.match_buffer(e, (n_out,), spec.bias)
        y = matrix(f, rows, n_out)
        with T.attr(0, "pragma_import_llvm", LLVM_HELPERS):
            xw = T.alloc_buffer((rows, groups * group // 2), "int32")
            xsum = T.alloc_buffer((rows, groups), "float32")
            for m in loop(rows):
                prepare(x, xw, xsum, m)
            chunks = (rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK
            for task in loop(panels * chunks):
                table = T.alloc_buffer((LANES,), "int32")
                tile = T.alloc_buffer((pairs, nv, LANES), "int32")
                table[lanes(0)] = bf16_table
                panel = task // chunks
                first = task % chunks * ROWS_PER_TASK
                count = T.min(rows - first, ROWS_PER_TASK)
                decode(table, codes, scale, offset, tile, panel)
                for n in T.serial(count // ROWS):
                    block(tile, bias, xw, y, panel, first + n * ROWS, ROWS)
                if count % ROWS >= 4:
                    block(tile, bias, xw, y, panel, first + count // ROWS * ROWS, 4)
                if count % ROWS % 4 >= 2:
                    block(tile, bias, xw, y, panel, first + count - count % ROWS % 4, 2)
                if count % ROWS % 2 == 1:
                    block(tile, bias, xw, y, panel, first + count - 1, 1)

    return main
