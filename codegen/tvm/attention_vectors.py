"""What the two CPU kernels of attention share: their specification and their vector operations.

A vector is 16 fp32 lanes. A *word* is what one multiplication consumes per lane: an fp32 number,
or, where the CPU has `vdpbf16ps`, a pair of neighbouring bf16 numbers in an int32, of which
`multiply_add` forms c + a0 b0 + a1 b1 in fp32. TVM spells most of this; the LLVM IR below adds

rl_load_D_n, rl_words_n     n numbers of dtype D as fp32; 2 n bf16 as n words; the rest zeros
rl_pairs_n                  words (a[l], b[l]) of two bf16 rows, for n columns l
rl_halves_low/high_n        the same for 32 columns, in the order that costs one instruction:
                            4 columns of every 8, first ones and last ones
rl_columns_low/high         puts two such vectors back in the order of the columns
rl_round_pairs              words (bf16(a[l]), bf16(b[l])), nearest even
rl_round_row                the 8 words (bf16(a[2l]), bf16(a[2l+1])), nearest even
rl_keep                     0 where a byte of a boolean mask is not 0, else -inf
rl_exp2_fine, rl_exp2_coarse  2**x for x <= 0: 2**floor(x) p(x - floor(x)), p the minimax polynomial
                            of degree 5 (relative error 8e-8) or 3 (8e-5); exactly 0 at -inf
rl_sum16                    the sums of 16 vectors, as one vector
rl_transpose16              a 16 x 16 block of words from memory to rows `step` bytes apart
"""

import functools
import struct
from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers

LANES = 16
LOWEST = -3.4028234663852886e38
"""A running maximum starts here, not at -inf: -inf - LOWEST is -inf, while -inf - -inf is NaN."""

LOG2_E = 1.4426950408889634


class Spec(NamedTuple):
    """What a compiled kernel is specialised on; batch, heads, lengths and strides are not.

    head_dim, value_dim: D and Dv, multiples of 8. dtype: "float32", "bfloat16" or "float16".
    mask: None, "uint8" (boolean), or the dtype of an additive mask. sinks: their dtype, or None.
    capped: whether scores pass through a tanh.
    isa: one of `isa.ISAS`. parallel: whether the work is spread over threads.
    saved: whether the softmax statistics of each row are put out too, for a backward.
    """

    head_dim: int
    value_dim: int
    dtype: str
    mask: str | None
    sinks: str | None
    capped: bool
    isa: str
    parallel: bool
    saved: bool = False

    @property
    def pairs(self) -> bool:
        """Whether a word is a pair of bf16."""
        return self.dtype == "bfloat16" and self.isa == "avx512_bf16"

    @property
    def word(self) -> str:
        return "int32" if self.pairs else "float32"

    @property
    def depth(self) -> int:
        """Words of one query or key."""
        return self.head_dim // 2 if self.pairs else self.head_dim

    @property
    def natural(self) -> bool:
        """Scores with an additive mask stay in natural units until their maximum is subtracted:
        log2(e) times finfo.min would overflow. Others are in units of log(2) from the start."""
        return self.mask not in (None, "uint8")

    @property
    def helpers(self) -> str:
        """The LLVM IR that the kernel imports."""
        return kernel_helpers(self.isa)


def lanes(start: Any, count: int = LANES) -> Any:
    return T.ramp(start, 1, count)


def splat(value: Any) -> Any:
    return T.broadcast(value, LANES)


def vector(function: str, *arguments: Any) -> Any:
    """An fp32 vector from one of the helpers."""
    return T.call_extern("float32x16", function, *arguments)


def words(spec: Spec, function: str, *arguments: Any) -> Any:
    """A vector of words from one of the helpers."""
    return T.call_extern(f"{spec.word}x16", function, *arguments)


def load(spec: Spec, address: Any, count: int = LANES) -> Any:
    """`count` words of a query or key row, and zeros."""
    return words(
        spec, f"rl_words_{count}" if spec.pairs else f"rl_load_{spec.dtype}_{count}", address
    )


def multiply_add(spec: Spec, a: Any, b: Any, c: Any) -> Any:
    """c + a b, lane by lane, for words a and b."""
    if spec.pairs:
        return vector("rl_dpbf16", c, a, b)
    return fma(a, b, c)


def fma(a: Any, b: Any, c: Any, count: int = LANES) -> Any:
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.fma")
    return T.call_llvm_pure_intrin(intrinsic, a, b, c, dtype=f"float32x{count}")


def registers(shape: tuple[Any, ...], dtype: str = "float32") -> Any:
    """Small storage for constant indices, which LLVM keeps in registers.

    It has to be stack memory for that; without the annotation it comes from TVM's workspace pool.
    """
    return T.alloc_buffer(shape, dtype, annotations={"disable_lower_builtin": True})


