"""From the captured program of one rank to code, in step with the other ranks.

    normal form -> collectives, on which the ranks agree -> the passes of `optimize` -> kernels

Only what is equal in real arithmetic is applied after the ranks agree, and none of it holds a
collective: ranks with other numbers of heads may choose other kernels, and still send the same.

No data sheet says what a transport does on a machine, so forms of a graph are compared by running
them: norms on all tokens or on a shard, whole or woven (`token_weave`), each compiled as it would
be used. The slowest rank's median counts, on every rank alike. For GPUs that are not here the cost
model answers (`predicted`).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ridgeline.codegen.inductor import Compiled
from ridgeline.cost_model import Stack, Target
from ridgeline.cost_model.transport import Transport, transport_of
from ridgeline.ir.call import Call
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import SHARDED, Program
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Setting, location
from ridgeline.passes.certify import relative_error
from ridgeline.passes.compile_program import Graph
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.decide import Choice
from ridgeline.passes.observe import outputs_of
from ridgeline.passes.parallel import token_weave
from ridgeline.passes.parallel.agree import LeftAsItIs, RankLost, RankMismatch, Ranks
from ridgeline.passes.parallel.allreduce_rms_norm import NAME
from ridgeline.passes.parallel.apart import apart
from ridgeline.passes.parallel.captured_code import code_of
from ridgeline.passes.parallel.channels import follow
from ridgeline.passes.parallel.collectives import collectives, normal_form
from ridgeline.passes.parallel.expected import expected_seconds
from ridgeline.passes.parallel.in_turn import in_turn
from ridgeline.passes.parallel.layouts import Part
from ridgeline.passes.parallel.meeting import Meeting
from ridgeline.passes.parallel.parts import Parts
from ridgeline.passes.parallel.predicted import predicted
from ridgeline.passes.parallel.rewrite import (
    ParallelDefect,
    When,
    check_counts,
    check_when,
    refusal,
    rewrite_collectives,
)
from ridgeline.passes.parallel.signature import digest_of
from ridgeline.passes.parallel.timed import WIN, Form, Timed, quicker
from ridgeline.passes.plan import Decision, Plan, RefusedBy
from ridgeline.passes.settle import rounding_limit


class InferenceOnly(RidgelineError):
    """A call of a split model that records gradients."""


_TRAINED = (
    "expected a call without gradients, found one that records them: gradients of a split model are"
    " not what its collectives would give backwards (a sum over the ranks of each column-parallel"
    " layer's input gradients is missing). To infer, call eval() or within torch.no_grad(); to"
    " train, split the model with torch's parallelize_module or FSDP, and give it to"
    ' torch.compile(backend="ridgeline")'
)


def _weaving(at: str, label: str, by: RefusedBy | None, reason: str) -> Decision:
    return Decision(token_weave.NAME, at, "reassociating", by, reason, label)


def usual(target: Target) -> When:
    """The cost model answers for a GPU that is not here; elsewhere both ways are run."""
    absent = target.kind != "cpu" and not torch.cuda.is_available()
    return "predicted" if absent else "measured"


class ParallelCompiler(Compiler):
    """`Compiler` for a rank's model; splits: weight -> how it is split, as `propagate` takes it;
    stack: the model's shape, by which a GPU's schedule is predicted; equal: whether all ranks hold
    as many heads and channels, None where the code may be each rank's own, and is not compared;
    strict: as `rewrite_collectives` takes it."""

    def __init__(
        self,
        target: Any,
        *,
        ranks: Ranks,
        splits: dict[str, Part],
        fuse: When,
        weave: When,
        stack: Stack | None = None,
        equal: bool | None = None,
        strict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        check_when("fuse", fuse)
        check_when("weave", weave)
        self.ranks, self.splits, self.fuse, self.weave = ranks, splits, fuse, weave
        self.stack, self.equal = stack, equal
        self.meeting = Meeting(ranks)
        self.cut: token_weave.Cut | None = None
        self._links: Transport | None = None
        self.timed: list[Timed] = []
        self.strict = strict
        self._before: fx.GraphModule | None = None
        self._accepts: dict[int, Callable[..., bool]] = {}

    def deciding(self) -> contextlib.AbstractContextManager[None]:
        return self.meeting.deciding()

    def meet(
        self, wanted: str, call: Call, known: Callable[[], Iterable[Graph]]
    ) -> contextlib.AbstractContextManager[list[Graph]]:
        def fits(graph: Graph) -> bool:
            accepts = self._accepts.get(id(graph.captured.program))  # none: refreshed meanwhile
            return accepts is not None and accepts(*call.flat)

        return self.meeting.meet(wanted, call, known, fits)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        with self.ranks.together():
            yield
            self.ranks.agree("a compiled graph", {})

    def __call__(self, program: Program) -> Callable[..., Any]:
        """What raises must be made known to the other ranks, by who calls this (`compiling`).

        Raises InferenceOnly where gradients are recorded.
        """
        if program.training:
            raise InferenceOnly(_TRAINED)
        if self.equal is not None:
            code = code_of(program.module.graph, self.splits, self.equal)
            self.ranks.agree_on_lines("the captured code", code)
        chosen, run = self.ranks.guarded(self._chosen)(program)
        for name in ("applied", "refused", "kernels"):
            known = getattr(self.plan, name)
            known += [entry for entry in getattr(chosen.plan, name) if entry not in known]
        for sentence in chosen.plan.notes:
            self.plan.note(sentence)
        for name in ("predicted", "measured", "seconds"):
            getattr(self.plan, name).update(getattr(chosen.plan, name))
        self._labels[id(program)] = chosen.label
        self._accepts[id(program)] = run.accepts
        return self._told(self.ranks.guarded(run))

    def release(self, program: Program) -> None:
        super().release(program)
        self._accepts.pop(id(program), None)

    def forget(self) -> None:
        super().forget()
        self._accepts.clear()
        if self.meeting.weights is not None:
            self.meeting.weights.forget()

    def _told(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`; where it fails, the others hear why when they are told, or time out."""

        def told(*flat: Any) -> Any:
            try:
                return run(*flat)
            except RankLost:
                raise
            except Exception as error:
                self.ranks.say_failed(error)
                raise

        return told

    def _chosen(self, program: Program) -> tuple[Form, Compiled]:
        return self._woven_or_not(self._sharded_or_not(program), program)

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
        wins, before, after = quicker(self.ranks, program, whole.run, shard.run)
        told = f"{before:.2e} s with norms on all tokens, {after:.2e} s on a shard, run here"
        chosen = shard if wins else whole
        chosen.plan.note(f"{chosen.label}: {told}{self._beside(whole, shard, before, after, wins)}")
        if wins:
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

    def _woven_or_not(self, form: Form, program: Program) -> tuple[Form, Compiled]:
        """The form, or two parts of its tokens in turn where a call has them."""
        if self.weave == "never":
            return form, form.run
        module, _ = copy_graph(program.module)
        normal_form(normalize(module))
        cut = token_weave.find_cut(module.graph, asked=self.weave == "always")
        if isinstance(cut, Reject):
            form.plan.refused.append(refusal(cut, form.label, "precondition", token_weave.NAME))
            return form, form.run
        world, target = self.ranks.world, self.target
        chosen = token_weave.choose_cut(module.graph, cut, world, target, self.stack)
        if chosen.told:
            form.plan.note(f"{form.label}, predicted for {target.name}: {chosen.told}")
        told = chosen.said
        at = location(module.graph.output_node())
        if self.weave == "predicted" and not chosen.wins:
            told = f"not predicted to be quicker: {told}"
            form.plan.refused.append(_weaving(at, form.label, "cost", told))
            return form, form.run
        cut = self._agreed(chosen.cut)
        woven = self._form(program, fuse=form.fused, cut=cut)
        if self.weave == "measured":
            wins, before, after = quicker(self.ranks, program, form.run, woven.run)
            told = f"{told}: {before:.2e} s whole, {after:.2e} s in two parts, run here"
            compared = self._beside(form, woven, before, after, wins)
            form.plan.note(f"{form.label}: {told}{compared}")
            if not wins:
                form.plan.refused.append(_weaving(at, form.label, "cost", f"not quicker: {told}"))
                return form, form.run
        return self._parted(form, woven, cut, told, at)

    def _agreed(self, cut: token_weave.Cut) -> token_weave.Cut:
        """One cut for all ranks, whose machines may have other numbers of cores."""
        tile, ahead = map(int, self.ranks.largest([cut.tile, cut.ahead]))
        return dataclasses.replace(cut, tile=tile, ahead=ahead)

    def _parted(
        self, form: Form, woven: Form, cut: token_weave.Cut, told: str, at: str
    ) -> tuple[Form, Compiled]:
        """The woven form, with what was decided before it, and what runs calls of any size."""
        decided = [d for d in form.plan.refused if d.refused_by == "cost" and d.rewrite == NAME]
        woven.plan.refused += decided
        woven.plan.kernels += [k for k in form.plan.kernels if k not in woven.plan.kernels]
        for sentence in form.plan.notes:
            if sentence not in woven.plan.notes and "all_reduce ->" not in sentence:
                woven.plan.note(sentence)
        line = _weaving(at, woven.label, None, "")
        woven.plan.applied.append(dataclasses.replace(line, variant=told))

        def of(flat: tuple[Any, ...]) -> Compiled:
            return (woven if cut.holds(flat) else form).run

        return woven, Compiled(lambda *x: of(x)(*x), lambda *x: of(x).accepts(*x))

    def _form(self, program: Program, *, fuse: bool, cut: token_weave.Cut | None = None) -> Form:
        """The program compiled one way, with an account of its own; `program` is not changed."""
        own = copy.copy(self)
        own.plan = Plan(self.plan.target, self.plan.tolerance)
        own.plan.predicted = dict(self.plan.predicted)  # names of graphs go on from there
        own._labels = {}
        own.fuse, own.cut = "always" if fuse else "never", cut
        module, _ = copy_graph(program.module)
        copied = dataclasses.replace(program, module=module)
        rewritten = own.rewrite(copied)
        expected = None
        if transport := self._transport():
            expected = expected_seconds(rewritten.graph, transport, self.target)
        run = own.lower(rewritten, copied)
        assert isinstance(run, Compiled)  # for inference
        # A rank that could not compile has said so: the others must not wait for it in a run.
        self.ranks.agree("a compiled form", {})
        return Form(run, rewritten, own.plan, own._labels[id(copied)], fuse, expected)

    def _transport(self) -> Transport | None:
        """What the ranks' transport takes here, measured once; None where this machine is not what
        is compiled for, one rank sends nothing, or nothing is chosen by running it."""
        if self.ranks.world == 1 or self.target.kind != "cpu":
            return None
        if "measured" not in (self.fuse, self.weave):
            return None
        if self._links is None and dist.get_backend(self.ranks.group) == "gloo":
            self._links = self.ranks.beside(lambda: transport_of(self.ranks.group))
            self.plan.note(f"gloo between {self._links}")
        return self._links

    def _beside(self, now: Form, other: Form, before: float, after: float, wins: bool) -> str:
        """Both times as predicted, and whether by them the choice would be the same."""
        if now.expected is None or other.expected is None:
            return ""
        first, second = self.ranks.largest([now.expected, other.expected])
        self.timed.append(Timed((before, after), (first, second)))
        agrees = (second < WIN * first) == wins
        verdict = "the same choice" if agrees else "the other choice"
        return f"; predicted {first:.2e} s and {second:.2e} s: {verdict}"

    def rewrite(self, program: Program) -> fx.GraphModule:
        given, module, label = program, program.module, self.plan.label(program.phase)
        self._before, _ = copy_graph(module)
        with program.spent("collectives"):
            merged = normal_form(normalize(module))
            if self.cut is None:  # else it was followed before it was cut
                follow(module.graph, self.splits)
            else:
                module = apart(module, Parts(module.graph, self.cut.symbol), self.cut)
                program = dataclasses.replace(program, module=module)
            account = rewrite_collectives(
                module,
                self.ranks,
                splits=self.splits,
                results=program.results,
                inputs=program.inputs,
                strict=self.strict,
                fuse=self.fuse == "always",
                label=label,
            )
        if merged:
            self.plan.note(f"{label}: {merged} all_gather of values gathered before are left out")
        self.plan.applied += account.applied
        self.plan.refused += account.refused
        for sentence in account.notes:
            self.plan.note(sentence)
        rewritten = super().rewrite(program)
        self._labels[id(given)] = self._labels.pop(id(program))
        if self.cut is not None:
            in_turn(rewritten.graph)
            rewritten.recompile()
            sends = "; ".join(collectives(rewritten.graph))
            self.ranks.agree(f"the order of what the {label} graph sends", {"sends": sends})
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
        before, rewritten = self._before, apply(module, list(origin))
        with program.spent("measure"):
            error = self.ranks.beside(
                lambda: relative_error(outputs_of(rewritten, program), outputs_of(before, program))
            )
        (error,) = self.ranks.largest([error])
        self._before = None
        if not error <= (limit := rounding_limit(module)):  # NaN is no small error
            if not self.strict:
                self._excused(program, f"{error:.1e}, where rounding explains {limit:.0e}")
            way = "fuse" if self.cut is None else "weave"
            raise ParallelDefect(
                f"the rewritten graph moves the outputs by {error:.1e}, where rounding explains"
                f' {limit:.0e}; please report it, and pass {way}="never" until then'
            )
        return origin, list(origin), {}, error

    def _excused(self, program: Program, moved: str) -> None:
        """Raise LeftAsItIs where the error may come from values that differ between the ranks: no
        DTensor says that they do not, or inputs that are not split do."""
        output = program.module.graph.output_node()
        given = zip(program.module.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
        whole = [(str(i), x) for i, (n, x) in enumerate(given) if SHARDED not in n.meta]
        tensors = [(i, x) for i, x in whole if isinstance(x, torch.Tensor)]
        differ = "values between collectives are not the same on all ranks"
        try:
            self.ranks.agree("their inputs", {"inputs": digest_of(tensors)})
        except RankMismatch:
            differ = "inputs are not the same on all ranks"
        else:
            if self.splits:
                return
        raise LeftAsItIs(Reject(f"rewritten, the outputs move by {moved}: {differ}", output))
