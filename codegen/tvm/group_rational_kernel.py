"""The rational function and its backward on the host CPU, as TVMScript functions.

Law: `ridgeline.ir.group_rational`. x, dy, y and dx are [rows, C] in fp32, bf16 or fp16, last
dimension contiguous; coefficients fp32 [1 or G, k]; arithmetic fp32. The backward forms, with
z = |x| or x and c = |b| or b as the law has them,

    T = sum_i c_i z^i and T' by Horner's rule together, P and P' likewise
    u = dy / Q,  w = -P u / Q,  v = sign w          (sign of x, 1, or sign of T)
    dx = P' u + T' v,  da_i += x^i u,  db_i += z^i w (or v)

where z^i w = x^i v for odd and x^i w for even i, so that both sums share the powers of x.

Work goes by units of adjacent channels: the groups, where whole vectors fill them; else (`mixed`)
vectors of 16 channels, whose lanes have coefficients of their own, read from a table that is made
once in a call.

Sums have two stages and no atomics. Stage one: a chunk of rows keeps one accumulator vector per
unit and coefficient, to which visits add their own sums, so that a lane takes about `CHAIN`
additions, and adds the lanes of a group as a tree. Stage two adds the chunks in order in fp64, and
mixed lanes by group. The chunks depend on the shapes alone, so that the result is the same bit for
bit with any number of threads.

With 16 registers of 8 lanes the sums do not stay in registers beside the terms: there (`Spec.held`)
a visit puts its terms into a buffer first, and then adds them by halves of a vector.

Beyond the caches memory is the limit, and it is idle while a core computes unless rows are fetched
before they are read; and what is written whole need not be read first. Of 8192 x 768 fp32, on one
core of a Xeon with AMX, in that core's own time: the backward 5.9 ms by itself, 5.0 with rows
fetched 6 KB ahead, 3.2 where dx goes past the caches too; its arithmetic alone takes 2.7.
"""

import functools
from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm import group_rational_units as units
from ridgeline.codegen.tvm.attention_vectors import LANES, fma, lanes, registers, splat, vector
from ridgeline.codegen.tvm.group_rational_units import (
    CHAIN,
    Spec,
    columns,
    fetch,
    load,
    matrix,
    padded,
    stored,
    stream,
    streamed,
)

VISIT = 4
"""Vectors, at least, for which the backward holds a unit's sums in registers. As few as will do:
memory is then read along the rows, which the processor fetches ahead."""

HALF = 8
"""Lanes of which ten sums stay in 16 registers."""

KEPT = 8
"""Vectors of a row, at most, whose terms are kept before they are added."""

BLOCK = 1 << 16
"""Elements that a thread of the forward takes at once."""


