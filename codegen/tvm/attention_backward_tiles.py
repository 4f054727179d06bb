"""Tiles of attention's backward on the CPU: how they are filled, and the products on them.

along[r,i]  = word i of row r: a number, or the pair (x[r,2i], x[r,2i+1])
down[i,c]   = column c of row i, or the pair (x[2i,c], x[2i+1,c]); 0 beyond the last row
turned[i,r] = word i of row r, 0 for rows beyond the last
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    Spec,
    lanes,
    load,
    multiply_add,
    registers,
    splat,
    transposed,
    words,
)

ROWS = KEYS = 64
"""Queries and keys of a tile: with all that is made of it, it fits the second cache."""


class Tiles(NamedTuple):
    """q, do along and down; k down; kt, vt turned; s, dp fp32 [tall, KEYS]; p down, ds along and
    down; dk, dv fp32 [KEYS, D]; square: what is turned next. Where words are numbers, along and
    down are one."""

    q: Any
    q_down: Any
    do: Any
    do_down: Any
    square: Any
    k: Any
    kt: Any
    vt: Any
    s: Any
    dp: Any
    p: Any
    ds: Any
    ds_down: Any
    dk: Any
    dv: Any
    zeros: Any


class Copies(NamedTuple):
    """Copies for one specification, to be called in a kernel's body."""

    along: Any
    down: Any
    turned: Any
    zero: Any
    clear: Any


