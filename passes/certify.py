"""Evidence: the site against its replacement in float64, and the whole model on its inputs.

Both sides run in float64 on inputs chosen to expose a wrong rewrite: unequal scales, huge and tiny
logits, equal rows, masks with values other than 0 and -inf. The model-level error is the relative
Frobenius error of all floating outputs together, against the unrewritten program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.apply import copy_graph, replace
from ridgeline.passes.base import Candidate
from ridgeline.passes.plan import Certificate
from ridgeline.passes.region import frontier_of, region_of, structure_of

aten = torch.ops.aten
EQUIVALENCE_LIMIT = 1e-9
"""Relative error allowed between two float64 evaluations of the same real function."""


class CertificateError(RidgelineError):
    """A rewrite that does not compute what it replaces; always a defect of ridgeline."""


def relative_error(got: Iterable[Any], expected: Iterable[Any]) -> float:
    """‖got - expected‖ / ‖expected‖ over all floating tensors; inf where one alone is finite."""
    difference, whole = 0.0, 0.0
    for a, b in zip(got, expected, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        if not isinstance(a, Tensor):  # an update that one side lacks
            return math.inf
        a, b = a.detach().double(), b.detach().double()
        unlike = torch.isfinite(a) != torch.isfinite(b)
        if unlike.any():
            return math.inf
        both = torch.isfinite(b)
        difference += (a[both] - b[both]).square().sum().item()
        whole += b[both].square().sum().item()
    if whole == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / whole)


def equivalence(candidate: Candidate, cache: dict[Any, Certificate]) -> Certificate:
    """Site against replacement in float64; equal sites of other layers share the evidence."""
    frontier = frontier_of(candidate)
    key = (_signature(candidate, frontier), structure_of(region_of(candidate, frontier)))
    if key not in cache:
        cache[key] = _compare(candidate, frontier)
    return dataclasses.replace(cache[key], preconditions=candidate.preconditions)


def _signature(candidate: Candidate, frontier: Sequence[fx.Node]) -> Any:
    call = candidate.call
    plain = tuple(
        v for f in dataclasses.fields(call) if not isinstance(v := getattr(call, f.name), fx.Node)
    )
    tensors = tuple((tuple(_hints(n)), n.meta["val"].dtype) for n in frontier)
    return candidate.rewrite.name, candidate.site.pattern, plain, tensors


def _hints(node: fx.Node) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape]


def _compare(candidate: Candidate, frontier: Sequence[fx.Node]) -> Certificate:
    region, copied = _region(candidate, frontier)
    replaced, again = copy_graph(region)
    both = {old: again[n] if isinstance(n, fx.Node) else n for old, n in copied.items()}
    replace(candidate, both, replaced)
    replaced.graph.eliminate_dead_code()
    worst, names = 0.0, []
    for name, inputs in _adversarial(frontier):
        expected = _Float64(region).run(*inputs)
        got = _Float64(replaced).run(*inputs)
        worst = max(worst, relative_error([got], [expected]))
        names.append(name)
    return Certificate("equivalence", worst, EQUIVALENCE_LIMIT, tuple(names))


def _region(
    candidate: Candidate, frontier: Sequence[fx.Node]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The graph between the frontier and the site's output, with sizes at their captured values."""
    out = candidate.site.outs[0]
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    for node in frontier:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in region_of(candidate, frontier):
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            copied[node] = value if isinstance(value, int) else int(value.node.hint)
            continue
        if node.op == "placeholder":
            raise CertificateError(
                f"{candidate.at}: the site reads the input {node.name} outside its arguments"
            )
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = dict(node.meta)
    graph.output(copied[out])
    assert out.graph.owning_module is not None
    return fx.GraphModule(out.graph.owning_module, graph), copied


def _adversarial(frontier: Sequence[fx.Node]) -> Iterable[tuple[str, list[Tensor]]]:
    """Named input sets for the frontier, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(node: fx.Node, scale: float) -> Tensor:
        shape, dtype = _hints(node), node.meta["val"].dtype
        if dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.6
        if not dtype.is_floating_point:
            raise CertificateError(f"{node.name}: no adversarial inputs for {dtype}")
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    yield "normal", [normal(n, 1.0) for n in frontier]
    yield "logits of several hundred", [normal(n, 12.0) for n in frontier]
    yield "tiny", [normal(n, 1e-3) for n in frontier]
    yield "equal rows", [_equal_rows(normal(n, 1.0)) for n in frontier]


def _equal_rows(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x[..., :1, :].expand(x.shape).clone()


class _Float64(fx.Interpreter):
    """Runs a graph with every floating cast widened to float64."""

    def call_function(self, target, args, kwargs):
        def widen(value):
            narrow = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if narrow else value

        kwargs = {k: widen(v) for k, v in kwargs.items()}
        return super().call_function(target, tuple(widen(a) for a in args), kwargs)


def back_off(
    chosen: Sequence[Candidate], tolerance: float, error_of: Callable[[Sequence[Candidate]], float]
) -> tuple[list[Candidate], list[Candidate], float]:
    """The largest prefix, safest first, whose measured output error holds the tolerance.

    error_of: applies candidates and measures. Returns (kept, given back, measured error): the
    approximate rewrites are given back worst first; the others are never given back.
    """
    fixed = [c for c in chosen if c.rewrite.exactness != "approximate"]
    ranked = sorted((c for c in chosen if c not in fixed), key=lambda c: c.error)
    measured = error_of([*fixed, *ranked])
    if measured <= tolerance or not ranked:
        return list(chosen), [], measured
    low, high, best = 0, len(ranked), error_of(fixed)
    while high - low > 1:
        middle = (low + high) // 2
        error = error_of([*fixed, *ranked[:middle]])
        if error <= tolerance:
            low, best = middle, error
        else:
            high = middle
    kept = {*fixed, *ranked[:low]}
    return [c for c in chosen if c in kept], ranked[low:], best
