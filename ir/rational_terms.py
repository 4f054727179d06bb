"""Reads a quotient in a graph as a rational function with coefficients from two matrices.

A node is read as a polynomial in one tensor x, a sum of terms c x^i |x|^j, whatever spells it:
Horner's rule, chained or explicit powers, powers stacked and multiplied with `matmul` (as the
normal form spells `bmm`). A coefficient c is a number or one column of a coefficient matrix,
perhaps without its sign. Reading decides the form of `ridgeline.ir.group_rational` and never takes
one form for another: where a denominator is none of them, there is a sentence that says what it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ridgeline.ir.provenance import said

aten = torch.ops.aten
_FILLS = {aten.ones_like: 1.0, aten.ones: 1.0, aten.zeros_like: 0.0, aten.zeros: 0.0}


@dataclass(frozen=True, slots=True)
class Column:
    """Column `index` of the matrix `source`, or its magnitude."""

    source: fx.Node
    index: int
    magnitude: bool = False


Coefficient = float | Column
Power = tuple[int, int]
"""(i, j) for x^i |x|^j."""


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A sum of terms, and perhaps the magnitude of another sum."""

    terms: dict[Power, Coefficient]
    inside: "Polynomial | None" = None


@dataclass(frozen=True, slots=True)
class Rational:
    """numerator, denominator: matrices [1 or G, m+1] and [1 or G, n]; x: the tensor between."""

    x: fx.Node
    numerator: fx.Node
    denominator: fx.Node
    form: str


_ARITHMETIC = (aten.mul, aten.add, aten.abs, aten.pow, aten.squeeze, aten.matmul, aten.stack)
_MOST_LEVELS = 64
"""Operations between a tensor and the division: two for each degree by Horner's rule."""


class _Unreadable(Exception):
    """No polynomial in one tensor."""


def read_quotient(node: fx.Node) -> "Reader":
    """`node`, a division, read in the tensor nearest to it in which it is a rational function.

    Where there is none, the reading that came across the most coefficients.
    """
    near = _above(node)
    best: Reader | None = None
    for x in sorted((n for n in near if len(n.users) > 1), reverse=True):
        reader = Reader(node, x, near)
        if isinstance(reader.found, Rational):
            return reader
        if best is None or reader.columns > best.columns:
            best = reader
    return best or Reader(node, node, near)


def _above(node: fx.Node) -> set[fx.Node]:
    """What arithmetic reads on the way up from `node`, as far as a rational function may reach."""
    seen: set[fx.Node] = set()
    level = set(node.all_input_nodes)
    for _ in range(_MOST_LEVELS):
        seen |= level
        arithmetic = (n for n in level if getattr(n.target, "overloadpacket", None) in _ARITHMETIC)
        level = {above for n in arithmetic for above in n.all_input_nodes} - seen
    return seen


