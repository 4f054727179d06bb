"""Copies between the tensors of attention and the tiles that its kernel multiplies.

    qt[s,d,p,l] = word d of query row 64 s + 16 p + l of the block        (turned: lanes are rows)
    kt[j,d]     = word d of key j of the tile
    vt[j,d]     = v[j,d], or the word (v[2j,d], v[2j+1,d])
                  both zeros beyond the last key: what lay there might be numbers so small that each
                  product with one takes the processor a hundred cycles
    bias[j,p,l] = what the mask adds to the score of that row with key j, -inf where it excludes

Row r of a key head is query r // G of its query head r % G. Rows beyond the last repeat it, and
are not stored.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    Spec,
    lanes,
    load,
    logarithm,
    mask_number,
    mask_vector,
    peak,
    registers,
    splat,
    transposed,
    vector,
    words,
)

VECTORS = 4
"""Vectors of a sub-block of rows."""


class Head(NamedTuple):
    """The tensors, and the key head that is being worked on."""

    q: Any
    k: Any
    v: Any
    mask: Any
    sinks: Any
    out: Any
    b: Any
    h: Any
    group: Any
    rows: Any
    length: Any
    factor: Any
    cap: Any
    stats: Any = None

    def query_row(self, tensor: Any, row: Any, column: Any) -> Any:
        """Element `column` of a row of q, mask or out."""
        b, h, i = self.place(row)
        return tensor[b, h, i, column]

    def query(self, row: Any) -> Any:
        """The query of a row; a division takes longer than a branch."""
        return T.if_then_else(self.group == 1, row, row // self.group)

    def place(self, row: Any) -> tuple[Any, Any, Any]:
        """Batch, query head and query of a row."""
        i = self.query(row)
        return self.b, self.h * self.group + row - i * self.group, i

    def sink(self, row: Any) -> Any:
        """The sink of a row's query head."""
        return self.sinks[self.place(row)[1]]


class Tiles(NamedTuple):
    """What one block of rows works in; the module docstrings say what each holds."""

    qt: Any
    kt: Any
    vt: Any
    bias: Any
    limit: Any
    s: Any
    p: Any
    top: Any
    total: Any
    o: Any
    square: Any
    turned: Any
    word_square: Any
    zeros: Any


class Copies(NamedTuple):
    """The copies for one specification, to be called in a kernel's body."""

    keys: Any
    queries: Any
    mask: Any
    store: Any


