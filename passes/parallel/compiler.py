"""From the captured program of one rank to code, in step with the other ranks.

    normal form -> collectives, on which the ranks agree -> the passes of `optimize` -> kernels

Only what is equal in real arithmetic is applied after the ranks agree, and none of it holds a
collective: ranks with other numbers of heads may choose other kernels, and still send the same.

No data sheet says what a transport does on a machine, so forms of a graph are compared by running
them: norms on all tokens or on a shard, whole or woven (`token_weave`), each compiled as it would
be used. The slowest rank's median counts, on every rank alike. For GPUs that are not here the cost
model answers (`predicted`).
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from ridgeline.cost_model import Target
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Setting, location
from ridgeline.passes.certify import relative_error
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.decide import Choice
from ridgeline.passes.observe import outputs_of, rehearsal
from ridgeline.passes.parallel import token_weave
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.allreduce_rms_norm import NAME
from ridgeline.passes.parallel.predicted import predicted
from ridgeline.passes.parallel.rewrite import (
    ParallelDefect,
    When,
    check_counts,
    refusal,
    rewrite_collectives,
)
from ridgeline.passes.plan import Decision, Plan
from ridgeline.passes.settle import rounding_limit

ROUNDS = 7
"""Timed runs of each form, after one that is not counted."""
WIN = 0.9
"""The part of the median time as it is that a form must stay below, with its quickest run below the
other's: less cannot be told from noise."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way to run a graph. module: the graph as it was lowered; plan: its own account."""

    run: Callable[..., Any]
    module: fx.GraphModule
    plan: Plan
    label: str


def usual(target: Target) -> When:
    """The cost model answers for a GPU that is not here; elsewhere both ways are run."""
    absent = target.kind != "cpu" and not torch.cuda.is_available()
    return "predicted" if absent else "measured"