def build_forward(spec: Spec) -> Any:
    """main(x, a, b, y)."""
    channels, m, n, form = spec.channels, spec.m, spec.n, spec.form
    whole, rest = spec.counts
    loop = T.parallel if spec.parallel else T.serial
    block = max(1, BLOCK // channels)
    helpers, prepare = units.helpers(spec), units.prepare(spec)
    of_a, of_c = units.operands(spec)
    coefficient = functools.partial(units.coefficient, spec)

    @T.inline
    def evaluate(x, y, a, c, unit, row, column, count):
        v = registers((LANES,))
        z = registers((LANES,))
        top = registers((LANES,))
        bottom = registers((LANES,))
        T.evaluate(fetch(spec, x, row, column))
        v[lanes(0)] = load(x, row, column, count)
        z[lanes(0)] = v[lanes(0)]
        if form == "abs_terms":
            z[lanes(0)] = vector("rl_abs", v[lanes(0)])
        top[lanes(0)] = coefficient(a, unit, m)
        for i in T.unroll(m):
            top[lanes(0)] = fma(top[lanes(0)], v[lanes(0)], coefficient(a, unit, m - 1 - i))
        bottom[lanes(0)] = coefficient(c, unit, n - 1)
        for i in T.unroll(n - 1):
            bottom[lanes(0)] = fma(bottom[lanes(0)], z[lanes(0)], coefficient(c, unit, n - 2 - i))
        if form == "abs_sum":
            bottom[lanes(0)] = splat(T.float32(1)) + vector(
                "rl_abs", bottom[lanes(0)] * z[lanes(0)]
            )
        else:
            bottom[lanes(0)] = fma(bottom[lanes(0)], z[lanes(0)], splat(T.float32(1)))
        top[lanes(0)] = top[lanes(0)] / bottom[lanes(0)]
        if spec.streamed:
            T.evaluate(stream(y, row, column, top))
        else:
            y[row, columns(count, column)] = stored(spec, top, count)

    @T.prim_func(s_tir=True)
    def main(x_: T.handle, a_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        rows = T.int64()
        x = matrix(x_, (rows, channels), spec.dtype)
        given_a = T.match_buffer(a_, (spec.numerators, m + 1), "float32")
        given_b = T.match_buffer(b_, (spec.denominators, n), "float32")
        y = matrix(y_, (rows, channels), spec.dtype)
        with T.attr(0, "pragma_import_llvm", helpers):
            a = T.alloc_buffer(of_a, "float32")
            c = T.alloc_buffer(of_c, "float32")
            prepare(a, c, given_a, given_b)
            for item in loop((rows + block - 1) // block):
                for r in T.serial(T.min(block, rows - item * block)):
                    for unit in T.serial(whole):
                        for j in T.serial(spec.vectors):
                            column = (unit * spec.vectors + j) * LANES
                            evaluate(x, y, a, c, unit, item * block + r, column, LANES)
                    if rest > 0:
                        evaluate(x, y, a, c, whole, item * block + r, whole * LANES, rest)
                if spec.streamed:
                    T.evaluate(streamed())

    return main


def build_backward(spec: Spec) -> Any:
    """main(dy, x, a, b, dx, da, db, partial): partial fp32 [chunks, padded(spec)] is workspace."""
    channels, groups, m, n, form = spec.channels, spec.groups, spec.m, spec.n, spec.form
    terms, sign0 = m + 1 + n, spec.sign0
    whole, rest = spec.counts
    loop = T.parallel if spec.parallel else T.serial
    shared_a, shared_b = spec.numerators == 1, spec.denominators == 1
    chunk, vectors = spec.chunk, padded(spec) // LANES
    step = LANES if spec.held else HALF
    tile_rows = max(1, VISIT // spec.vectors)
    most = CHAIN if spec.held else KEPT
    slots = 1 if spec.held else tile_rows * min(spec.vectors, KEPT)
    own = lanes(0, step)
    helpers, prepare = units.helpers(spec), units.prepare(spec)
    of_a, of_c = units.operands(spec)
    coefficient = functools.partial(units.coefficient, spec)

    @T.inline
    def signed(into, value, of):
        """into = sign(of) value, sign(0) = sign0."""
        nothing = splat(T.float32(0))
        into[lanes(0)] = T.Select(
            of[lanes(0)] < nothing, nothing - value[lanes(0)], value[lanes(0)]
        )
        if sign0 == 0:
            into[lanes(0)] = T.Select(of[lanes(0)] == nothing, nothing, into[lanes(0)])

    @T.inline
    def derive(dy, x, dx, a, c, kept, at, unit, row, column, count):
        """Stores dx of a vector and keeps (x, u, w, v) of it in place `at`."""
        value = registers((LANES,))
        z = registers((LANES,))
        p = registers((LANES,))
        dp = registers((LANES,))
        t = registers((LANES,))
        dt = registers((LANES,))
        q = registers((LANES,))
        u = registers((LANES,))
        w = registers((LANES,))
        v = registers((LANES,))
        T.evaluate(fetch(spec, x, row, column))
        T.evaluate(fetch(spec, dy, row, column))
        value[lanes(0)] = load(x, row, column, count)
        z[lanes(0)] = value[lanes(0)]
        if form == "abs_terms":
            z[lanes(0)] = vector("rl_abs", value[lanes(0)])
        p[lanes(0)] = coefficient(a, unit, m)
        dp[lanes(0)] = splat(T.float32(0))
        for i in T.unroll(m):
            if i == 0:
                dp[lanes(0)] = p[lanes(0)]
            else:
                dp[lanes(0)] = fma(dp[lanes(0)], value[lanes(0)], p[lanes(0)])
            p[lanes(0)] = fma(p[lanes(0)], value[lanes(0)], coefficient(a, unit, m - 1 - i))
        t[lanes(0)] = coefficient(c, unit, n - 1)
        dt[lanes(0)] = t[lanes(0)]
        for i in T.unroll(n - 1):
            t[lanes(0)] = fma(t[lanes(0)], z[lanes(0)], coefficient(c, unit, n - 2 - i))
            dt[lanes(0)] = fma(dt[lanes(0)], z[lanes(0)], t[lanes(0)])
        if form == "abs_sum":
            t[lanes(0)] = t[lanes(0)] * z[lanes(0)]
            q[lanes(0)] = splat(T.float32(1)) + vector("rl_abs", t[lanes(0)])
        else:
            q[lanes(0)] = fma(t[lanes(0)], z[lanes(0)], splat(T.float32(1)))
        q[lanes(0)] = splat(T.float32(1)) / q[lanes(0)]
        u[lanes(0)] = load(dy, row, column, count) * q[lanes(0)]
        w[lanes(0)] = (splat(T.float32(0)) - p[lanes(0)] * q[lanes(0)]) * u[lanes(0)]
        if form == "abs_terms":
            signed(v, w, value)
        elif form == "abs_sum":
            signed(w, w, t)
            v[lanes(0)] = w[lanes(0)]
        else:
            v[lanes(0)] = w[lanes(0)]
        kept[at, 0, lanes(0)] = value[lanes(0)]
        kept[at, 1, lanes(0)] = u[lanes(0)]
        kept[at, 2, lanes(0)] = w[lanes(0)]
        kept[at, 3, lanes(0)] = v[lanes(0)]
        u[lanes(0)] = fma(dp[lanes(0)], u[lanes(0)], dt[lanes(0)] * v[lanes(0)])
        if spec.streamed:
            T.evaluate(stream(dx, row, column, u))
        else:
            dx[row, columns(count, column)] = stored(spec, u, count)

    @T.inline
    def add(sums, kept, at, first):
        """Adds the terms of `step` lanes, from `first` on, of the vector in place `at`."""
        power = registers((step,))
        power[own] = kept[at, 0, lanes(first, step)]
        sums[0, own] = sums[0, own] + kept[at, 1, lanes(first, step)]
        for i in T.unroll(1, max(m, n) + 1):
            if i > 1:
                power[own] = power[own] * kept[at, 0, lanes(first, step)]
            if i <= m:
                sums[i, own] = fma(power[own], kept[at, 1, lanes(first, step)], sums[i, own], step)
            if i <= n:
                sums[m + i, own] = fma(
                    power[own], kept[at, 2 + i % 2, lanes(first, step)], sums[m + i, own], step
                )

    @T.inline
    def flush(acc, unit, sums, first):
        """Adds the sums of `step` lanes, from `first` on, to those of the chunk."""
        for i in T.unroll(terms):
            acc[unit, i, lanes(first, step)] = acc[unit, i, lanes(first, step)] + sums[i, own]
            sums[i, own] = T.broadcast(T.float32(0), step)

    @T.inline
    def visit(dy, x, dx, a, c, acc, unit, first, rows, across, count):
        """Adds the `across` vectors, of `count` elements, of a unit in each of `rows` rows."""
        kept = registers((slots, 4, LANES))  # in memory, where there are several
        sums = registers((terms, step))
        for i in T.unroll(terms):
            sums[i, own] = T.broadcast(T.float32(0), step)
        for block in T.serial((across + most - 1) // most):
            these = T.min(most, across - block * most)
            for r in T.serial(rows):
                for j in T.serial(these):
                    column = (unit * across + block * most + j) * LANES
                    at = 0 if spec.held else r * these + j
                    derive(dy, x, dx, a, c, kept, at, unit, first + r, column, count)
                    if spec.held:
                        add(sums, kept, 0, 0)
            if spec.held:
                flush(acc, unit, sums, 0)
            else:
                for part in T.unroll(LANES // step):
                    for at in T.serial(rows * these):
                        add(sums, kept, at, part * step)
                    flush(acc, unit, sums, part * step)

    @T.inline
    def by_group(of_groups, sums):
        """Adds the mixed lanes of each group."""
        for g in T.serial(groups):
            for i in T.serial(terms):
                of_groups[g * terms + i] = T.float64(0)
                for c in T.serial(g * spec.width, (g + 1) * spec.width):
                    of_groups[g * terms + i] = (
                        of_groups[g * terms + i]
                        + sums[(c // LANES * terms + i) * LANES + c % LANES]
                    )

    @T.inline
    def finish(sums, given_b, da, db):
        """Sums over shared groups, and the sign of b."""
        for g in T.serial(spec.numerators):
            for i in T.serial(m + 1):
                if shared_a:
                    for other in T.serial(1, groups):
                        sums[i] = sums[i] + sums[other * terms + i]
                da[g, i] = T.Cast("float32", sums[g * terms + i])
        for g in T.serial(spec.denominators):
            for i in T.serial(n):
                if shared_b:
                    for other in T.serial(1, groups):
                        sums[m + 1 + i] = sums[m + 1 + i] + sums[other * terms + m + 1 + i]
                db[g, i] = T.Cast("float32", sums[g * terms + m + 1 + i])
                if form != "abs_sum":
                    if given_b[g, i] < T.float32(0):
                        db[g, i] = T.float32(0) - db[g, i]
                    if given_b[g, i] == T.float32(0):
                        db[g, i] = db[g, i] * T.float32(sign0)

    @T.prim_func(s_tir=True)
    def main(
        dy_: T.handle,
        x_: T.handle,
        a_: T.handle,
        b_: T.handle,
        dx_: T.handle,
        da_: T.handle,
        db_: T.handle,
        partial_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        rows, chunks = T.int64(), T.int64()
        dy = matrix(dy_, (rows, channels), spec.dtype)
        x = matrix(x_, (rows, channels), spec.dtype)
        given_a = T.match_buffer(a_, (spec.numerators, m + 1), "float32")
        given_b = T.match_buffer(b_, (spec.denominators, n), "float32")
        dx = matrix(dx_, (rows, channels), spec.dtype)
        da = T.match_buffer(da_, (spec.numerators, m + 1), "float32")
        db = T.match_buffer(db_, (spec.denominators, n), "float32")
        partial = T.match_buffer(partial_, (chunks, vectors * LANES), "float32")
        with T.attr(0, "pragma_import_llvm", helpers):
            a = T.alloc_buffer(of_a, "float32")
            c = T.alloc_buffer(of_c, "float32")
            prepare(a, c, given_a, given_b)
            for item in loop(chunks):
                acc = T.alloc_buffer((spec.units, terms, LANES), "float32")
                for unit in T.serial(spec.units):
                    for i in T.serial(terms):
                        acc[unit, i, lanes(0)] = splat(T.float32(0))
                first = item * chunk
                last = T.min(first + chunk, rows)
                for tile in T.serial((last - first + tile_rows - 1) // tile_rows):
                    count = T.min(tile_rows, last - first - tile * tile_rows)
                    row = first + tile * tile_rows
                    for unit in T.serial(whole):
                        visit(dy, x, dx, a, c, acc, unit, row, count, spec.vectors, LANES)
                    if rest > 0:
                        visit(dy, x, dx, a, c, acc, whole, row, count, 1, rest)
                if spec.streamed:
                    T.evaluate(streamed())
                for unit in T.serial(spec.units):
                    for i in T.serial(terms):
                        if spec.mixed:
                            partial[item, lanes((unit * terms + i) * LANES)] = acc[
                                unit, i, lanes(0)
                            ]
                        else:
                            partial[item, unit * terms + i] = T.call_extern(
                                "float32", "rl_hsum", acc[unit, i, lanes(0)]
                            )
            sums = T.alloc_buffer((vectors * LANES,), "float64")
            for j in T.serial(vectors):
                total = registers((LANES,), "float64")
                total[lanes(0)] = T.broadcast(T.float64(0), LANES)
                for item in T.serial(chunks):
                    total[lanes(0)] = total[lanes(0)] + T.Cast(
                        f"float64x{LANES}", partial[item, lanes(j * LANES)]
                    )
                sums[lanes(j * LANES)] = total[lanes(0)]
            if spec.mixed:
                of_groups = T.alloc_buffer((groups * terms,), "float64")
                by_group(of_groups, sums)
                finish(of_groups, given_b, da, db)
            else:
                finish(sums, given_b, da, db)

    return main
