"""The CPU kernel of `ridgeline::quantized_linear` for many rows, as one TVMScript function.

Law, for 16-bit products from `ridgeline.ir.quantized_linear.MANY_ROWS` rows on:

    ŵ[n,k] rounded to bf16,   y[m,n] = bias[n] + sum_k bf16(x[m,k]) bf16(ŵ[n,k])    in fp32

Each panel of columns is decoded once (`quantized_linear_decode`), scale and offset included, into a
tile that stays in the second-level cache, and all rows of the task are multiplied with it: what the
kernels of few rows do per block of rows and per group is done once. Shape of the inner loop: 6 rows
x 4 vectors of sums stay in registers over the whole of K. Needs AVX512_BF16.
"""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers
from ridgeline.codegen.tvm.quantized_linear_decode import (
    binary_decode,
    scale_shape_of,
    uniform_decode,
)
from ridgeline.codegen.tvm.quantized_linear_parts import (
    LANES,
    Spec,
    bf16_table,
    lanes,
    pieces,
    splat,
)

ROWS = 6
"""Rows of a block: 6 x 4 sums, 4 vectors of weights and a pair of x fill the 32 registers."""

ROWS_PER_TASK = 128
"""A task is one panel for so many rows: decoding costs some 5 % of their products."""


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, codes, scale, offset, bias, row_scale, permutation, y).

    The arguments are those of `quantized_linear_kernel.build`; `spec.dot` must hold, and groups be
    rows' own.
    """
    n_out, n_in, nv = spec.out_features, spec.in_features, spec.vectors
    panels, pairs, held = spec.panels, spec.padded // 2, spec.groups * spec.group_size // 2
    loop = T.parallel if spec.parallel else T.serial
    layout = binary_decode if spec.codec == "binary" else uniform_decode
    decode, code_shape, code_dtype = layout(spec)
    scale_shape = scale_shape_of(spec)
    shared = pieces(spec)
    matrix, prepare, store = shared.matrix, shared.prepare, shared.store
    table_words = bf16_table(spec) if spec.codec != "binary" else splat(0)

    @T.inline
    def block(tile, bias, row_scale, xw, y, panel, row, rows):
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
                store(y, bias, row_scale, out, (panel * nv + j) * LANES, row + m, n_out)

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
        scale = T.match_buffer(c, scale_shape, spec.scale)
        offset = (
            scale
            if spec.offset == "none"
            else T.match_buffer(d, (panels, spec.groups, nv, LANES), spec.offset)
        )
        bias = scale if spec.bias == "none" else T.match_buffer(e, (n_out,), spec.bias)
        row_scale = (
            scale if spec.row_scale == "none" else T.match_buffer(f, (n_out,), spec.row_scale)
        )
        permutation = (
            scale if spec.permutation == "none" else T.match_buffer(g, (n_in,), spec.permutation)
        )
        y = matrix(h, rows, n_out)
        with T.attr(0, "pragma_import_llvm", llvm_helpers(spec.isa)):
            xw = T.alloc_buffer((rows, held), "int32")
            xsum = T.alloc_buffer((rows, spec.groups), "float32")
            for m in loop(rows):
                prepare(x, permutation, xw, xsum, m)
            chunks = (rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK
            for task in loop(panels * chunks):
                table = T.alloc_buffer((LANES,), "int32")
                tile = T.alloc_buffer((pairs, nv, LANES), "int32")
                table[lanes(0)] = table_words
                panel = task // chunks
                first = task % chunks * ROWS_PER_TASK
                count = T.min(rows - first, ROWS_PER_TASK)
                decode(table, codes, scale, offset, tile, panel)
                for n in T.serial(count // ROWS):
                    block(tile, bias, row_scale, xw, y, panel, first + n * ROWS, ROWS)
                if count % ROWS >= 4:
                    block(tile, bias, row_scale, xw, y, panel, first + count // ROWS * ROWS, 4)
                if count % ROWS % 4 >= 2:
                    block(tile, bias, row_scale, xw, y, panel, first + count - count % ROWS % 4, 2)
                if count % ROWS % 2 == 1:
                    block(tile, bias, row_scale, xw, y, panel, first + count - 1, 1)

    return main
