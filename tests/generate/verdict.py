"""What the compiler makes of cases: which passes take each, and is the rewritten module the same?

Many cases go through one export. A case's nodes are those that its outputs are computed from.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from generate.case import Case
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
    refusals: the reasons given. wrong: how the rewritten module differs, or "". dynamic: captured
    with free sizes.
    """

    case: Case
    taken: Counter[str]
    diagonals: int
    refusals: tuple[str, ...]
    wrong: str
    dynamic: bool

    def __str__(self) -> str:
        reasons = "\n".join(f"# refused: {r}" for r in self.refusals)
        return f"{self.case!r}# taken: {dict(self.taken)}\n{reasons}\n# wrong: {self.wrong or 'no'}"


FORBIDDEN = {
    "nothing": lambda verdict: False,
    "any rewrite": lambda verdict: verdict.taken[verdict.case.rewrite] > 0,
    "a diagonal": lambda verdict: verdict.diagonals > 0,
}
"""What a trap may forbid beyond a wrong result; each says whether a verdict has done it."""


def shrunk(verdict: Verdict, fails: Callable[[Verdict], bool]) -> Verdict:
    """The verdict on the plainest spelling that still fails: axis by axis, what can be dropped."""
    choices = dict(verdict.case.choices)
    for axis in list(choices):
        fewer = {a: c for a, c in choices.items() if a != axis}
        case = verdict.case.respell(fewer)
        if not case.runs():
            continue
        (simpler,) = examine([case], dynamic=verdict.dynamic)
        if fails(simpler):
            choices, verdict = fewer, simpler
    return verdict


class _Batch(nn.Module):
    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case.module() for case in cases)
        self.widths = [len(case.inputs) for case in cases]

    def forward(self, *arguments: Tensor) -> tuple[Any, ...]:
        parts = list(arguments)
        outputs = []
        for case, width in zip(self.cases, self.widths, strict=True):
            outputs.append(case(*parts[:width]))
            del parts[:width]
        return tuple(outputs)


@torch.no_grad()
def examine(cases: Sequence[Case], *, dynamic: bool = False) -> list[Verdict]:
    """Capture all cases in one module, propose every pass, apply each pass alone and compare.

    dynamic: capture with free batch and length, which takes several times as long.
    """
    batch = _Batch(cases)
    inputs = [x for case in cases for x in case.arguments()]
    program = capture(batch, inputs, dynamic=dynamic).program
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
        for chosen in _forms([c for c in candidates if c.rewrite.name == name]):
            prepared = [c.rewrite.prepare(c, setting) for c in chosen]
            found = _differences(original, module, prepared, inputs, widths)
            wrong = [a or (b and f"{name}: {b}") for a, b in zip(wrong, found, strict=True)]
    sites = {(c.rewrite.name, c.site.outs[0]): c for c in candidates}.values()
    verdicts = []
    for case, cone, difference in zip(cases, cones, wrong, strict=True):
        mine = [c for c in sites if c.site.outs[0] in cone]
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
                dynamic,
            )
        )
    return verdicts


def _copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs]


def _forms(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """One candidate for each site, the first offered; then the last ones. None that loses bits."""
    lossless = [c for c in candidates if c.error == 0]
    last = {c.site.outs[0]: c for c in lossless}
    first = {c.site.outs[0]: c for c in reversed(lossless)}
    chosen = [list(first.values()), list(last.values())]
    return chosen if first != last else chosen[:1]


def _cones(graph: fx.Graph, widths: Sequence[int]) -> list[set[fx.Node]]:
    """For each case the nodes that its outputs are computed from."""
    outputs = list(graph.output_node().args[0])
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

    def finite(self, node: fx.Node) -> bool:
        return bool(torch.isfinite(self(node)).all())


def _differences(original, module, chosen, inputs, widths: Sequence[int]) -> list[str]:
    """For each case how the module with `chosen` applied differs from the captured one."""
    rewritten = apply(module, chosen)
    expected, got = (m(*_copies(inputs)) for m in (original, rewritten))
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    reals = [expected, got]
    if all(c.rewrite.exactness != "approximate" for c in chosen):
        # A lossy pass computes in fp32, even where it keeps every bit of the weight.
        reals = [_in_float64(m, _copies(wide)) for m in (original, rewritten)]
    said = []
    at = 0
    for width in widths:
        here = slice(at, at + width)
        at += width
        pairs = zip(got[here], expected[here], strict=True)
        problem = next(filter(None, (_unlike(g, e) for g, e in pairs)), "")
        error = relative_error(reals[1][here], reals[0][here])
        if not problem and reals[1] is not got and error > EQUIVALENCE_LIMIT:
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
    if expected.dtype == torch.bool:
        return "" if torch.equal(got, expected) else "other booleans"
    largest = expected[finite].abs().max().item()
    worst = (got[finite] - expected[finite]).abs().max().item()
    allowed = ROUNDING.get(expected.dtype.to_real(), 0.0) * largest
    return "" if worst <= allowed else f"differs by {worst:.3g} where entries reach {largest:.3g}"


def _in_float64(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for what the graph makes in the default dtype
    try:
        return _Float64(module).run(*inputs)
    finally:
        torch.set_default_dtype(default)


_FILLS = (torch.ops.aten.full.default, torch.ops.aten.scalar_tensor.default)


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

        if target in _FILLS:  # the number that the captured dtype holds
            value = super().call_function(target, args, kwargs)
            return value.double() if value.is_floating_point() else value
        kwargs = {k: widen(v) for k, v in kwargs.items()}
        return super().call_function(target, tuple(widen(a) for a in args), kwargs)
