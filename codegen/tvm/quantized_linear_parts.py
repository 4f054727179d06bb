"""What the CPU kernels of `ridgeline::quantized_linear` share: sizes, decoding, reading, storing.

`pieces` gives expressions and `T.inline` parts of TVMScript functions; every condition on the spec
is settled while the kernel is written.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

from tvm.script import tirx as T

LANES = 16
PANEL_VECTORS = 4
PANEL = LANES * PANEL_VECTORS
STEP = 8
"""Input features per step of the inner loop: one 16-bit word of 4-bit codes holds four of them."""

_PERMUTE_16 = "llvm.x86.avx512.permvar.hi.512"


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


def pieces(spec: Spec) -> SimpleNamespace:
    """matrix, at: x and y, behind a leading 1 if `spec.lead`. pair_code: the codes of two features
    as bf16. prepare: a row of x in the multiply dtype, and its sum per group. store: a vector of y.
    """
    n_out, n_in, group = spec.out_features, spec.in_features, spec.group_size
    rounds, dot, groups = spec.rounds, spec.dot, spec.groups
    has_bias = spec.bias != "none"
    ragged = n_out % PANEL != 0
    permute_16 = T.llvm_lookup_intrinsic_id(_PERMUTE_16) if spec.isa == "avx512_bf16" else None

    def matrix(argument, rows, columns):
        """x or y: [rows, columns], behind a leading 1 if `spec.lead`."""
        shape = (1, rows, columns) if spec.lead else (rows, columns)
        return T.match_buffer(argument, shape, spec.activation)

    def at(row, column):
        return (0, row, column) if spec.lead else (row, column)

    def pair_code(table, codes, panel, step, j, i):
        """Codes of features 8 step + 2 i + {0, 1}, as 16 bf16 pairs."""
        if spec.bits == 8:
            word = codes[panel, step, i, j, lanes(0, 32)]
            return T.call_extern("int32x16", "rl_i8_bf16", word)
        word = T.shift_right(
            codes[panel, step, 0, j, lanes(0, 32)], splat(T.Cast("int16", 4 * i), 32)
        )
        entry = T.call_llvm_pure_intrin(
            permute_16, T.reinterpret(table[lanes(0)], dtype="int16x32"), word, dtype="int16x32"
        )
        return T.reinterpret(entry, dtype="int32x16")

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
    def prepare(x, xw, xsum, row):
        """Pads one row of x to whole groups and sums it per group."""
        x32 = T.alloc_buffer((LANES,), "float32")
        sums = T.alloc_buffer((LANES,), "float32")
        for g in T.serial(groups):
            sums[lanes(0)] = splat(T.float32(0))
            for v in T.serial(group // LANES):
                if g * group + v * LANES + LANES <= n_in:
                    x32[lanes(0)] = fp32(x[at(row, lanes(g * group + v * LANES))], spec.activation)
                else:
                    for lane in T.serial(LANES):
                        x32[lane] = T.float32(0)
                        if g * group + v * LANES + lane < n_in:
                            x32[lane] = T.Cast("float32", x[at(row, g * group + v * LANES + lane)])
                put(x32, sums, xw, row, g * group + v * LANES)
            xsum[row, g] = T.call_extern("float32", "rl_hsum", sums[lanes(0)])

    @T.inline
    def store(y, bias, total, column, row):
        """One vector of results, with the bias; the last vector of a ragged N goes lane by lane."""
        if not ragged:
            if has_bias:
                total[lanes(0)] = total[lanes(0)] + fp32(bias[lanes(column)], spec.bias)
            if spec.activation == "float32":
                T.buffer_store(y, total[lanes(0)], at(row, lanes(column)))
            else:
                value = T.Cast(spec.activation + "x16", total[lanes(0)])
                T.buffer_store(y, value, at(row, lanes(column)))
        else:
            for lane in T.serial(LANES):
                if column + lane < n_out:
                    if has_bias:
                        total[lane] = total[lane] + T.Cast("float32", bias[column + lane])
                    T.buffer_store(y, T.Cast(spec.activation, total[lane]), at(row, column + lane))

    return SimpleNamespace(matrix=matrix, at=at, pair_code=pair_code, prepare=prepare, store=store)
