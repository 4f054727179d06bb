"""What the compiler makes of cases: which passes take each, and is the rewritten module the same?

Many cases go through one export. A case's nodes are those that its outputs are computed from.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from generate.case import Case
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.all import PASSES
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, relative_error
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
"""Largest difference, relative to the largest entry, between two spellings of one function."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case as the compiler sees it.

    taken: pass -> how many of its sites the case has. diagonals: attention calls read as causal.
    refusals: the reasons given. wrong: how the rewritten module differs, or "".
    """

    case: Case
    taken: Counter[str]
    diagonals: int
    refusals: tuple[str, ...]
    wrong: str

    def __str__(self) -> str:
        reasons = "\n".join(f"# refused: {r}" for r in self.refusals)
        return f"{self.case!r}# taken: {dict(self.taken)}\n{reasons}\n# wrong: {self.wrong or 'no'}"


FORBIDDEN = {
    "nothing": lambda verdict: False,
    "any rewrite": lambda verdict: verdict.taken[verdict.case.rewrite] > 0,
    "a diagonal": lambda verdict: verdict.diagonals > 0,
}
"""What a trap may forbid beyond a wrong result; each says whether a verdict has done it."""


class _Batch(nn.Module):
    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case.module() for case in cases)
        self.widths = [len(case.inputs) for case in cases]

    def forward(self, *arguments: Tensor) -> tuple[Any, ...]:
        parts = torch.utils._pytree.tree_map(lambda x: x, list(arguments))
        outputs = []
        for case, width in zip(self.cases, self.widths, strict=True):
            outputs.append(case(*parts[:width]))
            del parts[:width]
        return tuple(outputs)


@torch.no_grad()
def examine(cases: Sequence[Case]) -> list[Verdict]:
    """Capture all cases in one module, propose every pass, apply each pass alone and compare."""
    batch = _Batch(cases)
    inputs = [x for case in cases for x in case.arguments()]
    program = capture(batch, inputs).program
    original, _ = copy_graph(program.module)
    normalize(program.module)
    module = program.module
    expected = batch(*_copies(inputs))
    widths = [len(tree_leaves(e)) for e in expected]
    cones = _cones(module.graph, widths)
    values = _Values(module, inputs)
    setting = Setting(load_target("a100"), False, 0.5, values, WeightStore())
    candidates, refusals = propose(PASSES, module, setting)
    wrong = _differences(original, module, [], inputs, widths)
    for name in sorted({c.rewrite.name for c in candidates}):
        chosen = _first_forms([c for c in candidates if c.rewrite.name == name])
        found = _differences(original, module, chosen, inputs, widths)
        wrong = [a or (b and f"{name}: {b}") for a, b in zip(wrong, found, strict=True)]
    verdicts = []
    for case, cone, difference in zip(cases, cones, wrong, strict=True):
        mine = [c for c in _first_forms(candidates) if c.site.outs[0] in cone]
        reasons = [
            f"{r.rewrite.name} ({r.by}): {r.reject.reason}"
            for r in refusals
            if r.reject.node in cone
        ]
        verdicts.append(
            Verdict(
                case,
                Counter(c.rewrite.name for c in mine),
                sum(getattr(c.call, "diagonal", None) is not None for c in mine),
                tuple(reasons),
                difference,
            )
        )
    return verdicts


def _copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs]


def _first_forms(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate for each site of each pass: the one with the least error."""
    best: dict[tuple[str, fx.Node], Candidate] = {}
    for c in sorted(candidates, key=lambda c: c.error):
        best.setdefault((c.rewrite.name, c.site.outs[0]), c)
    return [c for c in candidates if c in best.values()]


def _cones(graph: fx.Graph, widths: Sequence[int]) -> list[set[fx.Node]]:
    """For each case the nodes that its outputs are computed from."""
    outputs = list(next(reversed(graph.nodes)).args[0])
    cones = []
    for width in widths:
        stack, cone = outputs[:width], set()
        del outputs[:width]
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in cone:
                cone.add(node)
                stack += node.all_input_nodes
        cones.append(cone)
    return cones


class _Values:
    """node -> its value on the inputs; computed at the first request."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.known: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node) -> Any:
        if not self.known:
            run = fx.Interpreter(self.module, garbage_collect_values=False)
            run.run(*_copies(self.inputs))
            self.known = run.env
        return self.known[node]


def _differences(original, module, chosen, inputs, widths: Sequence[int]) -> list[str]:
    """For each case how the module with `chosen` applied differs from the captured one."""
    rewritten = apply(module, chosen)
    expected, got = (m(*_copies(inputs)) for m in (original, rewritten))
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    # A lossy form would differ by its error; one without loss still rounds its scales to fp32.
    exact = all(c.error == 0 for c in chosen)
    reals = [_Float64(m).run(*_copies(wide)) for m in (original, rewritten)] if exact else [got] * 2
    said = []
    at = 0
    for width in widths:
        here = slice(at, at + width)
        at += width
        pairs = zip(got[here], expected[here], strict=True)
        problem = next(filter(None, (_unlike(g, e) for g, e in pairs)), "")
        error = relative_error(reals[1][here], reals[0][here])
        if not problem and error > EQUIVALENCE_LIMIT:
            problem = f"relative error {error:.2g} in float64"
        said.append(problem)
    return said


def _unlike(got: Tensor, expected: Tensor) -> str:
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if not torch.equal(got.isnan(), expected.isnan()):
        return "NaN at other places"
    finite = expected.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return "infinities at other places"
    if not finite.any():
        return ""
    largest = expected[finite].abs().max().item()
    worst = (got[finite] - expected[finite]).abs().max().item()
    allowed = ROUNDING.get(expected.dtype, 0.0) * largest
    return "" if worst <= allowed else f"differs by {worst:.3g} where entries reach {largest:.3g}"


class _Float64(fx.Interpreter):
    """Runs a graph in float64: inputs are given so, weights and floating casts are widened."""

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if wide else value

    def call_function(self, target, args, kwargs):
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it states the dtype that was captured

        def widen(value):
            narrow = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if narrow else value

        kwargs = {k: widen(v) for k, v in kwargs.items()}
        return super().call_function(target, tuple(widen(a) for a in args), kwargs)
