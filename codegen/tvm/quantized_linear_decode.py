"""A panel of a quantised weight as bf16, for the CPU kernel of many rows.

Law, for column n of the panel (an output) and feature k of group g:

    tile[i, j, l] = (bf16(ŵ[n, 2 i]), bf16(ŵ[n, 2 i + 1])),   n = 16 j + l,   ŵ in fp32
    uniform, shift   ŵ = fma(scale[n,g], sum over terms of code, base[n,g])
    binary           ŵ = offset[n,g] + α_1 ± ... , planes in their order

with base what ŵ is where the centred code is 0. Each decoder is a `T.inline` part of
`quantized_linear_many`: decode(table, codes, scale, offset, tile, panel).
"""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm import binary_linear_layout
from ridgeline.codegen.tvm.quantized_linear_parts import (
    LANES,
    STEP,
    Spec,
    float_of_byte,
    fma,
    fp32,
    lanes,
    pieces,
    splat,
)

SIGN = -0x80000000
"""The sign bit of an int32."""

POWER_UNIT = 2.0**63
"""What the float form of int8 powers of two is multiplied by, see `binary_linear_layout`."""


def bf16_bits(vector: Any) -> Any:
    """fp32 rounded to bf16, as the low halves of int32x16."""
    return T.Cast("int32x16", T.call_extern("uint16x16", "rl_cvtbf16", vector))


def scale_shape_of(spec: Spec) -> tuple[int, ...]:
    """The shape of `scale` where groups are rows' own."""
    per_plane = (
        ((spec.bits, spec.terms) if spec.terms else (spec.bits,))
        if (spec.codec == "binary")
        else ()
    )
    return (spec.panels, spec.groups, *per_plane, spec.vectors, LANES)


def alpha(spec: Spec, scale: Any, index: tuple[Any, ...], where: tuple[Any, ...]) -> Any:
    """α of scale[index] at [where], as fp32x16: of int8 powers of two, 2**-63 of it."""
    if not spec.terms:
        return fp32(scale[(*index, *where)], spec.scale)
    value = float_of_byte(scale[(*index, 0, *where)])
    for term in range(1, spec.terms):
        value = value + float_of_byte(scale[(*index, term, *where)])
    return value


def signed(vector: Any, word: Any, bit: Any) -> Any:
    """fp32x16 `vector`, negated in the lanes of int32x16 `word` in which `bit` is 0."""
    sign = T.bitwise_and(T.shift_left(word, splat(31 - bit)), splat(SIGN))
    flipped = T.bitwise_xor(
        T.bitwise_xor(sign, splat(SIGN)), T.reinterpret(vector, dtype="int32x16")
    )
    return T.reinterpret(flipped, dtype="float32x16")


def place(i: Any) -> Any:
    """The bit of feature i of a step of "binary" in its lane's 32 bits."""
    return i % 16 // 4 * 8 + i // 16 * 4 + i % 4


