"""A saved plan checked again: every applied rewrite is found, certified and measured anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ridgeline.cost_model import Target
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.certify import (
    EQUIVALENCE_LIMIT,
    CertificateError,
    equivalence,
    relative_error,
)
from ridgeline.passes.observe import Observation, outputs_of
from ridgeline.passes.propose import propose
from ridgeline.passes.settle import rounding_limit
from ridgeline.passes.weights import WeightStore


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rewrite of the plan: its error now, what is allowed, and what is wrong ("" if nothing).

    error: of an exact rewrite in float64 at the site; of an approximate one its local drift.
    """

    rewrite: str
    at: str
    error: float | None
    allowed: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """verdicts: one per entry of the plan. measured: output error with every rewrite applied that
    was found; allowed: the most it may be. before, after: the program without and with them."""

    verdicts: list[Verdict]
    measured: float
    allowed: float
    before: fx.GraphModule
    after: fx.GraphModule


def verify(
    program: Program,
    applied: Sequence[dict[str, Any]],
    passes: Sequence[Pass],
    target: Target,
    tolerance: float,
) -> Verified:
    """Check the `applied` entries of a saved plan against the model as it is now.

    Weights are quantised without calibration data, as the plan's were unless it says GPTQ.
    """
    module = normalize(program.module)
    observed = Observation(module, program)
    setting = Setting(target, program.training, tolerance, observed, WeightStore())
    candidates, refusals = propose(passes, module, setting)
    known = {(c.rewrite.name, c.at, c.variant): c for c in candidates}
    why = {r.reject.node.name: r.reject.reason for r in refusals}
    verdicts: list[Verdict] = []
    found: list[Candidate] = []
    for entry in applied:
        candidate = known.get((entry["rewrite"], entry["at"], entry["variant"]))
        if candidate is None:
            reason = why.get(entry["at"].rpartition(":")[2], "no such site in the model")
            verdicts.append(Verdict(entry["rewrite"], entry["at"], None, 0.0, reason))
            continue
        found.append(candidate.rewrite.prepare(candidate, setting))
        verdicts.append(_verdict(found[-1], tolerance))
    expected = outputs_of(module, program)
    after = apply(module, found)
    measured = relative_error(outputs_of(after, program), expected)
    return Verified(verdicts, measured, max(tolerance, rounding_limit(module)), module, after)


def _verdict(candidate: Candidate, tolerance: float) -> Verdict:
    if candidate.rewrite.exactness == "approximate":
        return Verdict(candidate.rewrite.name, candidate.at, candidate.error, tolerance)
    try:
        error = equivalence(candidate, {}).relative_error
    except CertificateError as refusal:
        return Verdict(candidate.rewrite.name, candidate.at, None, EQUIVALENCE_LIMIT, str(refusal))
    return Verdict(candidate.rewrite.name, candidate.at, error, EQUIVALENCE_LIMIT)
