"""FlashAttention-2 forward on a CPU, as one TVMScript function for many query rows.

Law (`ridgeline.ir.attention`), for a tile of ROWS query rows and key blocks of KEYS, per row:

    z   = scale (q · k) + mask;  excluded entries -inf
    m'  = max(m, max z);  a = exp(m - m');  p = exp(z - m')
    l   = a l + sum p;  acc = a acc + p V;  out = acc / l, and 0 where every key is excluded

exp(x) is 2**(x log2 e), taken after the maximum is subtracted, so that a mask of the lowest finite
number stays finite. A vector lane is a key in the scores and a value feature in the output; keys
are transposed once per call into blocks [D, KEYS] that all rows share. Blocks above the diagonal
are never touched, and only blocks that meet it, the mask or the ragged end are compared.
Source: Dao, FlashAttention-2, sections 3.1-3.2. bf16 forms both products with `vdpbf16ps`, so the
probabilities are rounded to bf16 before the second; sums are fp32.
"""

import math
from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.llvm_helpers import LLVM_HELPERS

LANES = 16
KEYS = 64
"""Keys per block: four vectors of scores for each row."""
BLOCK_ROWS = 64
"""Query rows of one task; a task reads its keys from L2."""
LOG2E = math.log2(math.e)
LOWEST = -3.4028234663852886e38
"""The lowest finite fp32: stands for -inf where a difference would be -inf - (-inf)."""


