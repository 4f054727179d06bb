"""Attention over binary codes as masked additions, in TVM for CUDA.

Law: `ridgeline::binary_attention`, heads and batch flattened to L lanes, lane l of head l % H. With
a column of ones after the values (v[t,E] = 1), which makes the denominator one more sum,

    A[i,e] = sum of v[t,e] over the keys t whose channel i is above its threshold
    V[e] = sum_t v[t,e]
    S[m,e] = V[e] + 2 sum_i (A[i,e] where channel i of query m is above, V[e] - A[i,e] elsewhere)
    out[m,e] = S[m,e] / S[m,E]

so that two comparisons choose what is added and the only product is by 2. All fp32: key [L,N,D],
value [L,N,E], query [L,M,D], thresholds [H,D], A [L,D,E+1], V [L,E+1], out [L,M,E]; L, N and M are
known at run time only. Source: ShiftAddViT, whose `matmask` kernel this is. The module imports tvm.
"""

from typing import Any

import tvm
from tvm import s_tir, te, tirx

CHANNELS = 8
"""Channels of the keys whose sums one thread holds: a value is read once for them."""


def definitions(heads: int, d: int, e: int) -> dict[str, Any]:
    """The law as `binary_attention_keys(key, value, threshold, A, V)` and
    `binary_attention_queries(query, threshold, A, V, out)`, not yet scheduled."""
    lanes, keys, queries = te.var("lanes"), te.var("keys"), te.var("queries")
    nothing = tirx.const(0.0, "float32")
    key = te.placeholder((lanes, keys, d), name="key")
    query = te.placeholder((lanes, queries, d), name="query")
    value = te.placeholder((lanes, keys, e), name="value")
    threshold = te.placeholder((heads, d), name="threshold")
    held = te.placeholder((lanes, d, e + 1), name="A")
    totals = te.placeholder((lanes, e + 1), name="V")

    def with_one(lane: Any, t: Any, column: Any) -> Any:
        own = value[lane, t, te.min(column, e - 1)]
        return tirx.Select(column < e, own, tirx.const(1.0, "float32"))

    def above(x: Any, lane: Any, row: Any, i: Any) -> Any:
        return x[lane, row, i] > threshold[lane % heads, i]

    t, u = te.reduce_axis((0, keys), name="t"), te.reduce_axis((0, keys), name="u")
    masked = te.compute(
        (lanes, d, e + 1),
        lambda a, i, c: te.sum(
            tirx.Select(above(key, a, t, i), with_one(a, t, c), nothing), axis=t
        ),
        name="masked",
    )
    plain = te.compute((lanes, e + 1), lambda a, c: te.sum(with_one(a, u, c), axis=u), name="plain")

    def chosen(lane: Any, m: Any, i: Any, column: Any) -> Any:
        rest = totals[lane, column] - held[lane, i, column]
        return tirx.Select(above(query, lane, m, i), held[lane, i, column], rest)

    i, j = te.reduce_axis((0, d), name="i"), te.reduce_axis((0, d), name="j")
    top = te.compute(
        (lanes, queries, e), lambda a, m, c: te.sum(chosen(a, m, i, c), axis=i), name="top"
    )
    bottom = te.compute(
        (lanes, queries), lambda a, m: te.sum(chosen(a, m, j, e), axis=j), name="bottom"
    )
    two = tirx.const(2.0, "float32")
    out = te.compute(
        (lanes, queries, e),
        lambda a, m, c: (totals[a, c] + two * top[a, m, c]) / (totals[a, e] + two * bottom[a, m]),
        name="out",
    )
    functions = {
        "binary_attention_keys": [key, value, threshold, masked, plain],
        "binary_attention_queries": [query, threshold, held, totals, out],
    }
    return {
        name: te.create_prim_func(operands).with_attr("global_symbol", name)
        for name, operands in functions.items()
    }


def scheduled(functions: dict[str, Any]) -> Any:
    """`definitions` for a GPU: an IRModule."""
    s = s_tir.Schedule(tvm.IRModule(functions))
    s.work_on("binary_attention_keys")
    masked, plain = s.get_sblock("masked"), s.get_sblock("plain")
    written = s.cache_write(masked, 0, "local")
    lane, i, column = s.get_loops(written)
    block, channel = s.split(i, [None, CHANNELS])
    s.reorder(lane, block, column, channel)
    _bind(s, {lane: "blockIdx.y", block: "blockIdx.x", column: "threadIdx.x"})
    s.compute_at(masked, column)
    channel, t = s.get_loops(masked)[-2:]
    s.reorder(t, channel)
    written = s.cache_write(plain, 0, "local")
    lane, column = s.get_loops(written)
    _bind(s, {lane: "blockIdx.x", column: "threadIdx.x"})
    s.compute_at(plain, column)
    s.work_on("binary_attention_queries")
    out = s.get_sblock("out")
    lane, m, column = s.get_loops(out)
    _bind(s, {lane: "blockIdx.y", m: "blockIdx.x", column: "threadIdx.x"})
    for name in ("top", "bottom"):
        sums = s.get_sblock(name)
        s.compute_at(sums, column)
        s.set_scope(sums, 0, "local")
    return s.mod


def _bind(s: Any, axes: dict[Any, str]) -> None:
    for loop, axis in axes.items():
        s.bind(loop, axis)