def tensor(handle: Any, shape: tuple[Any, ...], dtype: str, last: Any = 1) -> Any:
    """An argument of 4 dimensions, with any strides but perhaps the last."""
    return T.match_buffer(
        handle, shape, dtype, strides=(T.int64(), T.int64(), T.int64(), last), align=1
    )


def per_head(handle: Any, heads: Any, dtype: str | None) -> Any:
    """An argument [H], contiguous; None where a kernel has none."""
    return T.match_buffer(handle, (heads,), dtype, align=1) if dtype else None


def statistics(handle: Any, shape: tuple[Any, ...], present: bool) -> Any:
    """An fp32 argument, contiguous; None where a kernel has none."""
    return T.match_buffer(handle, shape, "float32", align=1) if present else None


def kernel_of(main: Any, spec: Spec) -> Any:
    """`main` without the arguments that this specification does not read, `stats_` and `sinks_`:
    they would still be checked at each call."""
    unread = {name for name, read in (("stats_", spec.saved), ("sinks_", spec.sinks)) if not read}
    params = [p for p in main.params if p.name not in unread]
    return PrimFunc(params, main.body, main.ret_type, main.attrs)


def exponential(spec: Spec, difference: Any) -> Any:
    """exp of a score minus its row's maximum, in the units of `Spec.natural`."""
    if spec.natural:
        difference = difference * splat(T.float32(LOG2_E))
    return vector("rl_exp2_coarse" if spec.pairs else "rl_exp2_fine", difference)


def peak(top: Any, total: Any) -> Any:
    """The maximum that a row's total is relative to; 0 where nothing was summed."""
    return T.if_then_else(total > T.float32(0), top, T.float32(0))


def logarithm(spec: Spec, total: Any) -> Any:
    """log(total) in the units of `Spec.natural`; inf where nothing was summed."""
    log = T.log(total) if spec.natural else T.log2(total)
    return T.if_then_else(total > T.float32(0), log, T.float32(float("inf")))


def transposed(square: Any, target: Any, step: int) -> Any:
    """Puts 16 x 16 words, transposed, at an address, in rows `step` words apart.

    TVM allots to a buffer what it sees accessed, and it does not see this write: rows that are
    never read are to be written in its sight too.
    """
    return T.call_extern(
        "int32", "rl_transpose16", T.address_of(square[0, 0]), target, T.int64(4 * step)
    )


def mask_vector(spec: Spec, address: Any) -> Any:
    """What 16 entries of the mask add to the scores."""
    return vector("rl_keep" if spec.mask == "uint8" else f"rl_load_{spec.mask}_16", address)


def mask_number(spec: Spec, entry: Any) -> Any:
    """What one entry of the mask adds to its score."""
    if spec.mask == "uint8":
        return T.Select(entry != T.uint8(0), T.float32(0), T.float32(float("-inf")))
    return T.Cast("float32", entry)


_MINIMAX = {
    "coarse": (0.99992519617, 0.6958335638, 0.2260671556, 0.07802452147),
    "fine": (
        0.99999994039535522,
        0.69315308332443237,
        0.24015361070632935,
        0.055826317518949509,
        0.0089893396943807602,
        0.0018775766948238015,
    ),
}
"""p(f) = 2**f on [0, 1) with the least relative error (Remez), lowest power first."""

_LOADED = {"float32": ("float", 4), "bfloat16": ("bfloat", 2), "float16": ("half", 2)}
_MINUS_INF = "0xFFF0000000000000"


def _splat(value: float) -> str:
    """An LLVM constant: doubles in hexadecimal that fp32 holds exactly."""
    fp32 = struct.unpack("f", struct.pack("f", value))[0]
    return f"splat (float 0x{struct.unpack('<Q', struct.pack('<d', fp32))[0]:016X})"


def _indices(values: Any) -> str:
    return f"<{', '.join(f'i32 {v}' for v in values)}>"


def _shuffle(name: str, a: str, b: str, indices: Any, kind: str = "float", n: int = LANES) -> str:
    order = list(indices)
    return (
        f"  %{name} = shufflevector <{n} x {kind}> {a}, <{n} x {kind}> {b}, "
        f"<{len(order)} x i32> {_indices(order)}\n"
    )


def _widened(name: str, kind: str, count: int, to: int) -> str:
    """`name`.short of `count` elements, extended with zeros to `to`."""
    order = [i if i < count else count for i in range(to)]
    return _shuffle(name, f"%{name}.short", "zeroinitializer", order, kind, count)


