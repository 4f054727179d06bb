"""From a captured program to code: propose, choose, apply, certify, lower; the plan records it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from torch import fx

from ridgeline.codegen.kernel import constant
from ridgeline.codegen.lower import lower
from ridgeline.cost_model import (
    InfeasibleChoice,
    Target,
    estimate,
    load_target,
    work_of_graph,
)
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.ir.sizes import sizes_at
from ridgeline.passes.already_quantized import already_quantized
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Pass, Setting, location
from ridgeline.passes.certify import CertificateError, Mismatch, equivalence
from ridgeline.passes.compile_program import CompileProgram
from ridgeline.passes.decide import Choice, Objective, choose
from ridgeline.passes.decision_lines import decision, refusal_decision
from ridgeline.passes.fold import fold_stacks
from ridgeline.passes.ignore import check_patterns, ignored
from ridgeline.passes.observe import Observation
from ridgeline.passes.plan import Certificate, Decision, Plan
from ridgeline.passes.propose import propose
from ridgeline.passes.record import record
from ridgeline.passes.room import Room, too_full
from ridgeline.passes.settle import settle
from ridgeline.passes.weights import WeightStore
from ridgeline.passes.workload import (
    CAPTURED,
    Sizes,
    Workload,
    bytes_of,
    lifetimes,
    sizes_of,
    state,
)

log = logging.getLogger(__name__)


class OptimizeError(RidgelineError, ValueError):
    """An argument of `optimize` that cannot be used."""


def check_max_graphs(count: int) -> None:
    """Raise OptimizeError for a number of graphs that cannot be kept."""
    if count < 1:
        raise OptimizeError(f"max_graphs is {count}; keep at least 1")


def weight_bytes(module: fx.GraphModule) -> int:
    """Bytes of the distinct tensors that the graph reads as attributes."""
    tensors = {id(t): t for n in module.graph.find_nodes(op="get_attr") for t in [constant(n)]}
    return sum(t.nbytes for t in tensors.values())


def graph_figures(
    module: fx.GraphModule, target: Target, results: int | None = None
) -> dict[str, Any]:
    """What a plan says of a whole graph: its cost, `held_bytes` of its distinct weights,
    `state_bytes` of the caches that it leaves beside its `results`, and `live_bytes` of what else
    is alive at the fullest step."""
    held, caches = weight_bytes(module), state(module.graph, results)
    cost = estimate(work_of_graph(module.graph), target, resident_bytes=held)
    live = Room(lifetimes(module.graph, results), target).peak_bytes()
    held_bytes = {"held_bytes": held, "state_bytes": bytes_of(caches), "live_bytes": live}
    return {**asdict(cost), **held_bytes}


class Compiler(CompileProgram):
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
        hessians: Mapping[str, torch.Tensor] | None = None,
        workload: Workload = CAPTURED,
    ) -> None:
        """The arguments are `optimize`'s, checked here; hessians: weight name -> [K,K]; workload:
        the sizes to choose for."""
        if not isinstance(tolerance, int | float) or not 0.0 <= tolerance < 1.0:
            raise OptimizeError(f"tolerance is {tolerance!r}; choose 0 <= tolerance < 1, as 0.02")
        if objective not in get_args(Objective):
            raise OptimizeError(f"objective is {objective!r}; choose one of {get_args(Objective)}")
        if lowering not in ("inductor", "eager"):
            raise OptimizeError(f"lowering is {lowering!r}; choose 'inductor' or 'eager'")
        check_patterns(ignore, OptimizeError)
        for p in passes:
            if not isinstance(p, Pass):
                raise OptimizeError(f"{p!r} is no pass; choose from ridgeline.passes.PASSES")
        self.target = load_target(target)
        self.tolerance, self.objective = tolerance, objective
        self.passes, self.ignore, self.lowering = tuple(passes), tuple(ignore or ()), lowering
        self.workload = workload
        self.plan = Plan(self.target.name, tolerance)
        self._weights = WeightStore(hessians)
        self._certificates: dict[Any, Certificate] = {}
        self._labels: dict[int, str] = {}

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
        self._labels.clear()

    def lower(self, rewritten: fx.GraphModule, program: Program) -> Callable[..., Any]:
        """Kernels in place of the `ridgeline::` ops of `rewritten`; the plan lists them."""
        with program.spent("lower"):
            lowered = lower(rewritten, program.inputs, self.target, self.lowering, program.training)
        for sentence in lowered.notes:
            self.plan.note(sentence)
        self.plan.kernels += [k for k in lowered.kernels if k not in self.plan.kernels]
        log.info("compiled %s for %s", program.phase, self.target.name)
        return lowered.run

    def release(self, program: Program) -> None:
        """The program's code is given up: the plan forgets its decisions."""
        self.plan.drop(self._labels.pop(id(program)))

    def rewrite(self, program: Program) -> fx.GraphModule:
        """Propose, choose, certify, measure and apply; the plan grows by this program's account."""
        spent, label = program.spent, self.plan.label(program.phase)
        self._labels[id(program)] = label
        self.plan.seconds[label] = spent
        with spent("normalize"):
            captured, _ = copy_graph(program.module)
            module = normalize(program.module)
        for sentence in already_quantized(module.graph):
            self.plan.note(sentence)
        observed = Observation(module, program)
        setting = Setting(self.target, program.training, self.tolerance, observed, self._weights)
        sizes = self._sizes(program, label)
        with spent("match"), sizes_at(sizes.values):
            candidates, refusals = propose(self.passes, module, setting)
            candidates, left = self._without_ignored(candidates, label)
        sensitivity = 1.0
        if any(c.error > 0 for c in candidates):
            with spent("measure"):
                sensitivity = observed.sensitivity()
        with spent("choose"), sizes_at(sizes.values):
            choice = self._choice(candidates, program, module, sensitivity)
        with spent("certify"):
            evidence, unsound = self._certified(choice.chosen)
        sound = [c for c in choice.chosen if c not in unsound]
        origin, kept, back, error = self._settled(program, captured, module, setting, choice, sound)
        with spent("apply"):
            if not kept:
                module = captured  # what was captured runs, not another spelling of it
            rewritten = apply(module, kept)
            if not program.training:
                fold_stacks(rewritten, self._weights)
                self._weights.watch_coded(module.graph)
        plan, costs = self.plan, choice.costs
        plan.measured[label] = error
        plan.applied += [
            decision(
                c,
                costs[origin[c]],
                label,
                certificate=evidence.get(origin[c]) or self._drift(c, error),
            )
            for c in kept
        ]
        plan.refused += [
            decision(c, costs[origin.get(c, c)], label, "certificate", why)
            for c, why in (unsound | back).items()
        ]
        plan.refused += [
            decision(r.candidate, costs[r.candidate], label, r.by, r.reason, r.needed)
            for r in choice.refused
        ]
        plan.refused += [refusal_decision(r, label) for r in refusals]
        plan.refused += left
        with spent("choose"), sizes_at(sizes.values):
            plan.predicted[label] = {
                side: graph_figures(m, self.target, program.results)
                for side, m in (("before", module), ("after", rewritten))
            }
        if said := too_full(label, plan.predicted[label]["after"], self.target, program.training):
            plan.note(said)
        record(plan, label)
        return rewritten

    def _choice(
        self,
        candidates: Sequence[Candidate],
        program: Program,
        module: fx.GraphModule,
        sensitivity: float,
    ) -> Choice:
        """Among what fits the memory with all that is alive at once; where nothing does, which the
        plan then says, with weights and caches alone."""
        caches = state(module.graph, program.results)

        def chosen(room: Room | None) -> Choice:
            return choose(
                candidates,
                self.target,
                tolerance=self.tolerance,
                objective=self.objective,
                sensitivity=sensitivity,
                weight_bytes=weight_bytes(module),
                state_bytes=bytes_of(caches),
                room=room,
            )

        try:
            return chosen(Room(lifetimes(module.graph, program.results), self.target))
        except InfeasibleChoice:
            return chosen(None)

    def _sizes(self, program: Program, label: str) -> Sizes:
        """The sizes to choose for; the plan says them where they are not those captured."""
        batch, context = self.workload.of(program.phase)
        sizes = sizes_of(program, batch, context)
        for sentence in sizes.fixed:
            self.plan.note(sentence)
        if (batch, context) != (None, None) and not sizes.fixed:
            figures = (("batch", sizes.batch), ("context", sizes.context))
            said = " and ".join(f"{name} {value}" for name, value in figures if value is not None)
            self.plan.note(f"{label}: rewrites are chosen, and times predicted, for {said}")
        return sizes

    def _settled(
        self,
        program: Program,
        captured: fx.GraphModule,
        module: fx.GraphModule,
        setting: Setting,
        choice: Choice,
        sound: Sequence[Candidate],
    ) -> tuple[dict[Candidate, Candidate], list[Candidate], dict[Candidate, str], float]:
        """(prepared -> as chosen, kept, given back -> the reason, measured output error)."""
        spent = program.spent
        with spent("fold weights"):
            origin = {c.rewrite.prepare(c, setting): c for c in sound}
        with spent("measure"):
            kept, back, error = settle(program, captured, module, list(origin), self.tolerance)
        # A site whose form went too far may still take its safest one.
        if safer := choice.safer(origin[c] for c in back):
            with spent("fold weights"):
                again = {c.rewrite.prepare(c, setting): c for c in safer}
            origin |= again
            with spent("measure"):
                kept, lost, error = settle(
                    program, captured, module, [*kept, *again], self.tolerance
                )
            won = {c.site for c in kept}
            back = {c: why for c, why in (back | lost).items() if c.site not in won}
            back = {c: why for c, why in back.items() if c not in again}
        return origin, kept, back, error

    def _without_ignored(
        self, candidates: list[Candidate], phase: str
    ) -> tuple[list[Candidate], list[Decision]]:
        def left_alone(node: fx.Node) -> bool:
            return ignored(location(node).partition(":")[0], self.ignore)

        out = {
            (c.rewrite.name, location(o)): c.rewrite.exactness
            for c in candidates
            for o in c.site.outs
            if left_alone(o)
        }
        lines = [
            Decision(name, at, exactness, "precondition", "listed in ignore=", phase)
            for (name, at), exactness in out.items()
        ]
        return [c for c in candidates if not any(map(left_alone, c.site.outs))], lines

    def _certified(
        self, chosen: Sequence[Candidate]
    ) -> tuple[dict[Candidate, Certificate], dict[Candidate, str]]:
        """(evidence, refused -> the reason) of those that must equal what they replace."""
        evidence: dict[Candidate, Certificate] = {}
        unsound: dict[Candidate, str] = {}
        for candidate in chosen:
            if candidate.rewrite.exactness == "approximate":
                continue
            try:
                evidence[candidate] = equivalence(candidate, self._certificates)
            except Mismatch as error:
                unsound[candidate] = f"{error}; please report it"
                log.warning("refused: %s", error)
            except CertificateError as error:
                unsound[candidate] = str(error)
            except Exception as error:  # a defect of one pass must not cost the user the model
                unsound[candidate] = f"no certificate could be made ({error}); please report it"
                log.exception("refused: %s at %s", candidate.rewrite.name, candidate.at)
        return evidence, unsound

    def _drift(self, candidate: Candidate, model_error: float) -> Certificate:
        return Certificate(
            "drift",
            candidate.error,
            self.tolerance,
            ("the layer's output, and the model's outputs, on the example inputs",),
            candidate.preconditions,
            model_error,
        )