@dataclass(slots=True)
class Reader:
    """Reads the quotient `node` in the tensor `x`, looking no further than `near`.

    found: the rational function, or a sentence that says why it is none; nodes: what was read
    through; columns: how many coefficients were met.
    """

    node: fx.Node
    x: fx.Node
    near: set[fx.Node] = field(repr=False)
    found: Rational | str = ""
    nodes: set[fx.Node] = field(default_factory=set)
    columns: int = 0
    known: dict[fx.Node, Polynomial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = self._quotient()

    def _quotient(self) -> Rational | str:
        try:
            top, bottom = (self.read(side) for side in self.node.args)
            self.nodes.add(self.node)
            numerator = self._matrix_of("numerator", _plain(top), 0, False)
            form, terms, magnitude = _form(bottom)
            denominator = self._matrix_of("denominator", terms, 1, magnitude)
        except _Unreadable as reason:
            return str(reason)
        return Rational(self.x, numerator, denominator, form)

    def read(self, node: object) -> Polynomial:
        """A node or number as a polynomial in `self.x`."""
        if not isinstance(node, fx.Node):
            return Polynomial({(0, 0): float(node)})
        if node not in self.near:
            raise _Unreadable(f"{said(node)} stands too far from the division")
        if node not in self.known:
            self.known[node] = self._read(node)
        return self.known[node]

    def _read(self, node: fx.Node) -> Polynomial:
        if node is self.x:
            return Polynomial({(1, 0): 1.0})
        packet = getattr(node.target, "overloadpacket", None)
        column = self._column(node)
        if column is not None:
            return Polynomial({(0, 0): column})
        if packet is aten.mul:
            result = self._product(*(self.read(side) for side in node.args))
        elif packet is aten.add and not node.kwargs:
            result = _sum(self.read(side) for side in node.args)
        elif packet is aten.abs:
            result = _magnitude(self.read(node.args[0]))
        elif node.target is aten.pow.Tensor_Scalar and _is_degree(node.args[1]):
            result = Polynomial({(0, 0): 1.0})
            for _ in range(int(node.args[1])):
                result = self._product(result, self.read(node.args[0]))
        elif packet in _FILLS:
            result = Polynomial({(0, 0): _FILLS[packet]})
        elif packet is aten.squeeze and node.args[0].target is aten.matmul.default:
            result = self._stacked(node)
        else:
            raise _Unreadable(f"{said(node)} is no power of {said(self.x)}")
        self.nodes.add(node)
        return result

    def _column(self, node: fx.Node) -> Column | None:
        """matrix[:, k, None] or matrix[:, k:k+1], of shape [rows, 1]."""
        index = None
        if node.target is aten.unsqueeze.default and node.args[1] in (1, -1):
            inner = node.args[0]
            if inner.target is aten.select.int and inner.args[1] in (1, -1):
                index = inner
        elif node.target is aten.slice.Tensor and node.meta["val"].dim() == 2:
            one = len(node.args) == 4 and node.args[1] == 1 and node.args[3] == node.args[2] + 1
            index = node if one else None
        if index is None or index.args[0].meta["val"].dim() != 2:
            return None
        columns = self._columns(index.args[0])
        found = columns[index.args[2]]
        self.nodes |= {node, index}
        self.columns += 1
        return found if isinstance(found, Column) else None

    def _columns(self, matrix: fx.Node) -> list[Coefficient]:
        """The columns of a matrix [rows, k] of coefficients."""
        packet, args = getattr(matrix.target, "overloadpacket", None), matrix.args
        if packet in _FILLS:
            found = [_FILLS[packet]] * int(matrix.meta["val"].shape[1])
        elif packet is aten.abs:
            found = [_absolute(c) for c in self._columns(args[0])]
        elif packet is aten.cat and len(args) > 1 and args[1] in (1, -1):
            found = [c for part in args[0] for c in self._columns(part)]
        elif packet in (aten.repeat, aten.expand):
            before, after = args[0].meta["val"].shape, matrix.meta["val"].shape
            if after[1:] != before[1:] or before[0] not in (1, after[0]):
                raise _Unreadable(f"{said(matrix)} repeats coefficients, and not one row of them")
            found = self._columns(args[0])
        elif matrix.meta["val"].dim() == 2 and matrix.op in ("get_attr", "placeholder"):
            return [Column(matrix, k) for k in range(int(matrix.meta["val"].shape[1]))]
        else:
            raise _Unreadable(f"{said(matrix)} is no matrix of coefficients")
        self.nodes.add(matrix)
        return found

    def _stacked(self, node: fx.Node) -> Polynomial:
        """squeeze(matmul(matrix[:, None, :], stack(powers, 1)), 1)."""
        row, powers = node.args[0].args
        fits = row.target is aten.unsqueeze.default and row.args[1] in (1, -2)
        if not fits or powers.target is not aten.stack.default or powers.args[1:] != (1,):
            raise _Unreadable(f"{said(node.args[0])} multiplies no stacked powers")
        columns = self._columns(row.args[0])
        self.columns += len(columns)
        self.nodes |= {node.args[0], row, powers}
        if len(columns) != len(powers.args[0]):
            raise _Unreadable(f"{said(powers)} stacks another number of powers than coefficients")
        return _sum(
            self._product(Polynomial({(0, 0): c}), self.read(power))
            for c, power in zip(columns, powers.args[0], strict=True)
        )

    @staticmethod
    def _product(a: Polynomial, b: Polynomial) -> Polynomial:
        if a.inside or b.inside:
            raise _Unreadable("the magnitude of a sum is multiplied")
        terms: dict[Power, Coefficient] = {}
        for (i, j), c in a.terms.items():
            for (k, el), d in b.terms.items():
                terms = _sum((Polynomial(terms), Polynomial({(i + k, j + el): _times(c, d)}))).terms
        return Polynomial(terms)

    @staticmethod
    def _matrix_of(
        what: str, terms: dict[int, Coefficient], first: int, magnitude: bool
    ) -> fx.Node:
        """The matrix whose columns, in order, are the coefficients of powers first, first+1, ..."""
        columns = [c for c in terms.values() if isinstance(c, Column)]
        sources = {c.source for c in columns}
        if len(sources) != 1 or len(columns) != len(terms):
            raise _Unreadable(f"the {what}'s coefficients are not the columns of one matrix")
        (source,) = sources
        expected = {
            first + k: Column(source, k, magnitude) for k in range(source.meta["val"].shape[1])
        }
        if terms != expected:
            raise _Unreadable(f"the {what}'s terms are not all columns of {said(source)} in order")
        return source


def _is_degree(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= 32


def _times(c: Coefficient, d: Coefficient) -> Coefficient:
    if isinstance(c, float) and isinstance(d, float):
        return c * d
    for one, other in ((c, d), (d, c)):
        if isinstance(one, float) and one in (0.0, 1.0):
            return other if one else 0.0
    raise _Unreadable("a coefficient is scaled or multiplied with another")


def _sum(parts: Iterable[Polynomial]) -> Polynomial:
    terms: dict[Power, Coefficient] = {}
    inside = None
    for part in parts:
        if part.inside is not None and inside is not None:
            raise _Unreadable("two magnitudes of sums are added")
        inside = part.inside or inside
        for power, c in part.terms.items():
            before = terms.get(power, 0.0)
            if isinstance(before, float) and isinstance(c, float):
                terms[power] = before + c
            elif before in (0.0, None) or c == 0.0:
                terms[power] = c if before == 0.0 else before
            else:
                raise _Unreadable(f"there are two coefficients of degree {sum(power)}")
    return Polynomial({p: c for p, c in terms.items() if c != 0.0}, inside)


def _absolute(c: Coefficient) -> Coefficient:
    return abs(c) if isinstance(c, float) else Column(c.source, c.index, True)


def _magnitude(p: Polynomial) -> Polynomial:
    if p.inside is not None:
        raise _Unreadable("a magnitude of a magnitude of a sum")
    if len(p.terms) == 1:
        ((i, j), c) = next(iter(p.terms.items()))
        return Polynomial({(0, i + j): _absolute(c)})
    return Polynomial({}, p)


def _plain(p: Polynomial) -> dict[int, Coefficient]:
    """Coefficients by power of x; even powers of |x| are powers of x."""
    if p.inside is not None or any(j % 2 for _, j in p.terms):
        raise _Unreadable("the numerator holds magnitudes")
    return {i + j: c for (i, j), c in p.terms.items()}


def _form(p: Polynomial) -> tuple[str, dict[int, Coefficient], bool]:
    """(form, coefficients by degree, whether they stand without their signs) of a denominator."""
    terms = dict(p.terms)
    if terms.pop((0, 0), None) != 1.0:
        raise _Unreadable("the denominator's constant term is not 1")
    if p.inside is not None:
        if terms or any(j % 2 for _, j in p.inside.terms):
            raise _Unreadable("the denominator holds more than 1 and the magnitude of a sum in x")
        return "abs_sum", {i + j: c for (i, j), c in p.inside.terms.items()}, False
    if not all(isinstance(c, Column) and c.magnitude for c in terms.values()):
        raise _Unreadable("the denominator's coefficients keep their signs: it can reach 0")
    degrees = {i + j: c for (i, j), c in terms.items()}
    if len(degrees) == len(terms) and all(i % 2 == 0 for i, _ in terms):
        return "abs_terms", degrees, True
    if len(degrees) == len(terms) and all(j % 2 == 0 for _, j in terms):
        return "abs_coefficients", degrees, True
    raise _Unreadable("the denominator mixes odd powers of x and of |x|")
