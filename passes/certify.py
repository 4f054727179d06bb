"""Evidence: the site against its replacement, both in float64, on adversarial inputs.

Sizes that the program leaves free are given small odd values where the program takes them, and the
captured ones where not, so that alignment to a power of two hides nothing and a long context costs
nothing. Entries where the site itself gives NaN (a softmax over nothing) promise nothing.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.adversarial import NoAdversary, adversarial
from ridgeline.passes.apply import copy_graph, replace
from ridgeline.passes.base import Candidate
from ridgeline.passes.plan import Certificate
from ridgeline.passes.region import frontier_of, nodes_in, region_of, structure_of
from ridgeline.passes.reproducer import write_reproducer

log = logging.getLogger(__name__)

EQUIVALENCE_LIMIT = 1e-9
"""Relative error allowed between two float64 evaluations of the same real function."""
_ODD = (3, 7, 5, 11, 13, 9)
_DOUBLINGS = 8
SizeOf = Callable[[Any], int]


class CertificateError(RidgelineError):
    """A site for which no evidence can be had."""


class Mismatch(CertificateError):
    """A replacement that does not compute what it replaces: a defect of ridgeline."""


def relative_error(got: Iterable[Any], expected: Iterable[Any]) -> float:
    """The largest ‖got - expected‖ / ‖expected‖ of the floating tensors.

    inf where one of the two alone is finite, or a tensor is missing or of another shape.
    """
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return math.inf
        a, b = a.detach().double(), b.detach().double()
        both = torch.isfinite(b)
        if (torch.isfinite(a) != both).any():
            return math.inf
        difference, whole = (a[both] - b[both]).norm().item(), b[both].norm().item()
        if difference:
            worst = max(worst, difference / whole if whole else math.inf)
    return worst


def equivalence(candidate: Candidate, cache: dict[Any, Certificate]) -> Certificate:
    """Site against replacement in float64; equal sites of other layers share the evidence.

    Raises Mismatch, with the path of a runnable reproducer, where they differ, and CertificateError
    where the site cannot be run by itself.
    """
    frontier = frontier_of(candidate)
    key = (_signature(candidate, frontier), structure_of(region_of(candidate, frontier)))
    if key not in cache:
        cache[key] = _compare(candidate, frontier)
    return dataclasses.replace(cache[key], preconditions=candidate.preconditions)


def _signature(candidate: Candidate, frontier: Sequence[fx.Node]) -> Any:
    call = candidate.call
    plain = tuple(v for f in dataclasses.fields(call) if not nodes_in(v := getattr(call, f.name)))
    tensors = tuple((tuple(shape_of(n)), n.meta["val"].dtype) for n in frontier)
    return candidate.rewrite.name, candidate.site.pattern, plain, tensors


def _compare(candidate: Candidate, frontier: Sequence[fx.Node]) -> Certificate:
    worst, names = 0.0, []
    dtypes = [n.meta["val"].dtype for n in frontier]
    for said, size_of in _assignments(candidate, frontier):
        region, copied = _region(candidate, frontier, size_of)
        replaced, again = copy_graph(region)
        both = {old: again[n] if isinstance(n, fx.Node) else n for old, n in copied.items()}
        replace(candidate, both, replaced)
        replaced.graph.eliminate_dead_code()
        site, replacement = in_float64(region), in_float64(replaced)
        shapes = [tuple(map(size_of, n.meta["val"].shape)) for n in frontier]
        for name, inputs in _drawn(candidate, shapes, dtypes):
            try:
                expected = site(*inputs)
            except (RuntimeError, ValueError):  # not sizes or strides that the program takes
                continue
            error = _difference(replacement, inputs, expected)
            if error > EQUIVALENCE_LIMIT:
                title = (
                    f"{candidate.rewrite.name} at {candidate.at}: the replacement differs from what"
                    f" it replaces by {error:.1e} in float64 on {name} ({said})"
                )
                path = write_reproducer(title, site, replacement, shapes, dtypes, name)
                raise Mismatch(f"{title}, allowed {EQUIVALENCE_LIMIT:.0e}; reproducer: {path}")
            worst = max(worst, error)
            names.append(f"{name}, {said}")
        if names:
            return Certificate("equivalence", worst, EQUIVALENCE_LIMIT, tuple(names))
    raise CertificateError(f"{candidate.at}: the site by itself runs on none of the inputs tried")


def _difference(
    replacement: fx.GraphModule, inputs: list[Tensor], expected: Sequence[Tensor]
) -> float:
    """Relative error of what the replacement makes of the inputs; inf where it cannot run."""
    try:
        got = replacement(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        log.exception("a replacement raises where the site does not")
        return math.inf
    if any(g.shape != e.shape for g, e in zip(got, expected, strict=True)):
        return math.inf
    return relative_error(*_promised(got, expected))


def _drawn(candidate: Candidate, shapes: Sequence[Any], dtypes: Sequence[torch.dtype]) -> Any:
    try:
        yield from adversarial(shapes, dtypes)
    except NoAdversary as error:
        raise CertificateError(f"{candidate.at}: {error}") from error


def _promised(
    got: Sequence[Tensor], expected: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    silent = [e.isnan() for e in expected]
    return (
        [g.masked_fill(nothing, 0.0) for g, nothing in zip(got, silent, strict=True)],
        [e.masked_fill(nothing, 0.0) for e, nothing in zip(expected, silent, strict=True)],
    )


def _assignments(candidate: Candidate, frontier: Sequence[fx.Node]) -> Iterable[tuple[str, SizeOf]]:
    """Values for the free sizes of the region: small and odd first, then as captured."""
    symbols: set[sympy.Symbol] = set()
    extents: set[sympy.Expr] = set()
    for node in (*frontier, *region_of(candidate, frontier)):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        free = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
        symbols = symbols.union(*(size.free_symbols for size in free))
        if isinstance(value, Tensor):
            extents.update(free)
    if symbols and (odd := _odd_values(sorted(symbols, key=str), extents)) is not None:
        yield (
            ", ".join(f"{s}={v}" for s, v in odd.items()),
            lambda size: size if isinstance(size, int) else int(size.node.expr.subs(odd)),
        )
    yield "captured sizes", lambda size: size if isinstance(size, int) else int(size.node.hint)


def _odd_values(
    symbols: Sequence[sympy.Symbol], extents: Iterable[sympy.Expr]
) -> dict[sympy.Symbol, int] | None:
    """Small odd values with which no tensor is empty, as the rest of a sequence beyond a tile would
    be; None where none are found. 2 v + 1 keeps values odd, and apart."""
    odd = {s: _ODD[i % len(_ODD)] for i, s in enumerate(symbols)}
    for _ in range(_DOUBLINGS):
        if all(extent.subs(odd) > 0 for extent in extents):
            return odd
        odd = {s: 2 * v + 1 for s, v in odd.items()}
    return None


def _region(
    candidate: Candidate, frontier: Sequence[fx.Node], size_of: SizeOf
) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The graph between the frontier and the site's outputs, free sizes as `size_of` says."""
    outs = candidate.site.outs
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    for node in frontier:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in region_of(candidate, frontier):
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            copied[node] = size_of(value)
            continue
        if node.op == "placeholder":
            raise CertificateError(
                f"{candidate.at}: the site reads the input {node.name} outside its arguments"
            )
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = dict(node.meta)
    graph.output(tuple(copied[out] for out in outs))
    assert outs[0].graph.owning_module is not None
    return fx.GraphModule(outs[0].graph.owning_module, graph), copied


def in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with every floating dtype in its calls widened to float64, in place."""

    def widen(argument: Any) -> Any:
        narrow = isinstance(argument, torch.dtype) and argument.is_floating_point
        return torch.float64 if narrow else argument

    for node in module.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
    module.recompile()
    return module
