"""`ridgeline sweep`: does ridgeline take models that nobody tuned it for?

For every family, attention implementation and dtype the model is captured, every site of every
exact or reassociating pass is certified and rewritten whatever it would win, and the results are
compared with the model in float64, for the batch captured and for a batch of one; decoders also
generate, with a static and a dynamic cache. No attention, norm or linear layer may be silent: each
is applied or refused with a reason.
"""

import copy
import difflib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ridgeline.codegen.inductor import run_eager
from ridgeline.cost_model import load_target
from ridgeline.ir.caches import is_cache
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.passes import PASSES
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.certify import CertificateError, equivalence, relative_error
from ridgeline.passes.compile_program import CompileProgram
from ridgeline.passes.drop_in import optimized_copy
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import Refusal, propose
from ridgeline.passes.weights import WeightStore
from ridgeline.tools.sweep_families import Family, families

aten = torch.ops.aten


class UnknownFamily(RidgelineError):
    """A name that is not in the list of families."""


LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error to float64 that is within rounding, unless the model itself is further away."""


@dataclass(slots=True)
class Row:
    """What happened to one family in one form.

    applied: pass -> sites rewritten. refused: "pass: reason" -> sites. anchors: pass -> operations
    in the graphs at which it looks. error, eager: relative error to float64 of the rewritten model
    and of the original; where the model cannot compute in float64, to the original, and NaN.
    problem: what went wrong, "" if nothing.
    """

    family: str
    kind: str
    attention: str
    dtype: str
    captures: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    anchors: dict[str, int] = field(default_factory=dict)
    error: float = float("nan")
    eager: float = float("nan")
    seconds: float = 0.0
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json."""
        return asdict(self)


ANCHORS = {
    "flash_attention": (aten.softmax.int, aten.scaled_dot_product_attention.default),
    "norm": (aten.rsqrt.default, aten.layer_norm.default, aten.rms_norm.default),
    "quantized_linear": (aten.linear.default,),
}
"""The operations that make a site of a pass possible."""


class _Everything(CompileProgram):
    """Compiles a program with every certified site rewritten, and counts them."""

    def __init__(self) -> None:
        self.plan = self
        self.applied: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.anchors: Counter[str] = Counter()
        self.silent: Counter[str] = Counter()
        self._certificates: dict[Any, Any] = {}

    def __call__(self, program: Program) -> Callable[..., Any]:
        module = normalize(program.module)
        observed = Observation(module, program)
        setting = Setting(load_target("a100"), program.training, 0.0, observed, WeightStore())
        candidates, refusals = propose(PASSES, module, setting)
        self._account(module, candidates, refusals)
        chosen = [c for c in _disjoint(candidates) if self._sound(c)]
        self.applied.update(c.rewrite.name for c in chosen)
        self.refused.update(
            f"{r.rewrite.name}: {r.reject.reason}"
            for r in refusals
            if r.rewrite.exactness != "approximate"
        )
        return run_eager(apply(module, chosen))

    def _account(
        self, module: fx.GraphModule, candidates: list[Candidate], refusals: list[Refusal]
    ) -> None:
        """Count the anchors, and those that no candidate covers and no refusal speaks for."""
        for name, targets in ANCHORS.items():
            covered = {n for c in candidates if c.rewrite.name == name for n in c.site.nodes}
            nodes = [n for n in module.graph.nodes if n.target in targets]
            refused = sum(r.rewrite.name == name for r in refusals)
            self.anchors[name] += len(nodes)
            self.silent[name] += max(0, len(set(nodes) - covered) - refused)

    def _sound(self, candidate: Candidate) -> bool:
        try:
            equivalence(candidate, self._certificates)
        except CertificateError as error:
            self.refused[f"{candidate.rewrite.name}: CERTIFICATE {error}"] += 1
            return False
        return True

    def stale(self) -> bool:
        return False

    def forget(self) -> None:
        self._certificates.clear()

    def release(self, program: Program) -> None:
        """Nothing is kept per program."""

    def note(self, sentence: str) -> None:
        self.refused[f"capture: {sentence}"] += 1


