"""Vector operations that TVM cannot spell, as LLVM IR to be imported into a kernel.

A kernel opens with ``with T.attr(0, "pragma_import_llvm", llvm_helpers(isa)):`` and calls, say,
``T.call_extern("float32x16", "rl_dpbf16", c, a, b)``. Only what is called is linked, and it is
inlined. bf16 vectors travel as integers because TVM widens bf16 operands before code generation.

rl_dpbf16(c f32x16, a i32x16, b i32x16)  c[l] + a[2l] b[2l] + a[2l+1] b[2l+1], AVX512_BF16
rl_cvtbf16(a f32x16) -> i16x16           fp32 to bf16, nearest even
rl_i8_bf16(a i8x32) -> i32x16            signed bytes to bf16, exact
rl_shift_bf16(a i8x32) -> i32x16         sign and 7 bits of exponent to bf16, exact
rl_pair_f32(a i32x16) -> f32x16          bf16 pairs, equal in all lanes, to fp32 in turn
rl_pair_sums(a f32x16, b f32x16)         sums of neighbours, those of a before those of b
rl_cvtf32(a i16x16) -> f32x16            bf16 to fp32, exact
rl_half_f32(a i16x16) -> f32x16          fp16 to fp32, exact
rl_byte_sums(s i32x16, t u8x64, i u8x64)  s[l] + sum over 4 of t[i & 63], AVX512_VBMI and _VNNI
rl_sums_low, rl_sums_high(q i32x16) -> u8x64  for each 4 of q, byte 0 or 1 of 32768 + sum ±q[i], the
                                         sign plus where bit i of the place among 16 is set
rl_exp2(x f32x16)                        2**x, rel. error 2e-7, AVX512F; x is held above -127
rl_prefetch(address) -> i32              brings a cache line nearer; any address, never faults
rl_max, rl_hmax, rl_hsum                 maximum of two; horizontal maximum and sum; NaN is not kept
"""

import functools

_FIXED = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x float> @llvm.roundeven.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, \
i16, i32)
define <16 x float> @rl_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %a1 = bitcast <16 x i32> %a to <32 x bfloat>
  %b1 = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %a1, \
<32 x bfloat> %b1)
  ret <16 x float> %r
}
declare <64 x i8> @llvm.x86.avx512.permvar.qi.512(<64 x i8>, <64 x i8>)
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define <16 x i32> @rl_byte_sums(<16 x i32> %s, <64 x i8> %t, <64 x i8> %i) alwaysinline {
  %e = call <64 x i8> @llvm.x86.avx512.permvar.qi.512(<64 x i8> %t, <64 x i8> %i)
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %s, <64 x i8> %e, \
<64 x i8> splat (i8 1))
  ret <16 x i32> %r
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i32 @rl_prefetch(ptr %a) alwaysinline {
  call void @llvm.prefetch.p0(ptr %a, i32 0, i32 3, i32 1)
  ret i32 0
}
define <16 x i32> @rl_shift_bf16(<32 x i8> %a) alwaysinline {
  %w = sext <32 x i8> %a to <32 x i16>
  %s = shl <32 x i16> %w, splat (i16 7)
  %t = and <32 x i16> %s, splat (i16 -16512)
  %r = bitcast <32 x i16> %t to <16 x i32>
  ret <16 x i32> %r
}
define <16 x float> @rl_pair_f32(<16 x i32> %a) alwaysinline {
  %s = shl <16 x i32> %a, <i32 16, i32 0, i32 16, i32 0, i32 16, i32 0, i32 16, i32 0, \
i32 16, i32 0, i32 16, i32 0, i32 16, i32 0, i32 16, i32 0>
  %m = and <16 x i32> %s, splat (i32 -65536)
  %r = bitcast <16 x i32> %m to <16 x float>
  ret <16 x float> %r
}
define <16 x float> @rl_cvtf32(<16 x i16> %a) alwaysinline {
  %t = bitcast <16 x i16> %a to <16 x bfloat>
  %r = fpext <16 x bfloat> %t to <16 x float>
  ret <16 x float> %r
}
define <16 x float> @rl_half_f32(<16 x i16> %a) alwaysinline {
  %t = bitcast <16 x i16> %a to <16 x half>
  %r = fpext <16 x half> %t to <16 x float>
  ret <16 x float> %r
}
define float @rl_hmax(<16 x float> %a) alwaysinline {
  %r = call nnan nsz float @llvm.vector.reduce.fmax.v16f32(<16 x float> %a)
  ret float %r
}
define float @rl_hsum(<16 x float> %a) alwaysinline {
  %r = call reassoc nsz float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %a)
  ret float %r
}
define <16 x float> @rl_max(<16 x float> %a, <16 x float> %b) alwaysinline {
  %r = call nnan nsz <16 x float> @llvm.maxnum.v16f32(<16 x float> %a, <16 x float> %b)
  ret <16 x float> %r
}
define <16 x float> @rl_exp2(<16 x float> %x) alwaysinline {
  %m = call nnan nsz <16 x float> @llvm.maxnum.v16f32(<16 x float> %x, \
<16 x float> splat (float -1.270000e+02))
  %n = call <16 x float> @llvm.roundeven.v16f32(<16 x float> %m)
  %f = fsub <16 x float> %m, %n
  %p5 = call <16 x float> @llvm.fma.v16f32(<16 x float> splat (float 0x3F24309120000000), \
<16 x float> %f, <16 x float> splat (float 0x3F55D87FE0000000))
  %p4 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p5, <16 x float> %f, \
<16 x float> splat (float 0x3F83B2AB60000000))
  %p3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p4, <16 x float> %f, \