def _loads() -> str:
    ir = ""
    for dtype, (kind, align) in _LOADED.items():
        for n in (8, 16):
            wide = "" if kind == "float" else f"fpext <16 x {kind}> %x to <16 x float>"
            ir += f"define <16 x float> @rl_load_{dtype}_{n}(ptr %a) alwaysinline {{\n"
            ir += f"  %x.short = load <{n} x {kind}>, ptr %a, align {align}\n"
            ir += _widened("x", kind, n, LANES)
            ir += (
                f"  %y = {wide}\n  ret <16 x float> %y\n}}\n"
                if wide
                else "  ret <16 x float> %x\n}\n"
            )
    for n in (4, 8, 12, 16):
        ir += f"define <16 x i32> @rl_words_{n}(ptr %a) alwaysinline {{\n"
        ir += f"  %x.short = load <{n} x i32>, ptr %a, align 2\n"
        ir += _widened("x", "i32", n, LANES) + "  ret <16 x i32> %x\n}\n"
    ir += "define <16 x float> @rl_keep(ptr %a) alwaysinline {\n"
    ir += "  %x = load <16 x i8>, ptr %a, align 1\n"
    ir += "  %kept = icmp ne <16 x i8> %x, zeroinitializer\n"
    ir += "  %y = select <16 x i1> %kept, <16 x float> zeroinitializer, "
    ir += f"<16 x float> splat (float {_MINUS_INF})\n  ret <16 x float> %y\n}}\n"
    return ir