def copies(spec: Spec) -> Copies:
    """Builds the four copies."""
    depth, dim, pairs, dtype = spec.depth, spec.value_dim, spec.pairs, spec.dtype
    per_word = 2 if pairs else 1

    @T.inline
    def key(x, w, first, j, word, count):
        if first + j < x.length:
            address = T.address_of(x.k[x.b, x.h, first + j, word * per_word])
            w.kt[j, lanes(word)] = load(spec, address, count)
        else:
            w.kt[j, lanes(word)] = splat(T.Cast(spec.word, 0))

    @T.inline
    def value_pair(x, w, first, j, column, count):
        one = T.address_of(x.v[x.b, x.h, first + 2 * j, column])
        if first + 2 * j + 1 < x.length:
            other = T.address_of(x.v[x.b, x.h, first + 2 * j + 1, column])
            w.vt[j, lanes(column)] = words(spec, f"rl_pairs_{count}", one, other)
        elif first + 2 * j < x.length:
            nothing = T.address_of(w.zeros[0])
            w.vt[j, lanes(column)] = words(spec, f"rl_pairs_{count}", one, nothing)
        else:
            w.vt[j, lanes(column)] = splat(T.int32(0))

    @T.inline
    def value(x, w, first, j, column, count):
        if pairs:
            value_pair(x, w, first, j, column, count)
        elif first + j < x.length:
            address = T.address_of(x.v[x.b, x.h, first + j, column])
            w.vt[j, lanes(column)] = vector(f"rl_load_{dtype}_{count}", address)
        else:
            w.vt[j, lanes(column)] = splat(T.float32(0))

    @T.inline
    def keys(x, w, first, count):
        """`count` keys from `first` on, and their values."""
        for j in T.serial(count):
            for c in T.unroll(depth // LANES):
                key(x, w, first, j, c * LANES, LANES)
            if depth % LANES != 0:
                key(x, w, first, j, depth // LANES * LANES, depth % LANES)
        for j in T.serial((count + 1) // 2 if pairs else count):
            for c in T.unroll(dim // LANES):
                value(x, w, first, j, c * LANES, LANES)
            if dim % LANES != 0:
                value(x, w, first, j, dim // LANES * LANES, dim % LANES)

    @T.inline
    def query(x, w, row, sub, part, word, count):
        for lane in T.serial(LANES):
            at = T.min(row + lane, x.rows - 1)
            address = T.address_of(x.query_row(x.q, at, word * per_word))
            w.word_square[lane, lanes(0)] = load(spec, address, count)
        if count < LANES:  # what is never read: see `transposed`
            w.qt[sub, word + LANES - 1, part, lanes(0)] = splat(T.Cast(spec.word, 0))
        into = T.address_of(w.qt[sub, word, part, 0])
        T.evaluate(transposed(w.word_square, into, VECTORS * LANES))

    @T.inline
    def queries(x, w, row, sub, part):
        """16 query rows from `row` on."""
        for c in T.serial(depth // LANES):
            query(x, w, row, sub, part, c * LANES, LANES)
        if depth % LANES != 0:
            query(x, w, row, sub, part, depth // LANES * LANES, depth % LANES)

    @T.inline
    def mask(x, w, row, part, first, count):
        """The mask of 16 rows from `row` on and `count` keys from `first` on."""
        for c in T.serial((count + LANES - 1) // LANES):
            start = first + c * LANES
            for lane in T.serial(LANES):
                at = T.min(row + lane, x.rows - 1)
                if (x.mask.strides[3] == 1) & (start + LANES <= x.length):
                    address = T.address_of(x.query_row(x.mask, at, start))
                    w.square[lane, lanes(0)] = mask_vector(spec, address)
                else:
                    for j in T.serial(T.min(LANES, x.length - start)):
                        entry = T.meta_var(x.query_row(x.mask, at, start + j))
                        w.square[lane, j] = mask_number(spec, entry)
            into = T.address_of(w.bias[c * LANES, part, 0])
            T.evaluate(transposed(w.square, into, VECTORS * LANES))

    @T.inline
    def columns(x, w, inverse, row, sub, part, column, count):
        for d in T.serial(LANES):
            w.square[d, lanes(0)] = w.o[sub, column + d, part, lanes(0)] * inverse[lanes(0)]
        T.evaluate(transposed(w.square, T.address_of(w.turned[0, 0]), LANES))
        for lane in T.serial(T.min(LANES, x.rows - row)):
            b, h, i = T.meta_var(x.place(row + lane))
            done = w.turned[lane, lanes(0, count)]
            if dtype == "float32":
                x.out[b, h, i, lanes(column, count)] = done
            else:
                x.out[b, h, i, lanes(column, count)] = T.Cast(f"{dtype}x{count}", done)

    @T.inline
    def store(x, w, row, sub, part):
        """16 finished rows: divided by their totals, turned back, rounded; and their statistics."""
        inverse = registers((LANES,))
        total = w.total[sub, part, lanes(0)]
        inverse[lanes(0)] = T.Select(
            total > splat(T.float32(0)), splat(T.float32(1)) / total, splat(T.float32(0))
        )
        if spec.saved:
            for lane in T.serial(T.min(LANES, x.rows - row)):
                b, h, i = T.meta_var(x.place(row + lane))
                summed = w.total[sub, part, lane]
                x.stats[0, b, h, i] = peak(w.top[sub, part, lane], summed)
                x.stats[1, b, h, i] = logarithm(spec, summed)
        for c in T.serial(dim // LANES):
            columns(x, w, inverse, row, sub, part, c * LANES, LANES)
        if dim % LANES != 0:
            columns(x, w, inverse, row, sub, part, dim // LANES * LANES, dim % LANES)

    return Copies(keys, queries, mask, store)
