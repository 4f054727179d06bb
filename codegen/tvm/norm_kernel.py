"""RMSNorm and LayerNorm of rows on the host CPU, as one TVMScript function.

Law, for a row s = x, or s = round(x + residual), of N elements, with everything in fp32:

    m = 0                              RMSNorm;    sum_n s[n] / N       LayerNorm (`Spec.center`)
    v = sum_n (s[n] - m)² / N
    y = round((s - m) / sqrt(v + eps) * (shift + weight) + bias)

and where `Spec.rational` asks for it, before rounding, z -> P(z) / Q(z) of
`ridgeline.ir.group_rational`, whose coefficients stand in a table with one column per element of a
row. x, residual, y, sum [..., N] contiguous, in `Spec.dtype`; weight and bias [N] contiguous, in
dtypes of their own; table fp32 [m + 1 + n, N], its last n rows as the terms of Q have them.

A row is read once from memory and stays in the first caches for the later passes; the squares of
LayerNorm are those of the centred values, so that nothing cancels. A vector lane is a column; four
vectors are summed apart, so the order of a sum depends on N alone.
"""

import functools
from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import LANES, fma, lanes, registers, splat, vector
from ridgeline.codegen.tvm.llvm_helpers import rounding_to_bf16

ACCUMULATORS = 4
_LLVM = {"float32": ("float", 4), "bfloat16": ("bfloat", 2), "float16": ("half", 2)}


class Spec(NamedTuple):
    """What a compiled kernel is specialised on; the number of rows is not.

    size: N. dtype: of the rows, "float32", "bfloat16" or "float16". weight, bias: their dtypes,
    None where absent. residual: s = x + residual, which is written as well. center: LayerNorm.
    rank: of x, 2 or 3. parallel: rows are spread over threads. isa: one of `isa.ISAS`.
    rational: (m, n, form) of the rational function that follows, or None.
    """

    size: int
    dtype: str
    weight: str | None
    bias: str | None
    residual: bool
    center: bool
    rank: int
    parallel: bool
    isa: str
    rational: tuple[int, int, str] | None = None


