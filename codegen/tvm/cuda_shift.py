"""The shift layer as integer shifts and additions, in TVM for CUDA.

Law, for `ridgeline::quantized_linear` with codec "shift" on activations held as integers:

    y[m,n] = step[m] sum_g scale[r,g] sum_{k in g, t} ±(X[m,k] >> e_t[n,k])    x = step[m] X[m,k]

with r = n // group_rows. X int32 [M, G * group_size], zero after the last column, of at most
2**31 / (terms * group_size): the inner sum is int32, exact but for the floor of each shift; the
outer one, with one product per group, is fp32. Codes are the op's canonical bytes [N,
ceil(K*bits/8)], scale fp32 [R,G], step fp32 [M] and y fp32 [M,N]. M is known at run time only and
a multiple of ROWS: its axis is given as two, [M / ROWS, ROWS].

A block takes THREADS outputs of ROWS rows, each thread one output: a code is decoded once for all
rows, and the group's X is shared. Source: ShiftAddViT, whose `matshift` kernel this is, with
scales. The module imports tvm.
"""

from typing import Any

from tvm import s_tir, te, tirx

THREADS, ROWS = 128, 8


def _term(x: Any, code: Any, bits: int, terms: int) -> Any:
    """sum_t ±(x >> e_t) of one code (int32 expressions)."""
    width = bits // terms
    zero = 2 ** (width - 1) - 1
    total = None
    for t in range(terms):
        shift = (code >> (t * width)) & zero
        shifted = x >> te.min(shift, 31)
        negative = (code >> (t * width + width - 1)) & 1
        value = tirx.Select(negative == 1, 0 - shifted, shifted)
        value = tirx.Select(shift == zero, tirx.const(0, "int32"), value)
        total = value if total is None else total + value
    return total


def definition(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    terms: int,
    group_size: int,
    group_rows: int = 1,
) -> Any:
    """The law as a function `shift_linear(X, packed, scale, step, y)`, not yet scheduled."""
    group_size = min(group_size, in_features)
    n, blocks = out_features, te.var("row_blocks")
    groups, width = -(-in_features // group_size), -(-in_features * bits // 8)
    x = te.placeholder((blocks, ROWS, groups * group_size), "int32", name="X")
    packed = te.placeholder((n, width), "uint8", name="packed")
    scale = te.placeholder((-(-n // group_rows), groups), "float32", name="scale")
    step = te.placeholder((blocks, ROWS), "float32", name="step")

    def read(row: Any, column: Any) -> Any:
        first = column * bits // 8
        word = packed[row, te.min(first, width - 1)].astype("int32")
        if 8 % bits:  # a code may reach into the next byte
            word = word | (packed[row, te.min(first + 1, width - 1)].astype("int32") << 8)
        return (word >> (column * bits % 8)) & (2**bits - 1)

    code = te.compute((n, groups * group_size), read, name="code")
    i, g = te.reduce_axis((0, group_size), name="i"), te.reduce_axis((0, groups), name="g")
    inner = te.compute(
        (blocks, ROWS, n, groups),
        lambda p, a, b, c: te.sum(
            _term(x[p, a, c * group_size + i], code[b, c * group_size + i], bits, terms), axis=i
        ),
        name="inner",
    )
    total = te.compute(
        (blocks, ROWS, n),
        lambda p, a, b: te.sum(
            scale[b // group_rows, g] * inner[p, a, b, g].astype("float32"), axis=g
        ),
        name="total",
    )
    y = te.compute((blocks, ROWS, n), lambda p, a, b: step[p, a] * total[p, a, b], name="y")
    function = te.create_prim_func([x, packed, scale, step, y])
    return function.with_attr("global_symbol", "shift_linear")


def scheduled(function: Any) -> Any:
    """`definition` for a GPU: an IRModule."""
    s = s_tir.Schedule(function)
    y, total, inner, code = (s.get_sblock(name) for name in ("y", "total", "inner", "code"))
    block_a, row, b = s.get_loops(y)
    block_b, thread = s.split(b, [None, THREADS])
    s.reorder(block_a, block_b, thread, row)
    s.bind(block_a, "blockIdx.y")
    s.bind(block_b, "blockIdx.x")
    s.bind(thread, "threadIdx.x")
    # Loops of one step are kept, so that a single group is no special case.
    s.compute_at(total, thread, preserve_unit_loops=True)
    row, _, g = s.get_loops(total)[-3:]
    s.reorder(g, row)
    s.compute_at(inner, g, preserve_unit_loops=True)
    row, _, _, i = s.get_loops(inner)[-4:]
    s.reorder(i, row)
    s.compute_at(code, i)
    for block in (total, inner, code):
        s.set_scope(block, 0, "local")
    shared = s.cache_read(inner, 1, "shared")  # X; operand 0 is the code
    s.compute_at(shared, g)
    _, lane = s.split(s.fuse(*s.get_loops(shared)[-2:]), [None, THREADS])
    s.bind(lane, "threadIdx.x")
    return s.mod
