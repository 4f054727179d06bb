"""The CPU kernel of `ridgeline::quantized_linear` for codec "binary", as one TVMScript function.

Law, for segments s of the input features and planes i, with x in the multiply dtype:

    table[m,k/4,c] = sum_{b<4} (2 bit_b(c) - 1) x[m,k+b]                       sums of four inputs
    acc[m,n,s,i]   = sum over the quads of s of table[m, quad, nibble of plane i of n there]
    total[m,n]     = sum_s sum_i α[n,g(s),i] acc[m,n,s,i] + sum_g offset[n,g] xsum[m,g]
    y[m,n]         = row_scale[n] total[m,n] + bias[n]

One lookup stands for four multiplications, and no weight is ever decoded. Tables are fp32, looked
up by `vpermps` (elsewhere by gathers), and a segment is a group; or, for fixed-point products on
`isa.BYTE_TABLES`, they are 16-bit integers held as two byte tables. There a segment lies in one
group and in one block, which shares a step; the sums of both bytes are exact:

    32768 + sum of four = 256 high + low         acc = step (256 sum high + sum low - 32768 quads)

`vpermb` looks 64 bytes up in the tables of four quads at once, `vpdpbusd` adds the four bytes of a
lane: 16 columns x 16 features of one plane per pair of instructions. Groups shared by rows, of 1 or
8 features ("shared" of `binary_linear_layout`): α x takes the place of x, all planes are one, and
fixed-point blocks are those of α x. Source: T-MAC; ShiftAddLLM, after LUT-GEMM.
"""

import math
from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.binary_linear_layout import STEP, is_shared, panels_of
from ridgeline.codegen.tvm.isa import BYTE_TABLES
from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers
from ridgeline.codegen.tvm.quantized_linear_decode import POWER_UNIT, alpha, scale_shape_of
from ridgeline.codegen.tvm.quantized_linear_parts import (
    LANES,
    Spec,
    fma,
    fp32,
    lanes,
    pieces,
    rounded,
    splat,
)
from ridgeline.ir.quantized_linear import FIXED_POINT_BLOCK

MANY_ROWS = 4
"""Rows from which their tables are built by all threads: some microseconds each."""

ROWS_PER_TASK = 16
"""A task is one panel for so many rows: its tables stay in the second-level cache."""

QUADS = STEP // 4

