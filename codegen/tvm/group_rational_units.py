"""What the rational function's kernels share: units of channels, their coefficients, vector loads.

A unit is a group, where whole vectors fill groups; else (`Spec.mixed`) 16 adjacent channels, whose
lanes have coefficients of their own, from a table [coefficient, channel] that a call makes once.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import LANES, lanes, splat, vector
from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers

CHAIN = 64
"""Additions that one lane of an accumulator takes before it is flushed."""

AHEAD = 6144
"""Bytes by which rows are fetched before they are read: what the processor fetches by itself ends
with a page."""

_KINDS = {"float32": ("float", 4), "bfloat16": ("bfloat", 2), "float16": ("half", 2)}


class Spec(NamedTuple):
    """What a compiled kernel is specialised on; rows and strides are not.

    width: C / G. m, n: degrees, n >= 1. numerators, denominators: 1 or G. form, sign0: the law's.
    dtype: "float32", "bfloat16" or "float16". parallel: whether the work is spread over threads.
    streamed: whether the fp32 result y or dx, every vector of which is aligned, goes to memory past
    the caches, which then need not read it first; x86 alone.
    """

    width: int
    groups: int
    m: int
    n: int
    numerators: int
    denominators: int
    form: str
    sign0: int
    dtype: str
    isa: str
    parallel: bool
    streamed: bool = False

    @property
    def channels(self) -> int:
        """C."""
        return self.width * self.groups

    @property
    def mixed(self) -> bool:
        """Do whole vectors not fill a group?"""
        return self.width % LANES != 0

    @property
    def units(self) -> int:
        return -(-self.channels // LANES) if self.mixed else self.groups

    @property
    def vectors(self) -> int:
        """Of a unit."""
        return 1 if self.mixed else self.width // LANES

    @property
    def counts(self) -> tuple[int, int]:
        """(units of whole vectors, elements of the shorter one after them, if any)."""
        return divmod(self.channels, LANES) if self.mixed else (self.groups, 0)

    @property
    def ahead(self) -> int:
        """Rows by which operands are fetched before they are read."""
        return -(-AHEAD // (self.channels * _KINDS[self.dtype][1]))

    @property
    def held(self) -> bool:
        """Are there registers for the sums of all lanes beside what a vector's terms need?"""
        return self.isa != "generic"

    @property
    def chunk(self) -> int:
        """Rows of which one accumulator vector takes the sum."""
        return max(1, CHAIN // self.vectors)


def helpers(spec: Spec) -> str:
    """LLVM IR: loads of whole vectors and of the row's last, shorter one, vector |x|, and, for
    tables, `rl_written`: what stands at an address may be anything from there on."""
    kind, align = _KINDS[spec.dtype]
    # Numbers of 16 bits are bits until they fill a vector: nine bf16 ones LLVM cannot take apart.
    word = "float" if kind == "float" else "i16"
    ir = llvm_helpers(spec.isa) + "declare <16 x float> @llvm.fabs.v16f32(<16 x float>)\n"
    ir += "define <16 x float> @rl_abs(<16 x float> %x) alwaysinline {\n"
    ir += "  %y = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x)\n"
    ir += "  ret <16 x float> %y\n}\n"
    if spec.mixed:
        ir += "define i32 @rl_written(ptr %a) alwaysinline {\n"
        ir += '  call void asm sideeffect "", "r,~{memory}"(ptr %a)\n  ret i32 0\n}\n'
    if spec.streamed:
        ir += "declare void @llvm.x86.sse.sfence()\n"
        ir += "define i32 @rl_stream(ptr %a, <16 x float> %x) alwaysinline {\n"
        ir += "  store <16 x float> %x, ptr %a, align 64, !nontemporal !{i32 1}\n"
        ir += "  ret i32 0\n}\n"
        ir += "define i32 @rl_streamed() alwaysinline {\n"
        ir += "  call void @llvm.x86.sse.sfence()\n  ret i32 0\n}\n"
    for count in {LANES, spec.counts[1]} - {0}:
        order = ", ".join(f"i32 {min(i, count)}" for i in range(LANES))
        ir += f"define <16 x float> @rl_elements_{count}(ptr %a) alwaysinline {{\n"
        ir += f"  %s = load <{count} x {word}>, ptr %a, align {align}\n"
        ir += f"  %x = shufflevector <{count} x {word}> %s, <{count} x {word}> zeroinitializer, "
        ir += f"<16 x i32> <{order}>\n"
        if kind == "float":
            ir += "  ret <16 x float> %x\n}\n"
        else:
            ir += f"  %h = bitcast <16 x i16> %x to <16 x {kind}>\n"
            ir += f"  %y = fpext <16 x {kind}> %h to <16 x float>\n  ret <16 x float> %y\n}}\n"
    return ir


def matrix(handle: Any, shape: tuple[Any, ...], dtype: str) -> Any:
    return T.match_buffer(handle, shape, dtype, strides=(T.int64(), 1), align=1)


def load(tensor: Any, row: Any, column: Any, count: int) -> Any:
    return vector(f"rl_elements_{count}", T.address_of(tensor[row, column]))


def fetch(spec: Spec, tensor: Any, row: Any, column: Any) -> Any:
    """Brings nearer what a later row has there; an address beyond the last row does no harm."""
    address = T.address_of(tensor[row + spec.ahead, column])
    return T.call_extern("int32", "rl_prefetch", address)


def stream(tensor: Any, row: Any, column: Any, result: Any) -> Any:
    """Stores a register past the caches."""
    address = T.address_of(tensor[row, column])
    return T.call_extern("int32", "rl_stream", address, result[lanes(0)])


def streamed() -> Any:
    """Lets other threads see, from here on, what went past the caches."""
    return T.call_extern("int32", "rl_streamed")


def stored(spec: Spec, result: Any, count: int) -> Any:
    """`count` lanes of a register as the tensor's dtype."""
    if count == 1:
        return T.Cast(spec.dtype, result[0])
    return T.Cast(f"{spec.dtype}x{count}", result[lanes(0, count)])


def columns(count: int, column: Any) -> Any:
    return column if count == 1 else lanes(column, count)


def operands(spec: Spec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the numerator and of c as the units read them: rows, or a table of channels."""
    if spec.mixed:
        columns = spec.units * LANES
        return (spec.m + 1, columns), (spec.n, columns)
    return (spec.numerators, spec.m + 1), (spec.denominators, spec.n)


def coefficient(spec: Spec, operand: Any, unit: Any, i: int) -> Any:
    """Coefficient i of a unit's channels, a vector."""
    if spec.mixed:
        return operand[i, lanes(unit * LANES)]
    return splat(operand[0 if operand.shape[0] == 1 else unit, i])


def prepare(spec: Spec) -> Any:
    """Copies a, and |b| or b as the form has it, to what the units read."""
    width, signed = spec.width, spec.form == "abs_sum"
    shared_a, shared_b = spec.numerators == 1, spec.denominators == 1

    def magnitude(value):
        return value if signed else T.abs(value)

    @T.inline
    def rows(to_a, to_c, a, b):
        for g in T.serial(spec.numerators):
            for i in T.serial(spec.m + 1):
                to_a[g, i] = a[g, i]
        for g in T.serial(spec.denominators):
            for i in T.serial(spec.n):
                to_c[g, i] = magnitude(b[g, i])

    @T.inline
    def table(to_a, to_c, a, b):
        for column in T.serial(spec.channels, spec.units * LANES):
            for i in T.serial(spec.m + 1):
                to_a[i, column] = T.float32(0)
            for i in T.serial(spec.n):
                to_c[i, column] = T.float32(0)
        for g in T.serial(spec.groups):
            ga = 0 if shared_a else g
            gb = 0 if shared_b else g
            for i in T.serial(spec.m + 1):
                for c in T.serial(width):
                    to_a[i, g * width + c] = a[ga, i]
            for i in T.serial(spec.n):
                for c in T.serial(width):
                    to_c[i, g * width + c] = magnitude(b[gb, i])
        # LLVM 22 forwards small tables to their loads, and uses vectors that it has not made yet.
        T.evaluate(T.call_extern("int32", "rl_written", T.address_of(to_a[0, 0])))
        T.evaluate(T.call_extern("int32", "rl_written", T.address_of(to_c[0, 0])))

    return table if spec.mixed else rows


def padded(spec: Spec) -> int:
    """Sums of one chunk, filled to whole vectors."""
    terms = spec.m + 1 + spec.n
    if spec.mixed:
        return spec.units * terms * LANES
    return -(-spec.groups * terms // LANES) * LANES