class ParallelCompiler(Compiler):
    """`Compiler` for a rank's model; splits: weight -> how it is split, as `propagate` takes it;
    strict: as `rewrite_collectives` takes it."""

    def __init__(
        self,
        target: Any,
        *,
        ranks: Ranks,
        splits: dict[str, str],
        fuse: When,
        weave: Literal["measured", "always", "never"],
        strict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.ranks, self.splits, self.fuse, self.weave = ranks, splits, fuse, weave
        self.strict = strict
        self._before: fx.GraphModule | None = None

    def __call__(self, program: Program) -> Callable[..., Any]:
        with self.ranks.together():
            chosen, run = self.ranks.guarded(self._chosen)(program)
        for name in ("applied", "refused", "kernels"):
            known = getattr(self.plan, name)
            known += [entry for entry in getattr(chosen.plan, name) if entry not in known]
        for sentence in chosen.plan.notes:
            self.plan.note(sentence)
        for name in ("predicted", "measured", "seconds"):
            getattr(self.plan, name).update(getattr(chosen.plan, name))
        self._labels[id(program)] = chosen.label
        return self.ranks.guarded(run)

    def _chosen(self, program: Program) -> tuple[Form, Callable[..., Any]]:
        form = self._sharded_or_not(program)
        return form, self._woven_or_not(form, program)

    def _sharded_or_not(self, program: Program) -> Form:
        """The graph with norms on a shard of the tokens where that is quicker, or asked for."""
        if self.fuse == "predicted":
            return self._predicted(program)
        if self.fuse != "measured":
            return self._form(program, fuse=self.fuse == "always")
        shard = self._form(program, fuse=True)
        if not any(d.rewrite == NAME for d in shard.plan.applied):
            return shard  # nothing to choose, and its plan says why
        whole = self._form(program, fuse=False)
        quicker, before, after = self._quicker(program, whole.run, shard.run)
        told = f"{before:.2e} s with norms on all tokens, {after:.2e} s on a shard, run here"
        if quicker:
            shard.plan.note(f"{shard.label}: {told}")
            return shard
        whole.plan.refused += [
            dataclasses.replace(d, refused_by="cost", reason=f"not quicker: {told}", variant="")
            for d in shard.plan.applied
            if d.rewrite == NAME
        ]
        return whole

    def _predicted(self, program: Program) -> Form:
        """The form that the cost model expects to be quicker; the plan has every way's time."""
        whole = self._form(program, fuse=False)
        answer = predicted(whole.module.graph, self.ranks.world, self.target)
        form = self._form(program, fuse=True) if answer.shard else whole
        form.plan.note(f"{form.label}: {answer.said}")
        if answer.kernel is not None:
            form.plan.kernels.append(answer.kernel)
        return form

    def _woven_or_not(self, form: Form, program: Program) -> Callable[..., Any]:
        """The form's own run, or two halves of it in turn."""
        if self.weave == "never":
            return form.run
        reject = token_weave.refusal(form.module)
        if self.lowering == "inductor" and reject is None:
            needed = 'pass lowering="eager"'
            end = form.module.graph.output_node()
            reject = Reject("Inductor compiles the graph as one piece", end, needed)
        if reject is not None:
            form.plan.refused.append(refusal(reject, form.label, "precondition", token_weave.NAME))
            return form.run
        woven = token_weave.Woven(form.module)
        with rehearsal(program) as a, rehearsal(program) as b:
            error = relative_error(woven(*a), form.run(*b))
        (error,) = self.ranks.largest([error])
        quicker, before, after = self._quicker(program, form.run, woven)
        told = f"{before:.2e} s whole, {after:.2e} s in two halves, run here"
        by, reason = None, ""
        if error > (limit := rounding_limit(form.module)):
            by, reason = "certificate", f"moves the outputs by {error:.1e}, allowed {limit:.0e}"
        elif self.weave == "measured" and not quicker:
            by, reason = "cost", f"not quicker: {told}"
        variant = "" if by else f"two halves of the batch in {woven.segments} segments each"
        at = location(form.module.graph.output_node())
        line = Decision(
            token_weave.NAME, at, "reassociating", by, reason, form.label, variant=variant
        )
        (form.plan.refused if by else form.plan.applied).append(line)
        if by:
            return form.run
        form.plan.note(f"{form.label}: {told}")
        return woven

    def _form(self, program: Program, *, fuse: bool) -> Form:
        """The program compiled one way, with an account of its own; `program` is not changed."""
        own = copy.copy(self)
        own.plan = Plan(self.plan.target, self.plan.tolerance)
        own.plan.predicted = dict(self.plan.predicted)  # names of graphs go on from there
        own._labels = {}
        own.fuse = "always" if fuse else "never"
        module, _ = copy_graph(program.module)
        copied = dataclasses.replace(program, module=module)
        rewritten = own.rewrite(copied)
        run = own.lower(rewritten, copied)
        return Form(run, rewritten, own.plan, own._labels[id(copied)])

    def _quicker(
        self, program: Program, now: Callable[..., Any], other: Callable[..., Any]
    ) -> tuple[bool, float, float]:
        """Is `other` quicker than `now`, run by turns on the example inputs? With the seconds of
        both, medians of the slowest rank."""
        taken: list[list[float]] = [[], []]
        for _ in range(ROUNDS + 1):
            for run, times in zip((now, other), taken, strict=True):
                with rehearsal(program) as inputs:
                    self.ranks.largest([0.0])  # a barrier
                    start = time.perf_counter()
                    outputs = run(*inputs)
                    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in outputs):
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
        medians = [statistics.median(times[1:]) for times in taken]
        quickest = [min(times[1:]) for times in taken]
        before, after, first, second = self.ranks.largest([*medians, *quickest])
        return after < WIN * before and second < first, before, after

    def rewrite(self, program: Program) -> fx.GraphModule:
        module, label = program.module, self.plan.label(program.phase)
        self._before, _ = copy_graph(module)
        with program.spent("collectives"):
            account = rewrite_collectives(
                normalize(module),
                self.ranks,
                splits=self.splits,
                results=program.results,
                inputs=program.inputs,
                strict=self.strict,
                fuse=self.fuse == "always",
                label=label,
            )
        self.plan.applied += account.applied
        self.plan.refused += account.refused
        for sentence in account.notes:
            self.plan.note(sentence)
        rewritten = super().rewrite(program)
        check_counts(rewritten, account)
        return rewritten

    def _settled(
        self,
        program: Program,
        captured: fx.GraphModule,
        module: fx.GraphModule,
        setting: Setting,
        choice: Choice,
        sound: Sequence[Candidate],
    ) -> tuple[dict[Candidate, Candidate], list[Candidate], dict[Candidate, str], float]:
        """All that is sound stays: to try rewrites one by one, as `settle` does, each rank would
        have to try the same. The outputs are compared once, and the ranks' worst error counts."""
        with program.spent("fold weights"):
            origin = {c.rewrite.prepare(c, setting): c for c in sound}
        assert self._before is not None
        with program.spent("measure"):
            expected = outputs_of(self._before, program)
            error = relative_error(outputs_of(apply(module, list(origin)), program), expected)
            (error,) = self.ranks.largest([error])
        self._before = None
        if error > (limit := rounding_limit(module)):
            raise ParallelDefect(
                f"the rewritten graph moves the outputs by {error:.1e}, where rounding explains"
                f' {limit:.0e}; please report it, and pass fuse="never" until then'
            )
        return origin, list(origin), {}, error