_PERMUTE_32 = "llvm.x86.avx512.permvar.sf.512"


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, codes, scale, offset, bias, row_scale, permutation, y), a
    `tvm.tirx.PrimFunc`; arguments as of `quantized_linear_kernel.build`.
    """
    n_out, n_in, shared = spec.out_features, spec.in_features, is_shared(spec.group_size)
    group_rows, panels = panels_of(n_out, spec.bits, spec.group_size, spec.group_rows)
    held_rows = min(spec.group_rows, n_out) if shared else n_out
    octets, fixed = spec.isa == BYTE_TABLES, spec.multiply == "int16"
    planes, copies = (1, spec.bits) if shared else (spec.bits, 1)
    columns, nv = copies * spec.padded, spec.vectors
    steps, per_block = columns // STEP, FIXED_POINT_BLOCK // LANES
    blocks = math.ceil(columns / FIXED_POINT_BLOCK)
    segment = FIXED_POINT_BLOCK if shared else spec.group_size
    segment = math.gcd(segment, FIXED_POINT_BLOCK) if octets else segment
    segments, per_segment = math.ceil(columns / segment), segment // STEP
    unit, power = POWER_UNIT if spec.terms else 1.0, octets and bool(spec.terms) and not shared
    held = blocks * FIXED_POINT_BLOCK
    loop = T.parallel if spec.parallel else T.serial
    shared_parts = pieces(spec)
    matrix, read, fix, store = (
        shared_parts.matrix,
        shared_parts.read,
        shared_parts.fix,
        shared_parts.store,
    )
    code_shape = (group_rows * panels, steps, planes, nv, 4 * LANES)
    scale_shape = scale_shape_of(spec)
    offset_shape = (spec.panels, spec.groups, nv, LANES)
    if shared:
        terms = (spec.terms,) if spec.terms else ()
        scale_shape = (group_rows, spec.bits, *terms, spec.padded)
        offset_shape = (group_rows, spec.padded)
    table_shape = (held // STEP, 2, 2, 64) if octets else (held // STEP, QUADS, LANES)
    sums_shape = (nv, planes, 2 if octets else 1, LANES)
    permute_32 = T.llvm_lookup_intrinsic_id(_PERMUTE_32) if spec.isa != "generic" else None

    def sign_of(b):
        """The sign with which input b of a quad enters each of its 16 sums."""
        bit = T.bitwise_and(T.shift_right(lanes(0), splat(b)), splat(1))
        return T.Cast("float32x16", bit * splat(2) - splat(1))

    def quad_of_byte():
        """16 times its place in a lane, for each of 64 bytes: whose table it looks into."""
        return T.reinterpret(splat(0x30201000), dtype="uint8x64")

    def trips(s):
        """Steps of segment s; a constant wherever it can be, so that the loop is unrolled."""
        whole = steps % per_segment == 0
        return per_segment if whole else T.min(per_segment, steps - s * per_segment)

    def entry(tables, row, step, quad, index):
        """table[low nibble of index], in each lane."""
        if permute_32 is not None:
            table = tables[row, step, quad, lanes(0)]
            return T.call_llvm_pure_intrin(permute_32, table, index, dtype="float32x16")
        return tables[row, step, quad, T.bitwise_and(index, splat(15))]

    def value(acc, j, p):
        """acc of the law in units of the step, fp32x16."""
        if not octets:
            return acc[j, p, 0, lanes(0)]
        whole = T.shift_left(acc[j, p, 0, lanes(0)], splat(8)) + acc[j, p, 1, lanes(0)]
        return T.Cast("float32x16", whole)

    def column_of(panel, r, j):
        """The first column of vector j."""
        return r * held_rows + (panel - r * panels) * (nv * LANES) + j * LANES

    def end_of(r):
        """The column at which the panels of group row r end."""
        return T.Cast("int64", T.min((r + 1) * held_rows, n_out))

    @T.inline
    def fill(x, permutation, scale, xw, row, r):
        """x of the row in stored order, or α x plane after plane, padded with zeros."""
        x32 = T.alloc_buffer((LANES,), "float32")
        for v in T.serial(spec.padded // LANES):
            read(x, permutation, x32, row, v * LANES)
            if spec.rounds:
                x32[lanes(0)] = rounded(x32[lanes(0)])
            if shared:
                for i in T.serial(copies):
                    factor = T.meta_var(alpha(spec, scale, (r, i), (lanes(v * LANES),)))
                    xw[row, lanes(i * spec.padded + v * LANES)] = x32[lanes(0)] * (
                        factor * splat(T.float32(unit))
                    )
            else:
                xw[row, lanes(v * LANES)] = x32[lanes(0)]
        for v in T.serial((held - columns) // LANES):
            xw[row, lanes(columns + v * LANES)] = splat(T.float32(0))

    @T.inline
    def tabulate(xw, tables, row, step):
        """The sums of four of 32 inputs."""
        if octets:
            units = T.alloc_buffer((LANES,), "int32")
            for half in T.unroll(2):
                units[lanes(0)] = T.Cast("int32x16", xw[row, lanes(step * STEP + half * LANES)])
                tables[row, step, half, 0, lanes(0, 64)] = T.call_extern(
                    "uint8x64", "rl_sums_high", units[lanes(0)]
                )
                tables[row, step, half, 1, lanes(0, 64)] = T.call_extern(
                    "uint8x64", "rl_sums_low", units[lanes(0)]
                )
        else:
            total = T.alloc_buffer((LANES,), "float32")
            for quad in T.serial(QUADS):
                total[lanes(0)] = splat(T.float32(0))
                for b in T.unroll(4):
                    total[lanes(0)] = fma(
                        splat(xw[row, step * STEP + quad * 4 + b]), sign_of(b), total[lanes(0)]
                    )
                tables[row, step, quad, lanes(0)] = total[lanes(0)]

    @T.inline
    def prepare(x, permutation, scale, offset, xw, tables, steps_of, xsum, row, r):
        """Tables, steps and sums per group of one row of x."""
        fill(x, permutation, scale, xw, row, r)
        step = T.alloc_buffer((1,), "float32")
        sums = T.alloc_buffer((LANES,), "float32")
        for b in T.serial(blocks):
            if fixed:
                fix(xw, step, row, b * FIXED_POINT_BLOCK, per_block)
                steps_of[row, b] = step[0]
            if octets:
                for s in T.serial(FIXED_POINT_BLOCK // STEP):
                    tabulate(xw, tables, row, b * (FIXED_POINT_BLOCK // STEP) + s)
            if fixed:
                for v in T.serial(per_block):
                    xw[row, lanes((b * per_block + v) * LANES)] = xw[
                        row, lanes((b * per_block + v) * LANES)
                    ] * splat(step[0])
            if not octets:
                for s in T.serial(FIXED_POINT_BLOCK // STEP):
                    tabulate(xw, tables, row, b * (FIXED_POINT_BLOCK // STEP) + s)
        if spec.offset != "none":
            if shared:
                x32 = T.alloc_buffer((LANES,), "float32")
                sums[lanes(0)] = splat(T.float32(0))
                for v in T.serial(spec.padded // LANES):
                    read(x, permutation, x32, row, v * LANES)
                    if spec.rounds:
                        x32[lanes(0)] = rounded(x32[lanes(0)])
                    least = fp32(offset[r, lanes(v * LANES)], spec.offset)
                    sums[lanes(0)] = fma(x32[lanes(0)], least, sums[lanes(0)])
                xsum[row, 0] = T.call_extern("float32", "rl_hsum", sums[lanes(0)])
            else:
                for g in T.serial(spec.groups):
                    sums[lanes(0)] = splat(T.float32(0))
                    for v in T.serial(
                        T.min(spec.group_size, spec.padded - g * spec.group_size) // LANES
                    ):
                        sums[lanes(0)] = (
                            sums[lanes(0)] + xw[row, lanes(g * spec.group_size + v * LANES)]
                        )
                    xsum[row, g] = T.call_extern("float32", "rl_hsum", sums[lanes(0)])

    @T.inline
    def look_up(tables, codes, acc, panel, row, step):
        """One step: 32 features of one panel against one row."""
        for p in T.unroll(planes):
            for j in T.unroll(nv):
                if octets:
                    word = T.alloc_buffer((64,), "uint8")
                    index = T.alloc_buffer((64,), "uint8")
                    word[lanes(0, 64)] = codes[panel, step, p, j, lanes(0, 64)]
                    for half in T.unroll(2):
                        index[lanes(0, 64)] = T.bitwise_or(
                            T.bitwise_and(
                                T.reinterpret(
                                    T.shift_right(
                                        T.reinterpret(word[lanes(0, 64)], dtype="int32x16"),
                                        splat(4 * half),
                                    ),
                                    dtype="uint8x64",
                                ),
                                splat(T.uint8(15), 64),
                            ),
                            quad_of_byte(),
                        )
                        for part in T.unroll(2):
                            acc[j, p, part, lanes(0)] = T.call_extern(
                                "int32x16",
                                "rl_byte_sums",
                                acc[j, p, part, lanes(0)],
                                tables[row, step, half, part, lanes(0, 64)],
                                index[lanes(0, 64)],
                            )
                else:
                    bits = T.alloc_buffer((LANES,), "int32")
                    bits[lanes(0)] = T.reinterpret(
                        codes[panel, step, p, j, lanes(0, 64)], dtype="int32x16"
                    )
                    for quad in T.unroll(QUADS):
                        index = T.meta_var(
                            T.shift_right(bits[lanes(0)], splat(quad % 4 * 8 + quad // 4 * 4))
                        )
                        acc[j, p, 0, lanes(0)] = acc[j, p, 0, lanes(0)] + entry(
                            tables, row, step, quad, index
                        )

    def factor_of(scale, index, j):
        """α of a plane's sums. Sums of x may be so small that 2**-63 of α leaves nothing of them:
        only those of integers are multiplied by the rest of it in the end."""
        factor = alpha(spec, scale, index, (j, lanes(0)))
        return factor if octets else factor * splat(T.float32(unit))

    @T.inline
    def panel_of(operands, panel, row, r):
        """One row of y in one panel."""
        tables, codes, scale, offset, steps_of, xsum = operands[:6]
        y, bias, row_scale = operands[6:]
        total = T.alloc_buffer((nv, LANES), "float32")
        acc = T.alloc_buffer(sums_shape, "int32" if octets else "float32")
        part = T.alloc_buffer((LANES,), "float32")
        for j in T.unroll(nv):
            total[j, lanes(0)] = splat(T.float32(0))
        for s in T.serial(segments):
            for j in T.unroll(nv):
                for p in T.unroll(planes):
                    if octets:
                        acc[j, p, 0, lanes(0)] = splat(0)
                        acc[j, p, 1, lanes(0)] = splat(trips(s) * (-32768 * QUADS))
                    else:
                        acc[j, p, 0, lanes(0)] = splat(T.float32(0))
            for step in T.serial(trips(s)):
                look_up(tables, codes, acc, panel, row, s * per_segment + step)
            for j in T.unroll(nv):
                if shared:
                    part[lanes(0)] = value(acc, j, 0)
                else:
                    part[lanes(0)] = splat(T.float32(0))
                    for p in T.unroll(planes):
                        part[lanes(0)] = fma(
                            factor_of(scale, (panel, s * segment // spec.group_size, p), j),
                            value(acc, j, p),
                            part[lanes(0)],
                        )
                if power:
                    part[lanes(0)] = part[lanes(0)] * splat(T.float32(POWER_UNIT))
                if octets:
                    total[j, lanes(0)] = fma(
                        splat(steps_of[row, s * segment // FIXED_POINT_BLOCK]),
                        part[lanes(0)],
                        total[j, lanes(0)],
                    )
                else:
                    total[j, lanes(0)] = total[j, lanes(0)] + part[lanes(0)]
        if spec.offset != "none":
            for j in T.unroll(nv):
                if shared:
                    total[j, lanes(0)] = total[j, lanes(0)] + splat(xsum[row, 0])
                else:
                    for g in T.serial(spec.groups):
                        total[j, lanes(0)] = fma(
                            fp32(offset[panel, g, j, lanes(0)], spec.offset),
                            splat(xsum[row, g]),
                            total[j, lanes(0)],
                        )
        for j in T.unroll(nv):
            part[lanes(0)] = total[j, lanes(0)]
            store(y, bias, row_scale, part, column_of(panel, r, j), row, end_of(r))

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
        codes = T.match_buffer(b, code_shape, "uint8")
        scale = T.match_buffer(c, scale_shape, spec.scale)
        offset = scale if spec.offset == "none" else T.match_buffer(d, offset_shape, spec.offset)
        bias = scale if spec.bias == "none" else T.match_buffer(e, (n_out,), spec.bias)
        row_scale = (
            scale if spec.row_scale == "none" else T.match_buffer(f, (n_out,), spec.row_scale)
        )
        permutation = (
            scale if spec.permutation == "none" else T.match_buffer(g, (n_in,), spec.permutation)
        )
        y = matrix(h, rows, n_out)
        with T.attr(0, "pragma_import_llvm", llvm_helpers(spec.isa)):
            xw = T.alloc_buffer((rows, held), "float32")
            tables = T.alloc_buffer((rows, *table_shape), "uint8" if octets else "float32")
            steps_of = T.alloc_buffer((rows, blocks), "float32")
            xsum = T.alloc_buffer((rows, 1 if shared else spec.groups), "float32")
            chunks = (rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK
            operands = T.meta_var(
                (tables, codes, scale, offset, steps_of, xsum, y, bias, row_scale)
            )
            for r in T.serial(group_rows):
                if rows >= MANY_ROWS:
                    for m in loop(rows):
                        prepare(x, permutation, scale, offset, xw, tables, steps_of, xsum, m, r)
                else:
                    for m in T.serial(rows):
                        prepare(x, permutation, scale, offset, xw, tables, steps_of, xsum, m, r)
                for task in loop(panels * chunks):
                    first = task % chunks * ROWS_PER_TASK
                    for m in T.serial(T.min(rows - first, ROWS_PER_TASK)):
                        panel_of(operands, r * panels + task // chunks, first + m, r)

    return main
