"""What the kernel of `coded_linear` reads: signs, powers of two, α and columns of x.

This file needs only triton.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent, negative, zero, COMPUTE: tl.constexpr):
    """±2**-exponent, or 0 where `zero`, by writing the fields of a float; the exponent must be one
    of a normal number of COMPUTE (`coded_storage.product_dtype` sees to it)."""
    if COMPUTE == tl.float32:  # noqa: SIM300
        bits = ((127 - exponent.to(tl.int32)) << 23) | (negative.to(tl.int32) << 31)
    elif COMPUTE == tl.float16:  # noqa: SIM300
        bits = ((15 - exponent.to(tl.int16)) << 10) | (negative.to(tl.int16) << 15)
    else:
        bits = ((127 - exponent.to(tl.int16)) << 7) | (negative.to(tl.int16) << 15)
    return tl.where(zero, 0, bits).to(COMPUTE, bitcast=True)


@triton.jit
def signs_of(octets, s, COMPUTE: tl.constexpr):
    """Bit s of each byte as +1 (clear) or -1 (set)."""
    if COMPUTE == tl.float32:  # noqa: SIM300
        bits = ((octets.to(tl.int32) << (31 - s)) & -2147483648) | 0x3F800000
    elif COMPUTE == tl.float16:  # noqa: SIM300
        bits = ((octets.to(tl.int16) << (15 - s)).to(tl.int16) & -32768) | 0x3C00
    else:
        bits = ((octets.to(tl.int16) << (15 - s)).to(tl.int16) & -32768) | 0x3F80
    return bits.to(COMPUTE, bitcast=True)


@triton.jit
def read_alpha(at, inside, stride, POWERS: tl.constexpr):
    """fp32 α at `at`: a floating number, or a sum of POWERS powers of two `stride` apart."""
    if POWERS == 0:
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        v = tl.load(at, mask=inside, other=0).to(tl.int32)
        total = power_of_two(64 - tl.abs(v), v < 0, v == 0, tl.float32)
        for t in tl.static_range(1, POWERS):
            v = tl.load(at + t * stride, mask=inside, other=0).to(tl.int32)
            total += power_of_two(64 - tl.abs(v), v < 0, v == 0, tl.float32)
    return total


@triton.jit
def read_octets(words, row: tl.constexpr, stride_row, in_n):
    """Byte row `row` of a tile, uint8 [BLOCK_N, J]."""
    return tl.load(words + row * stride_row, mask=in_n[:, None], other=0)


@triton.jit
def shifts_of(
    words,
    s: tl.constexpr,
    stride_row,
    in_n,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """sum_t ±2**-e_t of columns s*J to s*J + J - 1 of a tile, [BLOCK_N, J], exact in COMPUTE."""
    WIDTH: tl.constexpr = BITS // TERMS
    ZERO: tl.constexpr = 2 ** (WIDTH - 1) - 1
    if BITS == 8:
        code = read_octets(words, s, stride_row, in_n)
    else:
        code = (read_octets(words, s % 4, stride_row, in_n) >> (s // 4 * 4)) & 15
        for plane in tl.static_range(4, BITS):
            code |= ((read_octets(words, plane, stride_row, in_n) >> s) & 1) << plane
    e = code & ZERO
    value = power_of_two(e, (code >> (WIDTH - 1)) & 1, e == ZERO, COMPUTE)
    if TERMS == 2:
        e = (code >> WIDTH) & ZERO
        value += power_of_two(e, (code >> (BITS - 1)) & 1, e == ZERO, COMPUTE)
    return value


@triton.jit
def read_columns(x_tile, s, column, in_m, in_features, stride_xk, J: tl.constexpr,
             RAGGED_K: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """x of columns s*J to s*J + J - 1 of a tile, [J, BLOCK_M]; column: the tile's first."""
    inside = in_m[None, :]
    if RAGGED_K:
        inside = inside & (column + s * J + tl.arange(0, J) < in_features)[:, None]
    return tl.load(x_tile + s * J * stride_xk, mask=inside, other=0.0).to(COMPUTE)
