"""Loads that a switch sums over ranks and stores that it broadcasts: NVLink SHARP's `multimem`.

Law, at an address of a multicast mapping, 16 bytes per thread:

    load    x = round_to_type(sum_r rank r's value), accumulated in fp32 inside the switch
    store   every rank's value = x

The sum is rounded once, on its way out of the switch; fp32 operands pass unrounded at twice the
bytes. Needs sm_90 and an NVSwitch. The two instructions are PTX; `unpack` and `pack` are plain
Triton, which its interpreter runs. Source: PTX ISA, `multimem.ld_reduce` and `multimem.st`.
This file needs only triton.
"""

import triton
import triton.language as tl

# $0..$3 results, $4 address, $5 whether to load at all
_HEAD = "{ .reg .pred %live; setp.ne.s32 %live, $5, 0;"
_HEAD += " mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
_LOAD = " @%live multimem.ld_reduce.relaxed.sys.global.add"
_LOAD_BF16 = tl.constexpr(_HEAD + _LOAD + ".acc::f32.v4.bf16x2 {$0,$1,$2,$3}, [$4]; }")
_LOAD_FP16 = tl.constexpr(_HEAD + _LOAD + ".acc::f32.v4.f16x2 {$0,$1,$2,$3}, [$4]; }")
_LOAD_FP32 = tl.constexpr(_HEAD + _LOAD + ".v4.f32 {$0,$1,$2,$3}, [$4]; }")
# $0 result, $1 address, $2..$5 values, $6 whether to store
_STORE = tl.constexpr(
    "{ .reg .pred %live; setp.ne.s32 %live, $6, 0; mov.u32 $0, 0;"
    " @%live multimem.st.relaxed.sys.global.v4.f32 [$1], {$2,$3,$4,$5}; }"
)


@triton.jit
def _words(address, live, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        asm: tl.constexpr = _LOAD_BF16
    elif dtype == tl.float16:
        asm: tl.constexpr = _LOAD_FP16
    else:
        asm: tl.constexpr = _LOAD_FP32
    return tl.inline_asm_elementwise(
        asm,
        "=&r,=&r,=&r,=&r,l,r",
        [address, live.to(tl.int32)],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def unpack(a, b, c, d, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """fp32 [BLOCK] from four words per group of 16 bytes, the first in a: uint32 [BLOCK / PER]."""
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [.., 2, 2]: a b in the last, c d behind
    if dtype == tl.float32:
        total = words.to(tl.float32, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        total = tl.join(low, high)
    return total.reshape(BLOCK)


@triton.jit
def pack(y, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """The four words, as `unpack` takes them, of y (fp32 [BLOCK]) rounded to dtype."""
    GROUPS: tl.constexpr = BLOCK * dtype.primitive_bitwidth // 128
    rounded = y.to(dtype)
    if dtype == tl.float32:
        words = rounded.to(tl.uint32, bitcast=True).reshape(GROUPS, 2, 2)
    else:
        halves = rounded.to(tl.uint16, bitcast=True).to(tl.uint32)
        low, high = tl.split(halves.reshape(GROUPS, 2, 2, 2))
        words = low | (high << 16)
    even, odd = tl.split(words)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_sum(base, SIZE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """fp32 [BLOCK]: the sum over ranks of SIZE elements from the multicast address `base` (int64).

    SIZE elements must be a multiple of 16 bytes, as must the address; the rest of BLOCK is 0.
    """
    PER: tl.constexpr = 128 // dtype.primitive_bitwidth
    group = tl.arange(0, BLOCK // PER)
    a, b, c, d = _words(base + group.to(tl.int64) * 16, group * PER < SIZE, dtype)
    return unpack(a, b, c, d, BLOCK, dtype)


@triton.jit
def store_all(base, y, SIZE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Writes y (fp32 [BLOCK], rounded to dtype) to every rank at the multicast address `base`."""
    PER: tl.constexpr = 128 // dtype.primitive_bitwidth
    group = tl.arange(0, BLOCK // PER)
    a, b, c, d = pack(y, BLOCK, dtype)
    tl.inline_asm_elementwise(
        _STORE,
        "=&r,l,r,r,r,r,r",
        [base + group.to(tl.int64) * 16, a, b, c, d, (group * PER < SIZE).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
