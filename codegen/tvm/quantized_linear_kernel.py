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

import math
from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.llvm_helpers import LLVM_HELPERS

LANES = 16
PANEL_VECTORS = 4
PANEL = LANES * PANEL_VECTORS
STEP = 8
"""Input features per step of the inner loop: one 16-bit word of 4-bit codes holds four of them."""

MANY_ROWS = 16
"""Rows from which preparing them is shared among threads too: some 0.3 us each."""

ROWS_PER_TASK = 32
"""A task is one panel for so many rows: enough tasks to balance threads where panels are few."""

_PERMUTE_16 = "llvm.x86.avx512.permvar.hi.512"
_PERMUTE_32 = "llvm.x86.avx512.permvar.sf.512"


class Spec(NamedTuple):
    """What one compiled kernel is specialised on; the number of rows is not part of it.

    dtypes are TVM's names, offset and bias "none" where absent; multiply is "bfloat16" or
    "float32"; lead: x and y have a leading dimension of size 1; parallel: panels run on many
    threads.
    """

    out_features: int
    in_features: int
    group_size: int
    bits: int
    scale: str
    offset: str
    bias: str
    activation: str
    multiply: str
    isa: str
    lead: bool
    parallel: bool

    @property
    def scheme(self) -> str:
        """ "symmetric", "minimum" or "zero_point", read off the offset as in the law."""
        if self.offset == "none":
            return "symmetric"
        return "minimum" if "float" in self.offset else "zero_point"

    @property
    def panels(self) -> int:
        return math.ceil(self.out_features / PANEL)

    @property
    def groups(self) -> int:
        return math.ceil(self.in_features / self.group_size)

    @property
    def steps(self) -> int:
        return math.ceil(self.in_features / STEP)

    @property
    def row_blocks(self) -> tuple[int, ...]:
        """Rows that share one decoded vector, largest first; accumulators must fit registers.

        AVX-512 has 32 registers: 8 rows x 2 vectors. Elsewhere a 16-lane vector takes two of 16
        (AVX2) or four of 32 (NEON) registers.
        """
        return (2, 1) if self.isa == "generic" else (8, 4, 2, 1)


def _lanes(start: Any, count: int = LANES) -> Any:
    return T.ramp(start, 1, count)


def _splat(value: Any, count: int = LANES) -> Any:
    return T.broadcast(value, count)


def _fp32(vector: Any, dtype: str) -> Any:
    return vector if dtype == "float32" else T.Cast("float32x16", vector)


def _fma(a: Any, b: Any, c: Any) -> Any:
    fma = T.llvm_lookup_intrinsic_id("llvm.fma")
    return T.call_llvm_pure_intrin(fma, a, b, c, dtype="float32x16")


