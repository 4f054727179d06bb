"""What the CPU kernels of `ridgeline::quantized_linear` share: sizes, decoding, reading, storing.

`pieces` gives expressions and `T.inline` parts of TVMScript functions; every condition on the spec
is settled while the kernel is written.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.binary_linear_layout import STEP as BINARY_STEP
from ridgeline.codegen.tvm.binary_linear_layout import is_shared
from ridgeline.codegen.tvm.binary_linear_layout import vectors as binary_vectors
from ridgeline.ir.quantized_linear import FIXED_POINT_BLOCK, FIXED_POINT_TOP

LANES = 16
PANEL_VECTORS = 4
PANEL = LANES * PANEL_VECTORS
STEP = 8
"""Input features per step of the inner loop: one 16-bit word of 4-bit codes holds four of them."""

TINY = 2.0**-126
"""The smallest normal fp32: what steps of fixed point are held above to divide by them."""

_PERMUTE_16 = "llvm.x86.avx512.permvar.hi.512"


class Spec(NamedTuple):
    """What one compiled kernel is specialised on; the number of rows is not part of it.

    dtypes are TVM's names, those of absent tensors "none"; multiply is "bfloat16", "float32" or
    "int16" (fixed point); lead: x and y have a leading dimension of size 1; parallel: panels run
    on many threads.
    """

    codec: str
    out_features: int
    in_features: int
    group_size: int
    group_rows: int
    bits: int
    terms: int
    scale: str
    offset: str
    bias: str
    row_scale: str
    permutation: str
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
    def vectors(self) -> int:
        """Vectors of a panel."""
        if self.codec != "binary":
            return PANEL_VECTORS
        return binary_vectors(self.bits, is_shared(self.group_size))

    @property
    def panels(self) -> int:
        return math.ceil(self.out_features / (LANES * self.vectors))

    @property
    def groups(self) -> int:
        return math.ceil(self.in_features / self.group_size)

    @property
    def steps(self) -> int:
        return math.ceil(self.in_features / STEP)

    @property
    def padded(self) -> int:
        """Input features, padded to whole steps of the codec's layout."""
        step = BINARY_STEP if self.codec == "binary" else STEP
        return math.ceil(self.in_features / step) * step

    @property
    def wide(self) -> bool:
        """Does a code take a byte, rather than a nibble? Not of "binary"."""
        return self.bits // self.terms > 4

    @property
    def rounds(self) -> bool:
        """Is x rounded to bf16 before it is multiplied?"""
        return self.multiply == "bfloat16"

    @property
    def dot(self) -> bool:
        """Are products of bf16 pairs formed by one instruction?"""
        return self.rounds and self.isa == "avx512_bf16"

    @property
    def row_blocks(self) -> tuple[int, ...]:
        """Rows that share one decoded vector, largest first; accumulators must fit registers.

        AVX-512 has 32 registers: 8 rows x 2 vectors. Elsewhere a 16-lane vector takes two of 16
        (AVX2) or four of 32 (NEON) registers.
        """
        return (2, 1) if self.isa == "generic" else (8, 4, 2, 1)


def lanes(start: Any, count: int = LANES) -> Any:
    return T.ramp(start, 1, count)


def splat(value: Any, count: int = LANES) -> Any:
    return T.broadcast(value, count)


def fp32(vector: Any, dtype: str) -> Any:
    return vector if dtype == "float32" else T.Cast("float32x16", vector)


def fma(a: Any, b: Any, c: Any) -> Any:
    fma = T.llvm_lookup_intrinsic_id("llvm.fma")
    return T.call_llvm_pure_intrin(fma, a, b, c, dtype="float32x16")


def rounded(vector: Any) -> Any:
    bits = T.call_extern("int16x16", "rl_cvtbf16", vector)
    return T.call_extern("float32x16", "rl_cvtf32", bits)


def float_of_byte(octets: Any) -> Any:
    """int8x16 in the form of shift codes, sign and exponent: ±2**(low 7 bits - 127), 0 for 0."""
    word = T.shift_left(T.Cast("int32x16", octets), splat(23))
    return T.reinterpret(T.bitwise_and(word, splat(-0x40800000)), dtype="float32x16")