def _disjoint(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The largest sites first, none that overlaps one taken."""
    taken: set[Any] = set()
    kept = []
    for c in sorted(candidates, key=lambda c: -len(c.site.nodes)):
        if taken.isdisjoint(c.site.nodes):
            taken.update(c.site.nodes)
            kept.append(c)
    return kept


@torch.no_grad()
def sweep_one(family: Family, attention: str, dtype: torch.dtype) -> Row:
    """Sweep one family in one form; nothing that a model does ends the sweep."""
    row = Row(family.name, family.kind, attention, str(dtype).removeprefix("torch."))
    start = time.perf_counter()
    try:
        _sweep(family, attention, dtype, row)
    except Exception as error:  # a row of the report, whatever it is
        row.problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    row.seconds = time.perf_counter() - start
    return row


def _sweep(family: Family, attention: str, dtype: torch.dtype, row: Row) -> None:
    torch.manual_seed(0)
    model = family.build(attention).to(dtype)
    inputs = _cast(family.inputs(), dtype)
    compiler = _Everything()
    fast = optimized_copy(model, compiler)
    expected, original = _reference(model, inputs), _tensors(model(**inputs))
    got = _tensors(fast(**inputs))
    row.error = relative_error(got, expected or original)
    if expected is not None:
        row.eager = relative_error(original, expected)
    if not row.error <= max(LIMIT[dtype], 3 * row.eager if expected else 0.0):
        row.problem = f"error {row.error:.1e} where the model itself has {row.eager:.1e}"
    single = {k: v[:1] for k, v in inputs.items()}
    of_one = relative_error(_tensors(fast(**single)), _tensors(model(**single)))
    if not of_one <= max(LIMIT[dtype], 6 * row.eager if expected else 0.0):
        row.problem = row.problem or f"error {of_one:.1e} for a batch of one"
    if "input_ids" in inputs and hasattr(model, "generate") and family.kind != "encoder":
        given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        _generate(fast, model, given, row)
    row.captures, row.applied = fast.captures, dict(compiler.applied)
    row.refused, row.anchors = dict(compiler.refused), dict(compiler.anchors)
    for name, n in (+compiler.silent).items():
        row.problem = row.problem or f"{n} sites of {name} are neither rewritten nor refused"
    if fast.fallbacks:
        row.problem = row.problem or next(iter(fast.fallbacks.values()))


def _reference(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor] | None:
    """What the model gives in float64; None where it cannot compute in it."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):  # the grouped products have no float64
        wide.set_experts_implementation("eager")
    try:
        return _tensors(wide(**_cast(inputs, torch.float64)))
    except RuntimeError:
        return None


def _generate(fast: nn.Module, model: nn.Module, inputs: dict[str, Any], row: Row) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for cache in (None, "static"):
        try:
            expected = model.generate(**inputs, **options, cache_implementation=cache)
        except Exception:  # a model that has no such cache of its own
            continue
        got = fast.generate(**inputs, **options, cache_implementation=cache)
        if row.dtype == "float32" and not torch.equal(got, expected):
            row.problem = row.problem or f"other tokens with a {cache or 'dynamic'} cache"


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _tensors(result: Any) -> list[Tensor]:
    """The floating tensors of the result itself; caches are compared through generation."""
    if hasattr(result, "keys"):
        result = [result[k] for k in result if k not in ("past_key_values", "cache_params")]
    leaves = tree_leaves(result, is_leaf=is_cache)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def report(rows: Sequence[Row], console: Console) -> None:
    """A line per family and form, then each reason for a refusal with its number of sites."""
    table = Table("family", "attention", "dtype", "graphs", "applied", "error", "eager", box=None)
    for r in rows:
        applied = ", ".join(_of(r, name) for name in sorted(r.applied)) or "-"
        figures = (f"{r.error:.1e}", f"{r.eager:.1e}")
        table.add_row(r.family, r.attention, r.dtype, str(r.captures), applied, *figures)
    console.print(table)
    reasons: Counter[str] = Counter()
    for r in rows:
        for reason, n in r.refused.items():
            reasons[re.sub(r"\b\w*_\d+\b|\d+", "#", reason)] += n
    if reasons:
        console.print(Text("\nrefused sites", style="bold"))
    for reason, n in reasons.most_common():
        console.print(f"  {n:4d}  {reason}", markup=False)
    wrong = [r for r in rows if r.problem]
    console.print(f"\n{len(rows)} forms of {len({r.family for r in rows})} families")
    for r in wrong:
        console.print(f"  {r.family} ({r.attention}, {r.dtype}): {r.problem}", markup=False)


def _of(row: Row, name: str) -> str:
    """The sites rewritten, of those possible where that is another number."""
    applied, possible = row.applied[name], row.anchors.get(name, 0)
    return f"{name} {applied}" + (f" of {possible}" if possible > applied else "")


def run(names: Sequence[str], dtypes: Sequence[torch.dtype], console: Console) -> list[Row]:
    """Sweep the named families, all if none, in every form, with progress; print the report.

    Raises UnknownFamily with the nearest names.
    """
    known = {f.name: f for f in families()}
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(known)
            raise UnknownFamily(f"no family {name!r}; there are {near}")
    chosen = [known[n] for n in names or known]
    forms = [(f, a, d) for f in chosen for a in ("eager", "sdpa") for d in dtypes]
    rows = []
    for family, attention, dtype in track(forms, "sweeping", console=Console(stderr=True)):
        row = sweep_one(family, attention, dtype)
        if "does not support an attention implementation" not in row.problem:
            rows.append(row)
    report(rows, console)
    return rows