def _interleaved() -> str:
    """Pairs of two rows: in the order of the columns, and within 128-bit parts."""
    low = [4 * (i // 4) * 2 + i % 4 for i in range(LANES)]
    orders = {f"rl_pairs_{n}": (n, 16, list(range(16))) for n in (8, 16)}
    for n in (8, 16, 24, 32):
        orders[f"rl_halves_low_{n}"] = (n, 32, low)
        orders[f"rl_halves_high_{n}"] = (n, 32, [i + 4 for i in low])
    ir = ""
    for name, (n, width, columns) in orders.items():
        ir += f"define <16 x i32> @{name}(ptr %a, ptr %b) alwaysinline {{\n"
        for row in "ab":
            ir += f"  %{row}x.short = load <{n} x i16>, ptr %{row}, align 2\n"
            ir += _widened(f"{row}x", "i16", n, width)
        order = [i for column in columns for i in (column, column + width)]
        ir += _shuffle("x", "%ax", "%bx", order, "i16", width)
        ir += "  %y = bitcast <32 x i16> %x to <16 x i32>\n  ret <16 x i32> %y\n}\n"
    back = {low[i] if k == 0 else low[i] + 4: 16 * k + i for k in (0, 1) for i in range(16)}
    for name, columns in (("low", range(16)), ("high", range(16, 32))):
        ir += f"define <16 x float> @rl_columns_{name}"
        ir += "(<16 x float> %a, <16 x float> %b) alwaysinline {\n"
        ir += _shuffle("x", "%a", "%b", [back[c] for c in columns])
        ir += "  ret <16 x float> %x\n}\n"
    return ir


def _rounded_pairs() -> str:
    interleave = [i for lane in range(LANES) for i in (lane, lane + LANES)]
    return (
        "declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)\n"
        "define <16 x i32> @rl_round_pairs(<16 x float> %a, <16 x float> %b) alwaysinline {\n"
        "  %t = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        "(<16 x float> %b, <16 x float> %a)\n"
        + _shuffle("x", "%t", "poison", interleave, "bfloat", 32)
        + "  %y = bitcast <32 x bfloat> %x to <16 x i32>\n  ret <16 x i32> %y\n}\n"
        "define <8 x i32> @rl_round_row(<16 x float> %a) alwaysinline {\n"
        "  %t = fptrunc <16 x float> %a to <16 x bfloat>\n"
        "  %y = bitcast <16 x bfloat> %t to <8 x i32>\n  ret <8 x i32> %y\n}\n"
    )


def _exp2(name: str, isa: str) -> str:
    ir = f"define <16 x float> @rl_exp2_{name}(<16 x float> %x) alwaysinline {{\n"
    if isa == "generic":
        # 2**x is taken as 0 below the normal numbers.
        ir += "  %tiny = fcmp olt <16 x float> %x, " + _splat(-126.0) + "\n"
        ir += f"  %h = select <16 x i1> %tiny, <16 x float> {_splat(-126.0)}, <16 x float> %x\n"
        ir += "  %n = call <16 x float> @llvm.floor.v16f32(<16 x float> %h)\n"
        ir += "  %f = fsub <16 x float> %h, %n\n"
    else:
        # vreduceps with immediate 9: x - floor(x), no exceptions; 0 at -inf
        ir += "  %f = call <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float> %x, "
        ir += "i32 9, <16 x float> zeroinitializer, i16 -1, i32 4)\n"
    powers = _MINIMAX[name]
    polynomial = _splat(powers[-1])
    for i in reversed(range(len(powers) - 1)):
        ir += f"  %p{i} = call <16 x float> @llvm.fma.v16f32(<16 x float> {polynomial}, "
        ir += f"<16 x float> %f, <16 x float> {_splat(powers[i])})\n"
        polynomial = f"%p{i}"
    if isa == "generic":
        ir += "  %e = fptosi <16 x float> %n to <16 x i32>\n"
        ir += "  %b = add <16 x i32> %e, splat (i32 127)\n"
        ir += "  %s = shl <16 x i32> %b, splat (i32 23)\n"
        ir += "  %t = bitcast <16 x i32> %s to <16 x float>\n"
        ir += "  %u = fmul <16 x float> %p0, %t\n"
        ir += "  %y = select <16 x i1> %tiny, <16 x float> zeroinitializer, <16 x float> %u\n"
    else:
        ir += "  %y = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %p0, "
        ir += "<16 x float> %x, <16 x float> zeroinitializer, i16 -1, i32 4)\n"
    return ir + "  ret <16 x float> %y\n}\n"


def _sum16() -> str:
    """A tree of additions in which every step halves the vectors and keeps all lanes busy."""
    arguments = ", ".join(f"<16 x float> %v{i}" for i in range(LANES))
    ir = f"define <16 x float> @rl_sum16({arguments}) alwaysinline {{\n"
    ends = [(q, q + 16, q + 1, q + 17) for q in range(0, LANES, 4)]
    fours = [(q, q + 1, q + 16, q + 17) for q in range(0, LANES, 4)]
    parts = [range(q, q + 4) for q in range(0, 2 * LANES, 8)]
    shifts = {"a": (ends, 2), "b": (fours, 2), "c": (parts, 4), "d": (parts, 4)}
    source, count = "v", LANES
    for stage, (groups, shift) in shifts.items():
        one = [lane for group in groups for lane in group]
        count //= 2
        for i in range(count):
            pair = (f"%{source}{2 * i}", f"%{source}{2 * i + 1}")
            ir += _shuffle(f"{stage}{i}.0", *pair, one)
            ir += _shuffle(f"{stage}{i}.1", *pair, [lane + shift for lane in one])
            ir += f"  %{stage}{i} = fadd <16 x float> %{stage}{i}.0, %{stage}{i}.1\n"
        source = stage
    return ir + "  ret <16 x float> %d0\n}\n"


def _transpose16() -> str:
    """Four rounds of exchanging blocks of 8, 4, 2 and 1."""
    ir = "define i32 @rl_transpose16(ptr %from, ptr %to, i64 %step) alwaysinline {\n"
    for i in range(LANES):
        ir += f"  %at{i} = getelementptr i8, ptr %from, i64 {64 * i}\n"
        ir += f"  %r0.{i} = load <16 x i32>, ptr %at{i}, align 4\n"
    for stage, block in enumerate((8, 4, 2, 1)):
        for i in range(LANES):
            if i & block:
                continue
            pair = (f"%r{stage}.{i}", f"%r{stage}.{i + block}")
            upper = [lane + LANES - block if lane & block else lane for lane in range(LANES)]
            lower = [lane + LANES if lane & block else lane + block for lane in range(LANES)]
            ir += _shuffle(f"r{stage + 1}.{i}", *pair, upper, "i32")
            ir += _shuffle(f"r{stage + 1}.{i + block}", *pair, lower, "i32")
    for i in range(LANES):
        ir += f"  %off{i} = mul i64 %step, {i}\n"
        ir += f"  %in{i} = getelementptr i8, ptr %to, i64 %off{i}\n"
        ir += f"  store <16 x i32> %r4.{i}, ptr %in{i}, align 4\n"
    return ir + "  ret i32 0\n}\n"


@functools.cache
def kernel_helpers(isa: str) -> str:
    """The LLVM IR that a kernel for `isa` imports."""
    ir = llvm_helpers(isa) + _loads() + _interleaved() + _sum16() + _transpose16()
    if isa == "generic":
        ir += "declare <16 x float> @llvm.floor.v16f32(<16 x float>)\n"
    else:
        ir += "declare <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float>, i32, "
        ir += "<16 x float>, i16, i32)\n"
    if isa == "avx512_bf16":
        ir += _rounded_pairs()
    return ir + _exp2("fine", isa) + _exp2("coarse", isa)