class Rows(NamedTuple):
    """The arguments, and the row at hand."""

    x: Any
    residual: Any
    weight: Any
    bias: Any
    y: Any
    sum: Any
    table: Any
    row: Any

    def at(self, buffer: Any, column: Any) -> Any:
        """The address of an element of this row."""
        if len(buffer.shape) == 3:
            length = buffer.shape[1]
            return T.address_of(buffer[self.row // length, self.row % length, column])
        return T.address_of(buffer[self.row, column])


def build(spec: Spec) -> Any:
    """The kernel for `spec`: main(x, residual, weight, bias, y, sum, table, eps, shift).

    Where `spec` has no residual, x and y stand for it and the sum; where it has no weight, bias or
    rational function, any fp32 tensor [1] or [1, 1] does.
    """
    n, dtype = spec.size, spec.dtype
    blocks, vectors, tail = n // (ACCUMULATORS * LANES), n // LANES, n % LANES
    loop = T.parallel if spec.parallel else T.serial
    coefficients = (1, 1)
    if spec.rational is not None:
        coefficients = (spec.rational[0] + 1 + spec.rational[1], n)

    def load(kind, address, count):
        return vector(f"rl_read_{kind}_{count}", address)

    @T.inline
    def first(r, s, c, count):
        """s = 16 elements of the row from column c on; the sum is written where there is one."""
        s[lanes(0)] = load(dtype, r.at(r.x, c), count)
        if spec.residual:
            s[lanes(0)] = s[lanes(0)] + load(dtype, r.at(r.residual, c), count)
            if dtype != "float32":
                s[lanes(0)] = vector(f"rl_round_{dtype}", s[lanes(0)])
            write = T.meta_var(f"rl_write_{dtype}_{count}")
            T.evaluate(T.call_extern("int32", write, r.at(r.sum, c), s[lanes(0)]))

    @T.inline
    def again(r, s, c, count):
        """The same elements, once the first pass is over."""
        s[lanes(0)] = load(dtype, r.at(r.sum if spec.residual else r.x, c), count)

    @T.inline
    def add(r, acc, s, i, c, count, mean):
        """acc[i] takes in s (first pass of LayerNorm) or its squares."""
        if mean is None and spec.center:
            first(r, s, c, count)
            acc[i, lanes(0)] = acc[i, lanes(0)] + s[lanes(0)]
        elif spec.center:
            again(r, s, c, count)
            s[lanes(0)] = s[lanes(0)] - splat(mean)
            if count < LANES:
                s[lanes(0)] = vector(f"rl_keep_{count}", s[lanes(0)])
            acc[i, lanes(0)] = fma(s[lanes(0)], s[lanes(0)], acc[i, lanes(0)])
        else:
            first(r, s, c, count)
            acc[i, lanes(0)] = fma(s[lanes(0)], s[lanes(0)], acc[i, lanes(0)])

    @T.inline
    def total(r, out, mean):
        """out[0] = the sum over the row of what `add` takes in, divided by N."""
        acc = registers((ACCUMULATORS, LANES))
        s = registers((LANES,))
        for i in T.unroll(ACCUMULATORS):
            acc[i, lanes(0)] = splat(T.float32(0))
        for block in T.serial(blocks):
            for i in T.unroll(ACCUMULATORS):
                add(r, acc, s, i, (block * ACCUMULATORS + i) * LANES, LANES, mean)
        for c in T.serial(vectors - blocks * ACCUMULATORS):
            add(r, acc, s, 0, (blocks * ACCUMULATORS + c) * LANES, LANES, mean)
        if tail != 0:
            add(r, acc, s, 1, vectors * LANES, tail, mean)
        for i in T.unroll(1, ACCUMULATORS):
            acc[0, lanes(0)] = acc[0, lanes(0)] + acc[i, lanes(0)]
        out[0] = T.call_extern("float32", "rl_hsum", acc[0, lanes(0)]) * T.float32(1 / n)

    @T.inline
    def divided(r, s, c, count):
        """s = P(s) / Q(s)."""
        m, degree, form = T.meta_var(spec.rational)
        z = registers((LANES,))
        top = registers((LANES,))
        bottom = registers((LANES,))
        z[lanes(0)] = s[lanes(0)]
        if form == "abs_terms":
            z[lanes(0)] = vector("rl_abs", s[lanes(0)])
        top[lanes(0)] = load("float32", T.address_of(r.table[m, c]), count)
        for i in T.unroll(m):
            top[lanes(0)] = fma(
                top[lanes(0)],
                s[lanes(0)],
                load("float32", T.address_of(r.table[m - 1 - i, c]), count),
            )
        bottom[lanes(0)] = load("float32", T.address_of(r.table[m + degree, c]), count)
        for i in T.unroll(degree - 1):
            bottom[lanes(0)] = fma(
                bottom[lanes(0)],
                z[lanes(0)],
                load("float32", T.address_of(r.table[m + degree - 1 - i, c]), count),
            )
        if form == "abs_sum":
            bottom[lanes(0)] = splat(T.float32(1)) + vector(
                "rl_abs", bottom[lanes(0)] * z[lanes(0)]
            )
        else:
            bottom[lanes(0)] = fma(bottom[lanes(0)], z[lanes(0)], splat(T.float32(1)))
        s[lanes(0)] = top[lanes(0)] / bottom[lanes(0)]

    @T.inline
    def scaled(r, s, mean, inverse, shift, c, count):
        """y from column c on."""
        again(r, s, c, count)
        if spec.center:
            s[lanes(0)] = s[lanes(0)] - splat(mean)
        s[lanes(0)] = s[lanes(0)] * splat(inverse)
        if spec.weight is not None:
            gain = T.meta_var(load(spec.weight, T.address_of(r.weight[c]), count))
            s[lanes(0)] = s[lanes(0)] * (gain + splat(shift))
        if spec.bias is not None:
            s[lanes(0)] = s[lanes(0)] + load(spec.bias, T.address_of(r.bias[c]), count)
        if spec.rational is not None:
            divided(r, s, c, count)
        T.evaluate(T.call_extern("int32", f"rl_write_{dtype}_{count}", r.at(r.y, c), s[lanes(0)]))

    def rows(handle, batch, length):
        shape = (batch, length, n) if spec.rank == 3 else (length, n)
        return T.match_buffer(handle, shape, dtype, align=1)

    def column(handle, kind):
        return T.match_buffer(handle, (1 if kind is None else n,), kind or "float32", align=1)

    @T.prim_func(s_tir=True)
    def main(
        x_: T.handle,
        residual_: T.handle,
        weight_: T.handle,
        bias_: T.handle,
        y_: T.handle,
        sum_: T.handle,
        table_: T.handle,
        eps: T.float32,
        shift: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, length = T.int64(), T.int64()
        x = rows(x_, batch, length)
        residual = rows(residual_, batch, length)
        weight = column(weight_, spec.weight)
        bias = column(bias_, spec.bias)
        y = rows(y_, batch, length)
        sum = rows(sum_, batch, length)
        table = T.match_buffer(table_, coefficients, "float32", align=1)
        with T.attr(0, "pragma_import_llvm", helpers(tail, spec.isa)):
            for row in loop(batch * length if spec.rank == 3 else length):
                r = T.meta_var(Rows(x, residual, weight, bias, y, sum, table, row))
                mean = registers((1,))
                inverse = registers((1,))
                s = registers((LANES,))
                mean[0] = T.float32(0)
                if spec.center:
                    total(r, mean, None)
                total(r, inverse, mean[0])
                inverse[0] = T.float32(1) / T.sqrt(inverse[0] + eps)
                for c in T.serial(vectors):
                    scaled(r, s, mean[0], inverse[0], shift, c * LANES, LANES)
                if tail != 0:
                    scaled(r, s, mean[0], inverse[0], shift, vectors * LANES, tail)

    return main


@functools.cache
def helpers(tail: int, isa: str) -> str:
    """LLVM IR of the loads and stores of 16 and of `tail` elements, TVM having none that round as
    the CPU does and no vectors shorter than their lanes.

    rl_read_D_n     n numbers of dtype D as fp32, the rest zeros
    rl_write_D_n    the first n of 16 fp32, rounded to nearest even
    rl_round_D      fp32 rounded to D, as fp32
    rl_keep_n       the first n of 16 fp32, the rest zeros
    rl_abs          |x| of 16 fp32
    """
    ir = "declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)\n"
    ir += "define float @rl_hsum(<16 x float> %a) alwaysinline {\n"
    ir += "  %r = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %a)\n"
    ir += "  ret float %r\n}\n"
    ir += "declare <16 x float> @llvm.fabs.v16f32(<16 x float>)\n"
    ir += "define <16 x float> @rl_abs(<16 x float> %x) alwaysinline {\n"
    ir += "  %y = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x)\n"
    ir += "  ret <16 x float> %y\n}\n"
    for dtype, (kind, size) in _LLVM.items():
        ir += _narrow(dtype, kind, isa)
        for n in {LANES, tail or LANES}:
            ir += _read(dtype, kind, size, n) + _write(dtype, kind, size, n)
        wide = f"  %y = fpext <16 x {kind}> %t to <16 x float>\n  ret <16 x float> %y\n}}\n"
        ir += f"define <16 x float> @rl_round_{dtype}(<16 x float> %x) alwaysinline {{\n"
        if kind == "float":
            ir += "  ret <16 x float> %x\n}\n"
        else:
            ir += f"  %t = call <16 x {kind}> @rl_narrow_{dtype}(<16 x float> %x)\n{wide}"
    if tail:
        ir += f"define <16 x float> @rl_keep_{tail}(<16 x float> %x) alwaysinline {{\n"
        ir += _shuffle("y", "<16 x float> %x, <16 x float> zeroinitializer", range(tail), LANES)
        ir += "  ret <16 x float> %y\n}\n"
    return ir


def _narrow(dtype: str, kind: str, isa: str) -> str:
    """fp32 to nearest, even."""
    ir = f"define <16 x {kind}> @rl_narrow_{dtype}(<16 x float> %x) alwaysinline {{\n"
    if kind == "float":
        return ir + "  ret <16 x float> %x\n}\n"
    if kind == "half":
        return ir + "  %y = fptrunc <16 x float> %x to <16 x half>\n  ret <16 x half> %y\n}\n"
    ir += rounding_to_bf16(isa) + "  %y = bitcast <16 x i16> %bits to <16 x bfloat>\n"
    return ir + "  ret <16 x bfloat> %y\n}\n"


def _shuffle(name: str, operands: str, kept: range, lanes: int, absent: int = LANES) -> str:
    """`lanes` lanes: those of the first operand in `kept`, element `absent` in the others."""
    order = ", ".join(f"i32 {i if i in kept else absent}" for i in range(lanes))
    return f"  %{name} = shufflevector {operands}, <{lanes} x i32> <{order}>\n"


def _read(dtype: str, kind: str, size: int, n: int) -> str:
    ir = f"define <16 x float> @rl_read_{dtype}_{n}(ptr %a) alwaysinline {{\n"
    ir += f"  %short = load <{n} x {kind}>, ptr %a, align {size}\n"
    pair = f"<{n} x {kind}> %short, <{n} x {kind}> zeroinitializer"
    ir += _shuffle("x", pair, range(n), LANES, n)
    if kind == "float":
        return ir + "  ret <16 x float> %x\n}\n"
    return ir + f"  %y = fpext <16 x {kind}> %x to <16 x float>\n  ret <16 x float> %y\n}}\n"


def _write(dtype: str, kind: str, size: int, n: int) -> str:
    ir = f"define i32 @rl_write_{dtype}_{n}(ptr %a, <16 x float> %x) alwaysinline {{\n"
    value = "%x"
    if kind != "float":
        ir += f"  %t = call <16 x {kind}> @rl_narrow_{dtype}(<16 x float> %x)\n"
        value = "%t"
    ir += _shuffle("short", f"<16 x {kind}> {value}, <16 x {kind}> poison", range(n), n)
    return ir + f"  store <{n} x {kind}> %short, ptr %a, align {size}\n  ret i32 0\n}}\n"