def copies(spec: Spec) -> Copies:
    """`count` rows of [b, h] from `first` on; rows beyond the last are left as they are, to be
    zeroed where products read them: numbers that lay there might be so small that each product with
    one takes the processor a hundred cycles."""
    per_word = 2 if spec.pairs else 1

    def word(value: int) -> Any:
        return T.int32(value) if spec.pairs else T.float32(value)

    @T.inline
    def along(tile, source, b, h, first, count, size):
        for r in T.serial(count):
            for c in T.unroll(size // LANES):
                address = T.address_of(source[b, h, first + r, c * LANES * per_word])
                tile[r, lanes(c * LANES)] = load(spec, address)
            if size % LANES != 0:
                c = T.meta_var(size // LANES * LANES)
                address = T.address_of(source[b, h, first + r, c * per_word])
                tile[r, lanes(c)] = load(spec, address, size % LANES)

    @T.inline
    def down_at(tile, zeros, source, b, h, first, i, c, last, count):
        one = T.address_of(source[b, h, first + 2 * i, c])
        if last:
            nothing = T.address_of(zeros[0])
            tile[i, lanes(c)] = words(spec, f"rl_pairs_{count}", one, nothing)
        else:
            other = T.address_of(source[b, h, first + 2 * i + 1, c])
            tile[i, lanes(c)] = words(spec, f"rl_pairs_{count}", one, other)

    @T.inline
    def down_row(tile, zeros, source, b, h, first, i, size, last):
        for c in T.unroll(size // LANES):
            down_at(tile, zeros, source, b, h, first, i, c * LANES, last, LANES)
        if size % LANES != 0:
            down_at(tile, zeros, source, b, h, first, i, size // LANES * LANES, last, size % LANES)

    @T.inline
    def down(tile, zeros, source, b, h, first, count, size):
        """size: columns."""
        for i in T.serial(count // 2):
            down_row(tile, zeros, source, b, h, first, i, size, False)
        if count % 2 == 1:
            down_row(tile, zeros, source, b, h, first, count // 2, size, True)

    @T.inline
    def turned_at(tile, square, source, b, h, first, count, n, at, size):
        for r in T.serial(LANES):
            if n + r < count:
                address = T.address_of(source[b, h, first + n + r, at * per_word])
                square[r, lanes(0)] = load(spec, address, size)
            else:
                square[r, lanes(0)] = splat(word(0))
        if size < LANES:  # what is never read: see `transposed`
            tile[at + LANES - 1, lanes(n)] = splat(word(0))
        T.evaluate(transposed(square, T.address_of(tile[at, n]), KEYS))

    @T.inline
    def turned(tile, square, source, b, h, first, count, size):
        """16 rows at a time."""
        for n in T.serial((count + LANES - 1) // LANES):
            for c in T.serial(size // LANES):
                turned_at(tile, square, source, b, h, first, count, n * LANES, c * LANES, LANES)
            if size % LANES != 0:
                at = T.meta_var(size // LANES * LANES)
                turned_at(tile, square, source, b, h, first, count, n * LANES, at, size % LANES)

    @T.inline
    def zero(tile, first, rows, columns):
        for r in T.serial(rows - first):
            for c in T.serial(columns // LANES):
                tile[first + r, lanes(c * LANES)] = splat(word(0))

    @T.inline
    def clear(tile, rows, columns):
        """The same of fp32 sums."""
        for r in T.serial(rows):
            for c in T.serial(columns // LANES):
                tile[r, lanes(c * LANES)] = splat(T.float32(0))

    return Copies(along, down, turned, zero, clear)


class Products(NamedTuple):
    """The five products; tall: rows of a tile that one call takes."""

    tall: int
    scores: Any
    into_keys: Any
    into_queries: Any


def products(spec: Spec) -> Products:
    """Sums are held in registers, `tall` rows x `wide` vectors; a generic vector is two registers
    or four."""
    tall, wide = (2, 2) if spec.isa == "generic" else (4, 4)

    @T.inline
    def in_parts(block, arguments, vectors):
        """`block` on so many vectors, `wide` at a time, then what is left of them."""
        for c in T.serial(vectors // wide):
            block(arguments, c * wide * LANES, wide)
        if vectors % wide >= 2:
            block(arguments, vectors // wide * wide * LANES, 2)
        if vectors % 2 == 1:
            block(arguments, (vectors - 1) * LANES, 1)

    @T.inline
    def score(arguments, c, nv):
        out, left, right, r, count = T.meta_var(arguments)
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                acc[m, n, lanes(0)] = splat(T.float32(0))
        for i in T.serial(count):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = multiply_add(
                        spec,
                        splat(left[r + m, i]),
                        right[i, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                out[m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def scores(out, left, right, r, vectors, count):
        """out[m, j] = sum over words i of left[r + m, i] right[i, j], for `vectors` of keys."""
        in_parts(score, (out, left, right, r, count), vectors)

    @T.inline
    def key_block(arguments, c, nv):
        out, left, right, r, start, stop = T.meta_var(arguments)
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                acc[m, n, lanes(0)] = out[r + m, lanes(c + n * LANES)]
        for i in T.serial(stop - start):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = multiply_add(
                        spec,
                        splat(left[start + i, r + m]),
                        right[start + i, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                out[r + m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def into_keys(out, left, right, r, start, stop, columns):
        """out[r.., c] += sum over i of left[i, r..] right[i, c], i from start to stop."""
        in_parts(key_block, (out, left, right, r, start, stop), columns // LANES)

    @T.inline
    def query_block(arguments, c, nv):
        x, dq, left, right, slice_, i0, r, count = T.meta_var(arguments)
        acc = registers((tall, nv, LANES))
        for m in T.unroll(tall):
            for n in T.unroll(nv):
                row = T.min(i0 + r + m, x.queries - 1)
                acc[m, n, lanes(0)] = dq[slice_, x.b, x.h, row, lanes(c + n * LANES)]
        for j in T.serial(count):
            for m in T.unroll(tall):
                for n in T.unroll(nv):
                    acc[m, n, lanes(0)] = multiply_add(
                        spec,
                        splat(left[r + m, j]),
                        right[j, lanes(c + n * LANES)],
                        acc[m, n, lanes(0)],
                    )
        for m in T.unroll(tall):
            if i0 + r + m < x.queries:
                for n in T.unroll(nv):
                    dq[slice_, x.b, x.h, i0 + r + m, lanes(c + n * LANES)] = acc[m, n, lanes(0)]

    @T.inline
    def into_queries(x, dq, left, right, slice_, i0, r, count, columns):
        """dq of rows i0 + r.. += sum over words j of left[r.., j] right[j, c]."""
        in_parts(query_block, (x, dq, left, right, slice_, i0, r, count), columns // LANES)

    return Products(tall, scores, into_keys, into_queries)
