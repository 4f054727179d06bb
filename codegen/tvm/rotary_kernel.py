"""The CPU kernel of `ridgeline::rotary`, as one TVMScript function.

Law: `ridgeline.ir.rotary`, for all heads of q and k. Work is shared out by position: c and s of a
position are read once for all its heads. Half-split features are turned 16 pairs at a time; pairs
of neighbours are turned within a vector.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    fma,
    kernel_helpers,
    lanes,
    registers,
    tensor,
    vector,
)

_ROTATE = """
define <16 x float> @rl_rotate_pairs(<16 x float> %a) alwaysinline {
  %n = fneg <16 x float> %a
  %r = shufflevector <16 x float> %a, <16 x float> %n, <16 x i32> <i32 17, i32 0, i32 19, i32 2, \
i32 21, i32 4, i32 23, i32 6, i32 25, i32 8, i32 27, i32 10, i32 29, i32 12, i32 31, i32 14>
  ret <16 x float> %r
}
"""


class Spec(NamedTuple):
    """dim, size: D and R; dtype of q and k, angle of cos and sin: "float32", "bfloat16" or
    "float16"; isa: one of `isa.ISAS`; parallel: whether positions are spread over threads."""

    dim: int
    size: int
    interleaved: bool
    dtype: str
    angle: str
    isa: str
    parallel: bool


def build(spec: Spec) -> Any:
    """main(q, k, cos, sin, out): q [B,H,S,D], k [B,Hk,S,D], cos, sin [1|B,S,R], out [B,S,H+Hk,D].

    The last dimension of all of them is contiguous; other strides are free, out is contiguous.
    """
    dim, size, dtype, angle = spec.dim, spec.size, spec.dtype, spec.angle
    half = size // 2
    loop = T.parallel if spec.parallel else T.serial
    # pairs beyond the last whole vector, one by one
    whole = (size if spec.interleaved else half) // LANES * LANES

    def read(x, kind, *at):
        return vector(f"rl_load_{kind}_16", T.address_of(x[at]))

    def wide(number):
        return T.Cast("float32", number)

    @T.inline
    def store(y, b, g, s, column, value):
        if dtype == "float32":
            y[b, s, g, lanes(column)] = value
        else:
            y[b, s, g, lanes(column)] = T.Cast(f"{dtype}x16", value)

    @T.inline
    def turn_halves(x, y, cos, sin, a, b, h, g, s, i):
        one = registers((LANES,))
        two = registers((LANES,))
        one[lanes(0)] = read(x, dtype, b, h, s, i)
        two[lanes(0)] = read(x, dtype, b, h, s, half + i)
        low: T.let = two[lanes(0)] * read(sin, angle, a, s, i)
        high: T.let = one[lanes(0)] * read(sin, angle, a, s, half + i)
        store(y, b, g, s, i, one[lanes(0)] * read(cos, angle, a, s, i) - low)
        store(y, b, g, s, half + i, fma(two[lanes(0)], read(cos, angle, a, s, half + i), high))

    @T.inline
    def turn_neighbours(x, y, cos, sin, a, b, h, g, s, i):
        one = registers((LANES,))
        one[lanes(0)] = read(x, dtype, b, h, s, i)
        turned: T.let = vector("rl_rotate_pairs", one[lanes(0)]) * read(sin, angle, a, s, i)
        store(y, b, g, s, i, fma(one[lanes(0)], read(cos, angle, a, s, i), turned))

    @T.inline
    def turn_pair(x, y, cos, sin, a, b, h, g, s, i, j):
        """One pair of features, i and j."""
        # in a buffer: TVM reads a bf16 number that is bound to a name as an integer
        pair = registers((2,))
        pair[0] = T.Cast("float32", x[b, h, s, i])
        pair[1] = T.Cast("float32", x[b, h, s, j])
        y[b, s, g, i] = T.Cast(dtype, pair[0] * wide(cos[a, s, i]) - pair[1] * wide(sin[a, s, i]))
        y[b, s, g, j] = T.Cast(dtype, pair[1] * wide(cos[a, s, j]) + pair[0] * wide(sin[a, s, j]))

    @T.inline
    def turn(x, y, cos, sin, a, b, h, g, s):
        """Head h of x, which is head g of the result, at one position."""
        for c in T.serial(whole // LANES):
            if spec.interleaved:
                turn_neighbours(x, y, cos, sin, a, b, h, g, s, c * LANES)
            else:
                turn_halves(x, y, cos, sin, a, b, h, g, s, c * LANES)
        if spec.interleaved:
            for p in T.serial((size - whole) // 2):
                turn_pair(x, y, cos, sin, a, b, h, g, s, whole + 2 * p, whole + 2 * p + 1)
        else:
            for p in T.serial(half - whole):
                turn_pair(x, y, cos, sin, a, b, h, g, s, whole + p, half + whole + p)
        for c in T.serial((dim - size) // LANES):
            # by way of fp32, which is exact: TVM copies no bf16 as it is
            store(y, b, g, s, size + c * LANES, read(x, dtype, b, h, s, size + c * LANES))
        for i in T.serial((dim - size) % LANES):
            column = T.meta_var(dim - (dim - size) % LANES + i)
            y[b, s, g, column] = T.Cast(dtype, T.Cast("float32", x[b, h, s, column]))

    @T.prim_func(s_tir=True)
    def main(q_: T.handle, k_: T.handle, cos_: T.handle, sin_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch, heads, key_heads = T.int64(), T.int64(), T.int64()
        length, angles = T.int64(), T.int64()
        q = tensor(q_, (batch, heads, length, T.int64(dim)), dtype, T.int64(1))
        k = tensor(k_, (batch, key_heads, length, T.int64(dim)), dtype, T.int64(1))
        table = T.meta_var((angles, length, T.int64(size)))
        cos = T.match_buffer(
            cos_, table, angle, strides=(T.int64(), T.int64(), T.int64(1)), align=1
        )
        sin = T.match_buffer(
            sin_, table, angle, strides=(T.int64(), T.int64(), T.int64(1)), align=1
        )
        heads_out = T.meta_var((batch, length, heads + key_heads, T.int64(dim)))
        out = T.match_buffer(out_, heads_out, dtype, align=1)
        with T.attr(0, "pragma_import_llvm", kernel_helpers(spec.isa) + _ROTATE):
            for item in loop(batch * length):
                b = T.meta_var(item // length)
                s = T.meta_var(item % length)
                a = T.meta_var(T.min(item // length, angles - 1))
                for h in T.serial(heads):
                    turn(q, out, cos, sin, a, b, h, h, s)
                for h in T.serial(key_heads):
                    turn(k, out, cos, sin, a, b, h, heads + h, s)

    return main