def uniform_decode(spec: Spec) -> tuple[Any, tuple[int, ...], str]:
    """(decode, shape of the codes, their dtype) of "uniform" and "shift"."""
    group, groups, steps = spec.group_size, spec.groups, spec.steps
    per_group, nv, centre = group // STEP, spec.vectors, 2 ** (spec.bits - 1)
    pair_code = pieces(spec).pair_code
    shape = (spec.panels, steps, spec.terms, 4 if spec.wide else 1, nv, 2 * LANES)

    def base(scale, offset, panel, g, j):
        """What ŵ is where the centred code is 0."""
        if spec.scheme == "symmetric":
            return splat(T.float32(0))
        factor = fp32(scale[panel, g, j, lanes(0)], spec.scale)
        least = fp32(offset[panel, g, j, lanes(0)], spec.offset)
        if spec.scheme == "minimum":
            return fma(factor, splat(T.float32(centre)), least)
        return factor * (splat(T.float32(centre)) - least)

    @T.inline
    def decode(table, codes, scale, offset, tile, panel):
        factor = T.alloc_buffer((nv, LANES), "float32")
        zero = T.alloc_buffer((nv, LANES), "float32")
        pair = T.alloc_buffer((LANES,), "int32")
        value = T.alloc_buffer((2, LANES), "float32")
        for g in T.serial(groups):
            for j in T.unroll(nv):
                factor[j, lanes(0)] = fp32(scale[panel, g, j, lanes(0)], spec.scale)
                zero[j, lanes(0)] = base(scale, offset, panel, g, j)
            for s in T.serial(T.min(per_group, steps - g * per_group)):
                for j in T.unroll(nv):
                    for i in T.unroll(STEP // 2):
                        value[0, lanes(0)] = splat(T.float32(0))
                        value[1, lanes(0)] = splat(T.float32(0))
                        for term in T.unroll(spec.terms):
                            pair[lanes(0)] = pair_code(
                                table, codes, panel, g * per_group + s, term, j, i
                            )
                            value[0, lanes(0)] = value[0, lanes(0)] + T.reinterpret(
                                T.shift_left(pair[lanes(0)], splat(16)), dtype="float32x16"
                            )
                            value[1, lanes(0)] = value[1, lanes(0)] + T.reinterpret(
                                T.bitwise_and(pair[lanes(0)], splat(-65536)), dtype="float32x16"
                            )
                        tile[(g * per_group + s) * (STEP // 2) + i, j, lanes(0)] = T.bitwise_or(
                            bf16_bits(
                                fma(factor[j, lanes(0)], value[0, lanes(0)], zero[j, lanes(0)])
                            ),
                            T.shift_left(
                                bf16_bits(
                                    fma(factor[j, lanes(0)], value[1, lanes(0)], zero[j, lanes(0)])
                                ),
                                splat(16),
                            ),
                        )

    return decode, shape, "int8" if spec.wide else "int16"


def binary_decode(spec: Spec) -> tuple[Any, tuple[int, ...], str]:
    """(decode, shape of the codes, their dtype) of "binary" with groups of rows' own."""
    groups, nv, planes, step_size = spec.groups, spec.vectors, spec.bits, binary_linear_layout.STEP
    steps, per_group = spec.padded // step_size, spec.group_size // step_size
    shape = (spec.panels, steps, planes, nv, 4 * LANES)
    unit = T.float32(POWER_UNIT if spec.terms else 1.0)

    @T.inline
    def decode(table, codes, scale, offset, tile, panel):
        factor = T.alloc_buffer((planes, nv, LANES), "float32")
        least = T.alloc_buffer((nv, LANES), "float32")
        word = T.alloc_buffer((planes, LANES), "int32")
        value = T.alloc_buffer((2, LANES), "float32")
        for g in T.serial(groups):
            for j in T.unroll(nv):
                if spec.offset == "none":
                    least[j, lanes(0)] = splat(T.float32(0))
                else:
                    least[j, lanes(0)] = fp32(offset[panel, g, j, lanes(0)], spec.offset)
                for p in T.unroll(planes):
                    factor[p, j, lanes(0)] = alpha(
                        spec, scale, (panel, g, p), (j, lanes(0))
                    ) * splat(unit)
            for s in T.serial(T.min(per_group, steps - g * per_group)):
                for j in T.unroll(nv):
                    for p in T.unroll(planes):
                        word[p, lanes(0)] = T.reinterpret(
                            codes[panel, g * per_group + s, p, j, lanes(0, 64)], dtype="int32x16"
                        )
                    for i in T.unroll(step_size // 2):
                        for odd in T.unroll(2):
                            value[odd, lanes(0)] = least[j, lanes(0)]
                            for p in T.unroll(planes):
                                value[odd, lanes(0)] = value[odd, lanes(0)] + signed(
                                    factor[p, j, lanes(0)], word[p, lanes(0)], place(2 * i + odd)
                                )
                        tile[(g * per_group + s) * (step_size // 2) + i, j, lanes(0)] = (
                            T.bitwise_or(
                                bf16_bits(value[0, lanes(0)]),
                                T.shift_left(bf16_bits(value[1, lanes(0)]), splat(16)),
                            )
                        )

    return decode, shape, "uint8"