def _rounded(vector: Any) -> Any:
    bits = T.call_extern("int16x16", "rl_cvtbf16", vector)
    return T.call_extern("float32x16", "rl_cvtf32", bits)


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, codes, scale, offset, bias, y), a `tvm.tirx.PrimFunc`.

    x [M, in_features] and y [M, out_features] are contiguous, [1, M, .] if `spec.lead`; codes,
    scale and offset as `quantized_linear.pack` lays them out; offset and bias None where absent.
    """
    n_out, n_in, group = spec.out_features, spec.in_features, spec.group_size
    panels, groups, steps, per_group = spec.panels, spec.groups, spec.steps, group // STEP
    nv, centre = PANEL_VECTORS, 2 ** (spec.bits - 1)
    rounds = spec.multiply == "bfloat16"
    dot = rounds and spec.isa == "avx512_bf16"
    loop = T.parallel if spec.parallel else T.serial
    code_dtype = "int16" if spec.bits == 4 else "int8"
    code_shape = (panels, steps, 1 if spec.bits == 4 else 4, nv, 2 * LANES)
    group_shape = (panels, groups, nv, LANES)
    xw_row, xw_dtype = (groups * group // 2, "int32") if dot else (groups * group, "float32")
    most = spec.row_blocks[0]
    has_bias = spec.bias != "none"
    ragged = n_out % PANEL != 0
    ramp = _lanes(0)
    even = T.bitwise_and(ramp * _splat(2), _splat(15)) - _splat(centre)
    even_bits = T.reinterpret(T.Cast("float32x16", even), dtype="int32x16")
    odd_bits = T.reinterpret(T.Cast("float32x16", even + _splat(1)), dtype="int32x16")
    low_half = T.bitwise_and(T.shift_right(even_bits, _splat(16)), _splat(0xFFFF))
    bf16_table = T.bitwise_or(low_half, odd_bits)
    fp32_table = T.reinterpret(T.Cast("float32x16", ramp - _splat(centre)), dtype="int32x16")
    permute_16 = T.llvm_lookup_intrinsic_id(_PERMUTE_16) if spec.isa == "avx512_bf16" else None
    permute_32 = T.llvm_lookup_intrinsic_id(_PERMUTE_32) if spec.isa != "generic" else None

    def matrix(argument, rows, columns):
        """x or y: [rows, columns], behind a leading 1 if `spec.lead`."""
        shape = (1, rows, columns) if spec.lead else (rows, columns)
        return T.match_buffer(argument, shape, spec.activation)

    def at(row, column):
        return (0, row, column) if spec.lead else (row, column)

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

    def pair_code(table, codes, panel, step, j, i):
        """Codes of features 8 step + 2 i + {0, 1}, as 16 bf16 pairs."""
        if spec.bits == 8:
            word = codes[panel, step, i, j, _lanes(0, 32)]
            return T.call_extern("int32x16", "rl_i8_bf16", word)
        word = T.shift_right(
            codes[panel, step, 0, j, _lanes(0, 32)], _splat(T.Cast("int16", 4 * i), 32)
        )
        entry = T.call_llvm_pure_intrin(
            permute_16, T.reinterpret(table[_lanes(0)], dtype="int16x32"), word, dtype="int16x32"
        )
        return T.reinterpret(entry, dtype="int32x16")

    def code(table, codes, panel, step, j, i):
        """Codes of feature 8 step + i, as 16 fp32."""
        if spec.bits == 8:
            word = T.reinterpret(codes[panel, step, i // 2, j, _lanes(0, 32)], dtype="int16x16")
            top = T.shift_left(word, _splat(T.Cast("int16", 8 - i % 2 * 8)))
            return T.Cast("float32x16", T.shift_right(top, _splat(T.int16(8))))
        word = T.reinterpret(codes[panel, step, 0, j, _lanes(0, 32)], dtype="int32x16")
        word = T.shift_right(word, _splat(i % 2 * 16 + i // 2 * 4))
        if spec.isa != "generic":
            table_row = T.reinterpret(table[_lanes(0)], dtype="float32x16")
            return T.call_llvm_pure_intrin(permute_32, table_row, word, dtype="float32x16")
        return T.Cast("float32x16", T.bitwise_and(word, _splat(15)) - _splat(centre))

    def start(offset, xsum, row, panel, g, j):
        if spec.scheme == "symmetric":
            return _splat(T.float32(0))
        if spec.scheme == "minimum":
            return _splat(T.float32(centre) * xsum[row, g])
        zero = _fp32(offset[panel, g, j, _lanes(0)], spec.offset)
        return (_splat(T.float32(centre)) - zero) * _splat(xsum[row, g])

    def term(offset, xsum, row, panel, g, j, total):
        if spec.scheme != "minimum":
            return total
        least = _fp32(offset[panel, g, j, _lanes(0)], spec.offset)
        return _fma(least, _splat(xsum[row, g]), total)

    @T.inline
    def put(x32, sums, xw, row, at):
        """Sixteen inputs into the work copy, in the multiply dtype, and into their group's sum."""
        if rounds:
            x32[_lanes(0)] = _rounded(x32[_lanes(0)])
        sums[_lanes(0)] = sums[_lanes(0)] + x32[_lanes(0)]
        if dot:
            xw[row, T.ramp(at // 2, 1, 8)] = T.reinterpret(
                T.call_extern("int16x16", "rl_cvtbf16", x32[_lanes(0)]), dtype="int32x8"
            )
        else:
            xw[row, _lanes(at)] = x32[_lanes(0)]

    @T.inline
    def prepare(x, xw, xsum, row):
        """Pads one row of x to whole groups and sums it per group."""
        x32 = T.alloc_buffer((LANES,), "float32")
        sums = T.alloc_buffer((LANES,), "float32")
        for g in T.serial(groups):
            sums[_lanes(0)] = _splat(T.float32(0))
            for v in T.serial(group // LANES):
                if g * group + v * LANES + LANES <= n_in:
                    x32[_lanes(0)] = _fp32(
                        x[at(row, _lanes(g * group + v * LANES))], spec.activation
                    )
                else:
                    for lane in T.serial(LANES):
                        x32[lane] = T.float32(0)
                        if g * group + v * LANES + lane < n_in:
                            x32[lane] = T.Cast("float32", x[at(row, g * group + v * LANES + lane)])
                put(x32, sums, xw, row, g * group + v * LANES)
            xsum[row, g] = T.call_extern("float32", "rl_hsum", sums[_lanes(0)])

    @T.inline
    def multiply(table, codes, xw, acc, panel, first, width, step, row, rows):
        """One step: STEP features of one panel against `rows` rows."""
        if dot:
            pair = T.alloc_buffer((LANES,), "int32")
            for t in T.unroll(STEP // 2 * width):
                i, j = order(t, STEP // 2, width, rows)
                pair[_lanes(0)] = pair_code(table, codes, panel, step, first + j, i)
                for m in T.unroll(rows):
                    acc[m, j, i % chains(rows), _lanes(0)] = T.call_extern(
                        "float32x16",
                        "rl_dpbf16",
                        acc[m, j, i % chains(rows), _lanes(0)],
                        _splat(xw[row + m, step * (STEP // 2) + i]),
                        pair[_lanes(0)],
                    )
        else:
            one = T.alloc_buffer((LANES,), "float32")
            for t in T.unroll(STEP * width):
                i, j = order(t, STEP, width, rows)
                one[_lanes(0)] = code(table, codes, panel, step, first + j, i)
                for m in T.unroll(rows):
                    acc[m, j, i % chains(rows), _lanes(0)] = _fma(
                        _splat(xw[row + m, step * STEP + i]),
                        one[_lanes(0)],
                        acc[m, j, i % chains(rows), _lanes(0)],
                    )

    @T.inline
    def store(y, bias, total, column, row):
        """One vector of results, with the bias; the last vector of a ragged N goes lane by lane."""
        if not ragged:
            if has_bias:
                total[_lanes(0)] = total[_lanes(0)] + _fp32(bias[_lanes(column)], spec.bias)
            if spec.activation == "float32":
                T.buffer_store(y, total[_lanes(0)], at(row, _lanes(column)))
            else:
                value = T.Cast(spec.activation + "x16", total[_lanes(0)])
                T.buffer_store(y, value, at(row, _lanes(column)))
        else:
            for lane in T.serial(LANES):
                if column + lane < n_out:
                    if has_bias:
                        total[lane] = total[lane] + T.Cast("float32", bias[column + lane])
                    T.buffer_store(y, T.Cast(spec.activation, total[lane]), at(row, column + lane))

    @T.inline
    def block(table, codes, scale, offset, bias, xw, xsum, y, panel, row, rows, first, width):
        """`rows` rows of y from `row` on, and `width` vectors of the panel from `first` on."""
        total = T.alloc_buffer((rows, width, LANES), "float32")
        acc = T.alloc_buffer((rows, width, chains(rows), LANES), "float32")
        factor = T.alloc_buffer((LANES,), "float32")
        out = T.alloc_buffer((LANES,), "float32")
        for m in T.unroll(rows):
            for j in T.unroll(width):
                total[m, j, _lanes(0)] = _splat(T.float32(0))
        for g in T.serial(groups):
            for m in T.unroll(rows):
                for j in T.unroll(width):
                    acc[m, j, 0, _lanes(0)] = start(offset, xsum, row + m, panel, g, first + j)
                    if chains(rows) == 2:
                        acc[m, j, 1, _lanes(0)] = _splat(T.float32(0))
            for step in T.serial(trips(g)):
                multiply(
                    table, codes, xw, acc, panel, first, width, g * per_group + step, row, rows
                )
            for j in T.unroll(width):
                factor[_lanes(0)] = _fp32(scale[panel, g, first + j, _lanes(0)], spec.scale)
                for m in T.unroll(rows):
                    if chains(rows) == 2:
                        acc[m, j, 0, _lanes(0)] = acc[m, j, 0, _lanes(0)] + acc[m, j, 1, _lanes(0)]
                    total[m, j, _lanes(0)] = _fma(
                        factor[_lanes(0)],
                        acc[m, j, 0, _lanes(0)],
                        term(offset, xsum, row + m, panel, g, first + j, total[m, j, _lanes(0)]),
                    )
        for m in T.unroll(rows):
            for j in T.unroll(width):
                out[_lanes(0)] = total[m, j, _lanes(0)]
                store(y, bias, out, panel * PANEL + (first + j) * LANES, row + m)

    @T.inline
    def rows_of(operands, row, rows, width):
        """A whole panel, `width` vectors at a time."""
        for part in T.serial(nv // width):
            block(*operands, row, rows, part * width, width)

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
            xw = T.alloc_buffer((rows, xw_row), xw_dtype)
            xsum = T.alloc_buffer((rows, groups), "float32")
            if rows >= MANY_ROWS:
                for m in loop(rows):
                    prepare(x, xw, xsum, m)
            else:
                for m in T.serial(rows):
                    prepare(x, xw, xsum, m)
            chunks = (rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK
            for task in loop(panels * chunks):
                table = T.alloc_buffer((LANES,), "int32")
                if dot:
                    table[_lanes(0)] = bf16_table
                else:
                    table[_lanes(0)] = fp32_table
                panel = task // chunks
                first = task % chunks * ROWS_PER_TASK
                count = T.min(rows - first, ROWS_PER_TASK)
                weight = (table, codes, scale, offset, bias, xw, xsum, y, panel)
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
