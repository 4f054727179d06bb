"""Vector operations that TVM cannot spell, as LLVM IR to be imported into a kernel.

A kernel opens with ``with T.attr(0, "pragma_import_llvm", LLVM_HELPERS):`` and calls, for example,
``T.call_extern("float32x16", "rl_dpbf16", c, a, b)``. Only what is called is linked, and it is
inlined. bf16 vectors travel as integers because TVM widens bf16 operands before code generation.

rl_dpbf16(c f32x16, a i32x16, b i32x16)  c[l] + a[2l] b[2l] + a[2l+1] b[2l+1], AVX512_BF16
rl_cvtbf16(a f32x16) -> i16x16           fp32 to bf16, nearest even
rl_i8_bf16(a i8x32) -> i32x16            signed bytes to bf16, exact
rl_pair_f32(a i32x16) -> f32x16          bf16 pairs, equal in all lanes, to fp32 in turn
rl_pair_sums(a f32x16, b f32x16)         sums of neighbours, those of a before those of b
rl_cvtf32(a i16x16) -> f32x16            bf16 to fp32, exact
rl_half_f32(a i16x16) -> f32x16          fp16 to fp32, exact
rl_exp2(x f32x16)                        2**x, rel. error 2e-7, AVX512F; x is held above -127
rl_prefetch(address) -> i32              brings a cache line nearer; any address, never faults
rl_max, rl_hmax, rl_hsum                 maximum of two; horizontal maximum and sum; NaN is not kept
"""

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
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i32 @rl_prefetch(ptr %a) alwaysinline {
  call void @llvm.prefetch.p0(ptr %a, i32 0, i32 3, i32 1)
  ret i32 0
}
define <16 x i16> @rl_cvtbf16(<16 x float> %a) alwaysinline {
  %t = fptrunc <16 x float> %a to <16 x bfloat>
  %r = bitcast <16 x bfloat> %t to <16 x i16>
  ret <16 x i16> %r
}
define <16 x i32> @rl_i8_bf16(<32 x i8> %a) alwaysinline {
  %f = sitofp <32 x i8> %a to <32 x float>
  %t = fptrunc <32 x float> %f to <32 x bfloat>
  %r = bitcast <32 x bfloat> %t to <16 x i32>
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


LLVM_HELPERS = _FIXED + _pair_sums()