class Spec(NamedTuple):
    """What one compiled kernel is specialised on; sizes and strides are runtime values.

    group: query heads per key head. dtype: "float32" or "bfloat16" (the latter needs
    avx512_bf16). mask: None, "uint8" (boolean) or "float32" (added). causal: whether `diagonal`
    is read.
    """

    head_dim: int
    value_dim: int
    group: int
    dtype: str
    mask: str | None
    causal: bool
    isa: str

    @property
    def rows(self) -> int:
        """Query rows that share a loaded vector; their accumulators must fit the registers."""
        return max(1, min(4, 256 // self.value_dim))


def lanes(start: Any, count: int = LANES) -> Any:
    return T.ramp(start, 1, count)


def splat(value: Any, count: int = LANES) -> Any:
    return T.broadcast(value, count)


def fma(a: Any, b: Any, c: Any) -> Any:
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.fma")
    return T.call_llvm_pure_intrin(intrinsic, a, b, c, dtype="float32x16")


def ceil_div(a: Any, b: int) -> Any:
    return (a + (b - 1)) // b


def vector_exp(x: Any, isa: str) -> Any:
    """exp of 16 numbers <= 0; at least 2**-127, so excluded entries are selected away after."""
    if isa == "generic":
        return T.exp(x)
    return T.call_extern("float32x16", "rl_exp2", x * splat(T.float32(LOG2E)))


def maximum(a: Any, b: Any) -> Any:
    return T.call_extern("float32x16", "rl_max", a, b)


def across(name: str, a: Any) -> Any:
    """Horizontal "max" or "sum" of 16 lanes."""
    return T.call_extern("float32", f"rl_h{name}", a)


def build(spec: Spec) -> Any:
    """main(query, key, value, mask, out, scale, diagonal), a `tvm.tirx.PrimFunc`.

    query [B,H,Sq,D], key [B,Hk,Sk,D], value [B,Hk,Sk,Dv], out [B,H,Sq,Dv] with any strides but 1
    in the last dimension (bf16: query and key as int32 pairs, value and out as int16); mask
    [B,H,Sq,Sk], strides 0 allowed, or a 4-d stand-in of one element where there is none.
    """
    d, dv, group, rows = spec.head_dim, spec.value_dim, spec.group, spec.rows
    nv, nk = dv // LANES, KEYS // LANES
    pairs = spec.dtype == "bfloat16"
    depth = d // 2 if pairs else d
    word, half = ("int32", "int16") if pairs else ("float32", "float32")
    packed_keys = KEYS // 2 if pairs else KEYS
    minus_inf = T.float32(-math.inf)

    def product(a, b, c):
        if pairs:
            return T.call_extern("float32x16", "rl_dpbf16", c, a, b)
        return fma(a, b, c)

    @T.inline
    def pack_keys(key, packed, batch, head, block, slot, length):
        """A block of keys, transposed, zeros past the end."""
        for n in T.serial(KEYS):
            for i in T.serial(depth):
                packed[slot, block, i, n] = T.Cast(word, 0)
                if block * KEYS + n < length:
                    packed[slot, block, i, n] = key[batch, head, block * KEYS + n, i]

    @T.inline
    def pack_values(value, packed, batch, head, block, slot, length):
        """A block of bf16 values as pairs of consecutive keys, zeros past the end."""
        for n in T.serial(KEYS):
            for i in T.serial(dv):
                packed[slot, block, n // 2, i * 2 + n % 2] = T.int16(0)
                if block * KEYS + n < length:
                    packed[slot, block, n // 2, i * 2 + n % 2] = value[
                        batch, head, block * KEYS + n, i
                    ]

    @T.inline
    def scores(query, packed, s, batch, head, slot, block, row, length, scale):
        """s = scale (q · k) of `rows` rows against a block; rows past the end repeat the last."""
        for m in T.unroll(rows):
            for j in T.unroll(nk):
                s[m, j, lanes(0)] = splat(T.float32(0))
        for i in T.serial(depth):
            for m in T.unroll(rows):
                for j in T.unroll(nk):
                    s[m, j, lanes(0)] = product(
                        splat(query[batch, head, T.min(row + m, length - 1), i]),
                        packed[slot, block, i, lanes(j * LANES)],
                        s[m, j, lanes(0)],
                    )
        for m in T.unroll(rows):
            for j in T.unroll(nk):
                s[m, j, lanes(0)] = s[m, j, lanes(0)] * splat(scale)

    @T.inline
    def exclude(s, mask, batch, head, block, row, length, keys, diagonal):
        """The mask, the diagonal and the ragged end, lane by lane where the mask is read."""
        for m in T.unroll(rows):
            if spec.mask is not None:
                for n in T.serial(T.min(KEYS, keys - block * KEYS)):
                    if spec.mask == "uint8":
                        if mask[
                            batch, head, T.min(row + m, length - 1), block * KEYS + n
                        ] == T.uint8(0):
                            s[m, n // LANES, n % LANES] = minus_inf
                    else:
                        s[m, n // LANES, n % LANES] = (
                            s[m, n // LANES, n % LANES]
                            + mask[batch, head, T.min(row + m, length - 1), block * KEYS + n]
                        )
            for j in T.unroll(nk):
                last = keys - 1 - block * KEYS
                if spec.causal:
                    last = T.min(last, row + m + diagonal - block * KEYS)
                s[m, j, lanes(0)] = T.Select(
                    lanes(T.int32(j * LANES)) <= splat(T.Cast("int32", T.max(last, T.int64(-1)))),
                    s[m, j, lanes(0)],
                    splat(minus_inf),
                )

    @T.inline
    def rescale(s, top, total, acc, m):
        """The new maximum of row m, and its sums brought to it."""
        new = T.alloc_buffer((1,), "float32", scope="local")
        new[0] = T.max(
            top[m],
            across(
                "max",
                maximum(
                    maximum(s[m, 0, lanes(0)], s[m, 1, lanes(0)]),
                    maximum(s[m, 2, lanes(0)], s[m, 3, lanes(0)]),
                ),
            ),
        )
        if new[0] > top[m]:
            for v in T.unroll(nv):
                acc[m, v, lanes(0)] = acc[m, v, lanes(0)] * vector_exp(
                    splat(T.max(top[m], T.float32(LOWEST)) - new[0]), spec.isa
                )
            total[m, lanes(0)] = total[m, lanes(0)] * vector_exp(
                splat(T.max(top[m], T.float32(LOWEST)) - new[0]), spec.isa
            )
            top[m] = new[0]

    @T.inline
    def probabilities(s, p, top, total, edge):
        """p = exp(s - max); entries at -inf are exactly 0."""
        one = T.alloc_buffer((LANES,), "float32", scope="local")
        for m in T.unroll(rows):
            for j in T.unroll(nk):
                one[lanes(0)] = vector_exp(
                    s[m, j, lanes(0)] - splat(T.max(top[m], T.float32(LOWEST))), spec.isa
                )
                if edge:
                    one[lanes(0)] = T.Select(
                        s[m, j, lanes(0)] == splat(minus_inf),
                        splat(T.float32(0)),
                        one[lanes(0)],
                    )
                total[m, lanes(0)] = total[m, lanes(0)] + one[lanes(0)]
                if pairs:
                    p[m, lanes(j * 8, 8)] = T.reinterpret(
                        T.call_extern("int16x16", "rl_cvtbf16", one[lanes(0)]), dtype="int32x8"
                    )
                else:
                    p[m, lanes(j * LANES)] = one[lanes(0)]

    @T.inline
    def accumulate(p, value, packed, acc, batch, head, slot, block, keys):
        """acc += p V over a block."""
        if pairs:
            for n in T.serial(packed_keys):
                for v in T.unroll(nv):
                    pair = T.alloc_buffer((LANES,), "int32", scope="local")
                    pair[lanes(0)] = T.reinterpret(
                        packed[slot, block, n, lanes(v * 2 * LANES, 2 * LANES)], dtype="int32x16"
                    )
                    for m in T.unroll(rows):
                        acc[m, v, lanes(0)] = product(
                            splat(p[m, n]), pair[lanes(0)], acc[m, v, lanes(0)]
                        )
        else:
            for n in T.serial(T.min(KEYS, keys - block * KEYS)):
                for m in T.unroll(rows):
                    for v in T.unroll(nv):
                        acc[m, v, lanes(0)] = product(
                            splat(p[m, n]),
                            value[batch, head, block * KEYS + n, lanes(v * LANES)],
                            acc[m, v, lanes(0)],
                        )

    @T.inline
    def store(out, acc, total, batch, head, row, length):
        for m in T.unroll(rows):
            if row + m < length:
                whole = T.alloc_buffer((1,), "float32", scope="local")
                whole[0] = across("sum", total[m, lanes(0)])
                for v in T.unroll(nv):
                    result = T.alloc_buffer((LANES,), "float32", scope="local")
                    result[lanes(0)] = acc[m, v, lanes(0)] * splat(
                        T.if_then_else(
                            whole[0] > T.float32(0), T.float32(1) / whole[0], T.float32(0)
                        )
                    )
                    if pairs:
                        out[batch, head, row + m, lanes(v * LANES)] = T.call_extern(
                            "int16x16", "rl_cvtbf16", result[lanes(0)]
                        )
                    else:
                        out[batch, head, row + m, lanes(v * LANES)] = result[lanes(0)]

    @T.inline
    def block_step(
        query, value, mask, keys_t, values_p, s, p, top, total, acc,
        batch, head, slot, block, row, length, keys, scale, diagonal, edge,
    ):  # fmt: skip
        scores(query, keys_t, s, batch, head, slot, block, row, length, scale)
        if edge:
            exclude(s, mask, batch, head, block, row, length, keys, diagonal)
        for m in T.unroll(rows):
            rescale(s, top, total, acc, m)
        probabilities(s, p, top, total, edge)
        accumulate(p, value, values_p, acc, batch, head // group, slot, block, keys)

    @T.prim_func(s_tir=True)
    def main(
        a: T.handle,
        b: T.handle,
        c: T.handle,
        e: T.handle,
        f: T.handle,
        scale: T.float32,
        diagonal: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        batch = T.int64()
        heads = T.int64()
        kv_heads = T.int64()
        length = T.int64()
        keys = T.int64()
        q0 = T.int64()
        q1 = T.int64()
        q2 = T.int64()
        k0 = T.int64()
        k1 = T.int64()
        k2 = T.int64()
        v0 = T.int64()
        v1 = T.int64()
        v2 = T.int64()
        o0 = T.int64()
        o1 = T.int64()
        o2 = T.int64()
        m0 = T.int64()
        m1 = T.int64()
        m2 = T.int64()
        mb = T.int64()
        mh = T.int64()
        mq = T.int64()
        mk = T.int64()
        query = T.match_buffer(a, (batch, heads, length, depth), word, strides=(q0, q1, q2, 1))
        key = T.match_buffer(b, (batch, kv_heads, keys, depth), word, strides=(k0, k1, k2, 1))
        value = T.match_buffer(c, (batch, kv_heads, keys, dv), half, strides=(v0, v1, v2, 1))
        mask = T.match_buffer(
            e, (mb, mh, mq, mk), spec.mask or "uint8", strides=(m0, m1, m2, T.int64(1))
        )
        out = T.match_buffer(f, (batch, heads, length, dv), half, strides=(o0, o1, o2, 1))
        with T.attr(0, "pragma_import_llvm", LLVM_HELPERS):
            keys_t = T.alloc_buffer((batch * kv_heads, ceil_div(keys, KEYS), depth, KEYS), word)
            values_p = T.alloc_buffer(
                (batch * kv_heads, ceil_div(keys, KEYS), packed_keys, 2 * dv)
                if pairs
                else (1, 1, 1, 1),
                half,
            )
            for t in T.parallel(batch * kv_heads * ceil_div(keys, KEYS)):
                slot = t // ceil_div(keys, KEYS)
                pack_keys(
                    key,
                    keys_t,
                    slot // kv_heads,
                    slot % kv_heads,
                    t % ceil_div(keys, KEYS),
                    slot,
                    keys,
                )
                if pairs:
                    pack_values(
                        value,
                        values_p,
                        slot // kv_heads,
                        slot % kv_heads,
                        t % ceil_div(keys, KEYS),
                        slot,
                        keys,
                    )
            # Heads innermost, light row blocks beside heavy ones: equal shares for any split.
            for t in T.parallel(batch * heads * ceil_div(length, BLOCK_ROWS)):
                turn = t // (batch * heads)
                task = T.if_then_else(
                    turn % 2 == 0, turn // 2, ceil_div(length, BLOCK_ROWS) - 1 - turn // 2
                )
                bat = t % (batch * heads) // heads
                head = t % heads
                slot = bat * kv_heads + head // group
                for tile in T.serial(BLOCK_ROWS // rows):
                    row = task * BLOCK_ROWS + tile * rows
                    if row < length:
                        acc = T.alloc_buffer((rows, nv, LANES), "float32", scope="local")
                        s = T.alloc_buffer((rows, nk, LANES), "float32", scope="local")
                        p = T.alloc_buffer(
                            (rows, packed_keys), "int32" if pairs else "float32", scope="local"
                        )
                        top = T.alloc_buffer((rows,), "float32", scope="local")
                        total = T.alloc_buffer((rows, LANES), "float32", scope="local")
                        for m in T.unroll(rows):
                            top[m] = minus_inf
                            total[m, lanes(0)] = splat(T.float32(0))
                            for v in T.unroll(nv):
                                acc[m, v, lanes(0)] = splat(T.float32(0))
                        end = ceil_div(keys, KEYS)
                        inner = keys // KEYS
                        if spec.causal:
                            end = T.min(
                                ceil_div(keys, KEYS),
                                T.max(row + rows - 1 + diagonal + KEYS, T.int64(0)) // KEYS,
                            )
                            inner = T.min(inner, T.max(row + diagonal + 1, T.int64(0)) // KEYS)
                        if spec.mask is not None:
                            inner = T.int64(0)
                        for block in T.serial(inner):
                            block_step(
                                query, value, mask, keys_t, values_p, s, p, top, total, acc,
                                bat, head, slot, block, row, length, keys, scale, diagonal, False,
                            )  # fmt: skip
                        for rest in T.serial(T.max(end - inner, T.int64(0))):
                            block_step(
                                query, value, mask, keys_t, values_p, s, p, top, total, acc,
                                bat, head, slot, inner + rest, row, length, keys, scale, diagonal,
                                True,
                            )  # fmt: skip
                        store(out, acc, total, bat, head, row, length)

    return main