def code_bits(spec: Spec, nibble: Any) -> Any:
    """The bits of the fp32 value of 4-bit codes, int32x16 as they are: centred, or a shift."""
    if spec.codec == "uniform":
        centred = nibble - splat(2 ** (spec.bits - 1))
        return T.reinterpret(T.Cast("float32x16", centred), dtype="int32x16")
    shift = T.bitwise_and(nibble, splat(7))
    sign = T.shift_left(T.shift_right(nibble, splat(3)), splat(31))
    value = T.bitwise_or(sign, T.shift_left(splat(127) - shift, splat(23)))
    return value * T.Cast("int32x16", shift < splat(7))


def bf16_table(spec: Spec) -> Any:
    """The 16 codes twice, as bf16: what `vpermw` looks nibbles up in without masking them."""
    even = T.bitwise_and(lanes(0) * splat(2), splat(15))
    low_half = T.bitwise_and(T.shift_right(code_bits(spec, even), splat(16)), splat(0xFFFF))
    odd = T.bitwise_and(code_bits(spec, even + splat(1)), splat(-0x10000))
    return T.bitwise_or(low_half, odd)


def pieces(spec: Spec) -> SimpleNamespace:
    """matrix, at: x and y, behind a leading 1 if `spec.lead`. pair_code: the codes of two features
    as bf16. read: inputs in stored order. fix: rounds them to fixed point. prepare: a row of x in
    the multiply dtype, and its sum per group. store: a vector of y.
    """
    n_out, n_in, group = spec.out_features, spec.in_features, spec.group_size
    rounds, dot, groups = spec.rounds, spec.dot, spec.groups
    has_bias, scaled = spec.bias != "none", spec.row_scale != "none"
    permuted, fixed = spec.permutation != "none", spec.multiply == "int16"
    apart = spec.codec == "binary" and is_shared(spec.group_size) and spec.group_rows < n_out
    ragged = n_out % PANEL != 0 or (apart and spec.group_rows % PANEL != 0)
    per_block = FIXED_POINT_BLOCK // LANES
    permute_16 = T.llvm_lookup_intrinsic_id(_PERMUTE_16) if spec.isa == "avx512_bf16" else None
    roundeven = T.llvm_lookup_intrinsic_id("llvm.roundeven")

    def matrix(argument, rows, columns):
        """x or y: [rows, columns], behind a leading 1 if `spec.lead`."""
        shape = (1, rows, columns) if spec.lead else (rows, columns)
        return T.match_buffer(argument, shape, spec.activation)

    def at(row, column):
        return (0, row, column) if spec.lead else (row, column)

    def pair_code(table, codes, panel, step, term, j, i):
        """Codes of features 8 step + 2 i + {0, 1}, as 16 bf16 pairs."""
        if spec.wide:
            word = codes[panel, step, term, i, j, lanes(0, 32)]
            decoder = "rl_i8_bf16" if spec.codec == "uniform" else "rl_shift_bf16"
            return T.call_extern("int32x16", decoder, word)
        word = T.shift_right(
            codes[panel, step, term, 0, j, lanes(0, 32)], splat(T.Cast("int16", 4 * i), 32)
        )
        entry = T.call_llvm_pure_intrin(
            permute_16, T.reinterpret(table[lanes(0)], dtype="int16x32"), word, dtype="int16x32"
        )
        return T.reinterpret(entry, dtype="int32x16")

    @T.inline
    def read(x, permutation, x32, row, column):
        """Sixteen inputs from stored column `column` on, zeros beyond the last, into x32."""
        if permuted:
            for lane in T.serial(LANES):
                x32[lane] = T.float32(0)
                if column + lane < n_in:
                    x32[lane] = T.Cast("float32", x[at(row, permutation[column + lane])])
        elif column + LANES <= n_in:
            x32[lanes(0)] = fp32(x[at(row, lanes(column))], spec.activation)
        else:
            for lane in T.serial(LANES):
                x32[lane] = T.float32(0)
                if column + lane < n_in:
                    x32[lane] = T.Cast("float32", x[at(row, column + lane)])

    @T.inline
    def fix(xw, step, row, first, count):
        """`count` vectors of xw from column `first` on, rounded to multiples of step[0], in units
        of it. A value that is not finite makes step NaN."""
        most = T.alloc_buffer((LANES,), "float32")
        broken = T.alloc_buffer((LANES,), "float32")
        most[lanes(0)] = splat(T.float32(0))
        broken[lanes(0)] = splat(T.float32(0))
        for v in T.serial(count):
            for sign in T.unroll(2):
                most[lanes(0)] = T.call_extern(
                    "float32x16",
                    "rl_max",
                    most[lanes(0)],
                    xw[row, lanes(first + v * LANES)] * splat(T.Cast("float32", 1 - 2 * sign)),
                )
            broken[lanes(0)] = fma(
                xw[row, lanes(first + v * LANES)], splat(T.float32(0)), broken[lanes(0)]
            )
        step[0] = T.call_extern("float32", "rl_hmax", most[lanes(0)]) / T.float32(
            FIXED_POINT_TOP
        ) + T.call_extern("float32", "rl_hsum", broken[lanes(0)])
        for v in T.serial(count):
            xw[row, lanes(first + v * LANES)] = T.call_llvm_pure_intrin(
                roundeven,
                xw[row, lanes(first + v * LANES)] / splat(T.max(step[0], T.float32(TINY))),
                dtype="float32x16",
            )

    @T.inline
    def put(x32, sums, xw, row, at):
        """Sixteen inputs into the work copy, in the multiply dtype, and into their group's sum."""
        if rounds:
            x32[lanes(0)] = rounded(x32[lanes(0)])
        sums[lanes(0)] = sums[lanes(0)] + x32[lanes(0)]
        if dot:
            xw[row, T.ramp(at // 2, 1, 8)] = T.reinterpret(
                T.call_extern("int16x16", "rl_cvtbf16", x32[lanes(0)]), dtype="int32x8"
            )
        else:
            xw[row, lanes(at)] = x32[lanes(0)]

    @T.inline
    def prepare(x, permutation, xw, xsum, row):
        """Pads one row of x to whole groups and sums it per group."""
        x32 = T.alloc_buffer((LANES,), "float32")
        sums = T.alloc_buffer((LANES,), "float32")
        if fixed:
            step = T.alloc_buffer((1,), "float32")
            for v in T.serial(groups * group // LANES):
                read(x, permutation, x32, row, v * LANES)
                xw[row, lanes(v * LANES)] = x32[lanes(0)]
            for b in T.serial((groups * group + FIXED_POINT_BLOCK - 1) // FIXED_POINT_BLOCK):
                count = T.min(per_block, groups * group // LANES - b * per_block)
                fix(xw, step, row, b * FIXED_POINT_BLOCK, count)
                for v in T.serial(count):
                    xw[row, lanes((b * per_block + v) * LANES)] = xw[
                        row, lanes((b * per_block + v) * LANES)
                    ] * splat(step[0])
        for g in T.serial(groups):
            sums[lanes(0)] = splat(T.float32(0))
            for v in T.serial(group // LANES):
                if fixed:
                    x32[lanes(0)] = xw[row, lanes(g * group + v * LANES)]
                else:
                    read(x, permutation, x32, row, g * group + v * LANES)
                put(x32, sums, xw, row, g * group + v * LANES)
            xsum[row, g] = T.call_extern("float32", "rl_hsum", sums[lanes(0)])

    @T.inline
    def store(y, bias, row_scale, total, column, row, end):
        """One vector of results, with row scale and bias; where a panel may reach beyond column
        `end`, its vectors go lane by lane."""
        if not ragged:
            if scaled:
                total[lanes(0)] = total[lanes(0)] * fp32(row_scale[lanes(column)], spec.row_scale)
            if has_bias:
                total[lanes(0)] = total[lanes(0)] + fp32(bias[lanes(column)], spec.bias)
            if spec.activation == "float32":
                T.buffer_store(y, total[lanes(0)], at(row, lanes(column)))
            else:
                value = T.Cast(spec.activation + "x16", total[lanes(0)])
                T.buffer_store(y, value, at(row, lanes(column)))
        else:
            for lane in T.serial(LANES):
                if column + lane < end:
                    if scaled:
                        total[lane] = total[lane] * T.Cast("float32", row_scale[column + lane])
                    if has_bias:
                        total[lane] = total[lane] + T.Cast("float32", bias[column + lane])
                    T.buffer_store(y, T.Cast(spec.activation, total[lane]), at(row, column + lane))

    return SimpleNamespace(
        matrix=matrix, at=at, pair_code=pair_code, read=read, fix=fix, prepare=prepare, store=store
    )
