"""From a captured program to code: propose, choose, apply, certify, lower; the plan records it."""

import fnmatch
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx

from ridgeline.codegen.kernel import constant
from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Cost, Target, estimate, load_target, work_of_graph
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate, Pass, Setting, location
from ridgeline.passes.certify import CertificateError, back_off, equivalence, relative_error
from ridgeline.passes.decide import choose, decision, refusal_decision
from ridgeline.passes.observe import Observation, outputs_of
from ridgeline.passes.plan import Certificate, Decision, Plan, cost_to_dict
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore

log = logging.getLogger(__name__)

Objective = Literal["latency", "memory", "energy", "eflops"]


class OptimizeError(RidgelineError, ValueError):
    """An argument of `optimize` that cannot be used."""


def weight_bytes(module: fx.GraphModule) -> int:
    """Bytes of the distinct tensors that the graph reads as attributes."""
    tensors = {id(t): t for n in module.graph.find_nodes(op="get_attr") for t in [constant(n)]}
    return sum(t.nbytes for t in tensors.values())


class Compiler:
    """Turns captured programs into callables for one target, and keeps the plan."""

    def __init__(
        self,
        target: str | Target,
        *,
        tolerance: float = 0.0,
        objective: Objective = "latency",
        passes: Sequence[Pass],
        ignore: Sequence[str] = (),
        lowering: Literal["inductor", "eager"] = "inductor",
        hessians: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """The arguments are `optimize`'s, checked here; hessians: weight name -> [K,K]."""
        if not 0.0 <= tolerance < 1.0:
            raise OptimizeError(f"tolerance is {tolerance}; choose 0 <= tolerance < 1, as 0.02")
        if objective not in get_args(Objective):
            raise OptimizeError(f"objective is {objective!r}; choose one of {get_args(Objective)}")
        if lowering not in ("inductor", "eager"):
            raise OptimizeError(f"lowering is {lowering!r}; choose 'inductor' or 'eager'")
        self.target = load_target(target)
        self.tolerance, self.objective = tolerance, objective
        self.passes, self.ignore, self.lowering = tuple(passes), tuple(ignore), lowering
        self.plan = Plan(self.target.name, tolerance)
        self._weights = WeightStore(hessians)
        self._certificates: dict[Any, Certificate] = {}

    def __call__(self, program: Program) -> Callable[..., Any]:
        """Program -> a function on the program's flat inputs."""
        return self.lower(self.rewrite(program), program)

    def stale(self) -> bool:
        """Has a weight that was folded into compiled code been changed in place?"""
        return self._weights.stale()

    def forget(self) -> None:
        """Drop folded weights and decisions; the next program starts anew."""
        self._weights = WeightStore(self._weights.hessians)
        self.plan.clear()

    def lower(self, rewritten: fx.GraphModule, program: Program) -> Callable[..., Any]:
        """Kernels in place of the `ridgeline::` ops of `rewritten`; the plan lists them."""
        lowered = lower(rewritten, program.inputs, self.target, self.lowering, program.training)
        for sentence in lowered.notes:
            self.plan.note(sentence)
        self.plan.kernels += [k for k in lowered.kernels if k not in self.plan.kernels]
        log.info("compiled %s for %s", program.phase, self.target.name)
        return lowered.run

    def rewrite(self, program: Program) -> fx.GraphModule:
        """Propose, choose, apply and certify; the plan grows by this program's decisions."""
        module, phase, plan = normalize(program.module), program.phase, self.plan
        observed = Observation(module, program.inputs)
        setting = Setting(self.target, program.training, self.tolerance, observed, self._weights)
        candidates, refusals = propose(self.passes, module, setting)
        candidates, ignored = self._without_ignored(candidates, phase)
        lossy = any(c.error > 0 for c in candidates)
        chosen, others, costs = choose(
            candidates,
            self.target,
            tolerance=self.tolerance,
            objective=self.objective,
            sensitivity=observed.sensitivity() if lossy else 1.0,
            weight_bytes=weight_bytes(module),
        )
        prepared = {c.rewrite.prepare(c, setting): c for c in chosen}
        kept, given_back, error = self._settle(program, module, list(prepared))
        # A site whose form went too far may still take its safest one.
        safer = _safest(given_back, candidates, costs)
        if safer:
            prepared |= {c.rewrite.prepare(c, setting): c for c in safer}
            again = [c for c in prepared if prepared[c] in safer]
            kept, lost, error = self._settle(program, module, [*kept, *again])
            won = {c.site for c in again} - {c.site for c in lost}
            given_back = [c for c in given_back if c.site not in won]
            given_back += [c for c in lost if c not in again]
        rewritten = apply(module, kept)
        plan.measured[phase] = error
        plan.applied += [
            decision(c, costs[prepared[c]], phase, certificate=self._certificate(c, error))
            for c in kept
        ]
        plan.refused += [
            decision(
                c,
                costs[prepared[c]],
                phase,
                "certificate",
                f"given back: with it the measured output error exceeds {self.tolerance:g}",
            )
            for c in given_back
        ]
        plan.refused += [decision(c, costs[c], phase, by, why) for c, by, why in others]
        plan.refused += [refusal_decision(r, phase) for r in refusals]
        plan.refused += ignored
        plan.predicted[phase] = {
            side: cost_to_dict(
                estimate(work_of_graph(m.graph), self.target, resident_bytes=weight_bytes(m))
            )
            for side, m in (("before", module), ("after", rewritten))
        }
        return rewritten

    def _without_ignored(
        self, candidates: list[Candidate], phase: str
    ) -> tuple[list[Candidate], list[Decision]]:
        def ignored(c: Candidate) -> bool:
            path = location(c.site.outs[0]).partition(":")[0]
            return any(fnmatch.fnmatch(path, pattern) for pattern in self.ignore)

        out = {c.at: c for c in candidates if ignored(c)}
        lines = [
            Decision(
                c.rewrite.name,
                at,
                c.rewrite.exactness,
                "precondition",
                "listed in ignore=",
                phase,
            )
            for at, c in out.items()
        ]
        return [c for c in candidates if not ignored(c)], lines

    def _settle(
        self, program: Program, module: fx.GraphModule, chosen: list[Candidate]
    ) -> tuple[list[Candidate], list[Candidate], float]:
        """Measure the whole program; give approximate rewrites back until the tolerance holds."""
        if not chosen:
            return [], [], 0.0
        expected = outputs_of(module, program.inputs)

        def error_of(candidates: Sequence[Candidate]) -> float:
            return relative_error(outputs_of(apply(module, candidates), program.inputs), expected)

        return back_off(chosen, self.tolerance, error_of)

    def _certificate(self, candidate: Candidate, model_error: float) -> Certificate:
        if candidate.rewrite.exactness == "approximate":
            return Certificate(
                "drift",
                candidate.error,
                self.tolerance,
                ("the layer's output, and the model's outputs, on the example inputs",),
                candidate.preconditions,
                model_error,
            )
        certificate = equivalence(candidate, self._certificates)
        if certificate.relative_error > certificate.limit:
            raise CertificateError(
                f"{candidate.rewrite.name} at {candidate.at}: the replacement differs from what it"
                f" replaces by {certificate.relative_error:.1e} in float64, allowed"
                f" {certificate.limit:.0e}; please report this model"
            )
        return certificate


def _safest(
    given_back: Sequence[Candidate],
    candidates: Sequence[Candidate],
    costs: dict[Candidate, tuple[Cost, Cost]],
) -> list[Candidate]:
    """For each site given back, its useful form of least error, where that is a safer one."""
    forms = []
    for refused in given_back:
        useful = [
            c
            for c in candidates
            if c.site is refused.site and costs[c][1].seconds < costs[c][0].seconds
        ]
        best = min(useful, key=lambda c: c.error)
        if best.error < refused.error:
            forms.append(best)
    return forms