<16 x float> splat (float 0x3FAC6B08E0000000))
  %p2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p3, <16 x float> %f, \
<16 x float> splat (float 0x3FCEBFBE00000000))
  %p1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p2, <16 x float> %f, \
<16 x float> splat (float 0x3FE62E4300000000))
  %p0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p1, <16 x float> %f, \
<16 x float> splat (float 1.000000e+00))
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %p0, <16 x float> %n, \
<16 x float> undef, i16 -1, i32 4)
  ret <16 x float> %r
}
"""


def _pair_sums() -> str:
    ir = "define <16 x float> @rl_pair_sums(<16 x float> %a, <16 x float> %b) alwaysinline {\n"
    for name, start in (("even", 0), ("odd", 1)):
        ir += f"  %{name} = shufflevector <16 x float> %a, <16 x float> %b, "
        ir += f"<16 x i32> <{', '.join(f'i32 {start + 2 * i}' for i in range(16))}>\n"
    return ir + "  %r = fadd <16 x float> %even, %odd\n  ret <16 x float> %r\n}\n"


def _sums_of_four() -> str:
    """All 16 signed sums of each 4 of 16 integers, as bytes."""
    ir = ""
    for name, shift in (("low", 0), ("high", 8)):
        ir += f"define <64 x i8> @rl_sums_{name}(<16 x i32> %q) alwaysinline {{\n"
        ir += "  %s0 = bitcast <64 x i16> splat (i16 -32768) to <64 x i16>\n"
        ir += "  %n = trunc <16 x i32> %q to <16 x i16>\n"
        for i in range(4):
            where = ", ".join(f"i32 {entry // 16 * 4 + i}" for entry in range(64))
            sign = ", ".join(f"i16 {1 if entry >> i & 1 else -1}" for entry in range(64))
            ir += (
                f"  %x{i} = shufflevector <16 x i16> %n, <16 x i16> poison, <64 x i32> <{where}>\n"
            )
            ir += f"  %m{i} = mul <64 x i16> %x{i}, <{sign}>\n"
            ir += f"  %s{i + 1} = add <64 x i16> %s{i}, %m{i}\n"
        ir += f"  %t = lshr <64 x i16> %s4, splat (i16 {shift})\n"
        ir += "  %r = trunc <64 x i16> %t to <64 x i8>\n  ret <64 x i8> %r\n}\n"
    return ir


def rounding_to_bf16(isa: str, lanes: int = 16) -> str:
    """Lines, once in a function, that round %x, fp32 of so many lanes, to nearest even: %bits, i16.

    Without the instruction LLVM calls a function that no process has to have, so the bits are
    rounded as integers: a NaN stays one, and quiet, and subnormal numbers stay, which the
    instruction takes for zeros."""
    if isa == "avx512_bf16":
        return f"""  %narrow = fptrunc <{lanes} x float> %x to <{lanes} x bfloat>
  %bits = bitcast <{lanes} x bfloat> %narrow to <{lanes} x i16>
"""
    return f"""  %wide = bitcast <{lanes} x float> %x to <{lanes} x i32>
  %high = lshr <{lanes} x i32> %wide, splat (i32 16)
  %odd = and <{lanes} x i32> %high, splat (i32 1)
  %half = add <{lanes} x i32> %odd, splat (i32 32767)
  %sum = add <{lanes} x i32> %wide, %half
  %near = lshr <{lanes} x i32> %sum, splat (i32 16)
  %quiet = or <{lanes} x i32> %high, splat (i32 64)
  %nan = fcmp uno <{lanes} x float> %x, zeroinitializer
  %chosen = select <{lanes} x i1> %nan, <{lanes} x i32> %quiet, <{lanes} x i32> %near
  %bits = trunc <{lanes} x i32> %chosen to <{lanes} x i16>
"""


@functools.cache
def llvm_helpers(isa: str) -> str:
    """What a kernel for `isa` imports."""
    to_bf16 = "define <16 x i16> @rl_cvtbf16(<16 x float> %x) alwaysinline {\n"
    to_bf16 += rounding_to_bf16(isa) + "  ret <16 x i16> %bits\n}\n"
    to_bf16 += "define <16 x i32> @rl_i8_bf16(<32 x i8> %a) alwaysinline {\n"
    to_bf16 += "  %x = sitofp <32 x i8> %a to <32 x float>\n" + rounding_to_bf16(isa, 32)
    to_bf16 += "  %r = bitcast <32 x i16> %bits to <16 x i32>\n  ret <16 x i32> %r\n}\n"
    return _FIXED + to_bf16 + _pair_sums() + _sums_of_four()
