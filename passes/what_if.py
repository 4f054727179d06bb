"""What would be rewritten, and what it would cost, on a machine and at sizes that are not here.

`WhatIf(program)` finds the sites of every pass once; `at(target, batch, context)` then lets the
passes weigh them at those sizes and the chooser decide, as `optimize` does: the same candidates,
the same `choose`. Layers that repeat are weighed once (`ridgeline.passes.repeats`), and count as
often as they stand. Nothing is rewritten, certified or run, and no weight is read. Of errors
nothing is known then: approximate rewrites are taken to be allowed, and cost alone decides.

    before = sum over nodes outside the chosen sites + sum of the sites as they stand
    after  = the same outside                        + sum of the sites as they would be
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ridgeline.cost_model import Cost, InfeasibleChoice, Target, Work, estimate, work_of
from ridgeline.cost_model.work import Kernel
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.ir.sizes import sizes_at
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.compiler import weight_bytes
from ridgeline.passes.decide import Choice, Objective, choose, figure
from ridgeline.passes.propose import Weighed, find_sites, weigh
from ridgeline.passes.repeats import Repeats, kinds, repeats
from ridgeline.passes.room import Room
from ridgeline.passes.unobserved import UnknownWeights, Unobserved
from ridgeline.passes.workload import Sizes, WorkloadError, lifetimes, sizes_of, state_bytes

ALLOWED = 0.5
"""The tolerance that passes are told: any that admits approximate rewrites."""


@dataclass(frozen=True, slots=True)
class Firing:
    """A pass's part of a decision.

    values: outputs of sites that it could make, made: those that it does. variants: how often each
    of its forms was taken.
    """

    values: int
    made: int
    variants: dict[str, int]

    @property
    def form(self) -> str:
        """The form taken most often, without how many layers stand side by side; "" where there is
        but one."""
        counts = Counter[str]()
        for variant, count in self.variants.items():
            counts[variant.partition(", ")[0]] += count
        return counts.most_common(1)[0][0] if counts else ""

    @property
    def most(self) -> bool:
        """Does it fire at most of its sites?"""
        return 2 * self.made > self.values


@dataclass(frozen=True, slots=True)
class Unfired:
    """Sites at which a pass does not fire, for one reason.

    kind: the reason in a few words. sites: how many. form: of those that the pass could make, the
    best. before, after: as they stand and as that form, together, in the unit of the objective;
    doubt: how far the gain may be wrong, summed; of a refusal that is not about cost, None.
    """

    name: str
    kind: str
    sites: int
    form: str = ""
    before: float | None = None
    after: float | None = None
    doubt: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One decision: passes by name, cost before and after, bytes held.

    weights: (before, after) of the program's weights; state: of its caches; live: (before, after)
    of what else is alive at the fullest step. before, after, and the kernels of work_before,
    work_after, are None where no choice fits the machine's memory. unfired: why passes do not fire
    where they could, or nearly could.
    """

    target: Target
    sizes: Sizes
    weights: tuple[int, int]
    state: int
    live: tuple[int, int]
    firing: dict[str, Firing]
    before: Cost | None = None
    after: Cost | None = None
    work_before: Work | None = None
    work_after: Work | None = None
    unfired: tuple[Unfired, ...] = ()

    @property
    def fits(self) -> bool:
        """Does the machine's memory hold it?"""
        return self.after is not None


class WhatIf:
    """A captured program, and what the passes found in it."""

    def __init__(
        self, program: Program, passes: Sequence[Pass], objective: Objective = "latency"
    ) -> None:
        self.program, self.passes, self.objective = program, tuple(passes), objective
        module = normalize(program.module)
        self.graph: fx.Graph = module.graph
        self.weight_bytes = weight_bytes(module)
        self._found = find_sites(passes, module.graph)
        self._weights, self._observed = UnknownWeights(), Unobserved()
        self._proofs: dict[Any, Any] = {}
        self._works: dict[tuple[int, ...], dict[int, Work]] = {}
        self._kinds = kinds(node for node in self.graph.nodes if node.op == "call_function")
        self._repeats: dict[Target, Repeats] = {}
        self._lifetimes = lifetimes(self.graph, program.results)

    @property
    def has_context(self) -> bool:
        """Has the program a length, of its inputs or caches?"""
        return sizes_of(self.program, None, None).context is not None

    @property
    def fixed_context(self) -> bool:
        """Is its length fixed, as that of sliding windows that are full?"""
        captured = sizes_of(self.program, None, None).context
        return captured is not None and bool(sizes_of(self.program, None, captured + 1).fixed)

    def at(self, target: Target, batch: int | None = None, context: int | None = None) -> Answer:
        """The decision for `target` at this batch and context; None: as captured.

        Raises WorkloadError where the program's own sizes are fixed to others.
        """
        sizes = sizes_of(self.program, batch, context)
        if sizes.fixed:
            raise WorkloadError(
                f"{sizes.fixed[0]}; give example inputs whose batch and length are at least 2"
            )
        setting = Setting(
            target,
            self.program.training,
            ALLOWED,
            self._observed,
            self._weights,
            self._proofs,
        )
        with sizes_at(sizes.values):
            weighed, counts = self._weighed(target, setting)
            held_state = state_bytes(self.program)
            room = Room(self._lifetimes, target, self._repeats[target].copies)
            live = room.peak_bytes()
            try:
                choice = choose(
                    list(counts),
                    target,
                    tolerance=ALLOWED,
                    objective=self.objective,
                    sensitivity=0.0,
                    weight_bytes=self.weight_bytes,
                    state_bytes=held_state,
                    counts=counts,
                    room=room,
                )
            except InfeasibleChoice:
                weights = self.weight_bytes, self.weight_bytes
                return Answer(target, sizes, weights, held_state, (live, live), {})
            firing = _firing(counts, choice)
            unfired = _unfired(weighed, self._repeats[target], choice, counts, self.objective)
            held = self.weight_bytes + sum(n * c.memory_bytes for c, n in choice.times.items())
            sides = self._sides(sizes, choice)
            costs = [estimate(w, target, resident_bytes=self.weight_bytes) for w in sides]
            weights, alive = (self.weight_bytes, held), (live, room.peak_bytes(choice.times))
            return Answer(
                target, sizes, weights, held_state, alive, firing, *costs, *sides, unfired
            )

    def _weighed(
        self, target: Target, setting: Setting
    ) -> tuple[list[Weighed], dict[Candidate, int]]:
        """One block of sites of each kind, and how often each candidate stands for one."""
        known = self._repeats.get(target)
        weighed = None if known is None else weigh(known.found, self.graph, setting)
        if known is None or weighed is None or not known.hold(weighed):
            everything = weigh(self._found, self.graph, setting)
            known = self._repeats[target] = repeats(self._found, everything)
            weighed = known.kept(everything)
        else:
            weighed = [*known.misses, *weighed]
        return weighed, {c: known.counts[w.site] for w in weighed if w.site for c in w.candidates}

    def _sides(self, sizes: Sizes, choice: Choice) -> list[Work]:
        """The whole program's kernels, before and after."""
        rest = Counter(self._kinds.values())
        for c, times in choice.times.items():
            for node in c.site.nodes:
                if node in self._kinds:  # layers side by side may be of one kind
                    rest[self._kinds[node]] -= times
        outside = _repeated((w, rest[kind]) for kind, w in self._work_by_kind(sizes).items())
        return [
            Work(outside + _repeated((getattr(c, side), n) for c, n in choice.times.items()))
            for side in ("before", "after")
        ]

    def _work_by_kind(self, sizes: Sizes) -> dict[int, Work]:
        """The same for every target."""
        key = tuple(sizes.values.values())
        if key not in self._works:
            examples = {kind: node for node, kind in self._kinds.items()}
            works = ((kind, work_of(node)) for kind, node in examples.items())
            self._works[key] = {kind: work for kind, work in works if work.kernels}
        return self._works[key]


def _repeated(works: Iterable[tuple[Work, int]]) -> tuple[Kernel, ...]:
    return tuple(kernel for work, times in works for kernel in work.kernels * times)


def _firing(counts: Mapping[Candidate, int], choice: Choice) -> dict[str, Firing]:
    """By pass: the outputs of its sites, and those made."""
    outs: dict[str, dict[fx.Node, int]] = {}
    for c, count in counts.items():
        outs.setdefault(c.rewrite.name, {}).update(dict.fromkeys(c.site.outs, count))
    made, variants = Counter[str](), dict[str, Counter[str]]()
    for c, times in choice.times.items():
        made[c.rewrite.name] += times * len(c.site.outs)
        variants.setdefault(c.rewrite.name, Counter())[c.variant] += times
    return {
        name: Firing(sum(of.values()), made[name], dict(sorted(variants.get(name, {}).items())))
        for name, of in outs.items()
    }


def _unfired(
    weighed: Sequence[Weighed],
    known: Repeats,
    choice: Choice,
    counts: Mapping[Candidate, int],
    objective: Objective,
) -> tuple[Unfired, ...]:
    """Refusals by pass and kind."""
    parts: list[Unfired] = []
    for w in weighed:
        if w.refusal is not None:
            times = 1 if w.site is None else known.counts[w.site]
            parts.append(Unfired(w.refusal.rewrite.name, w.refusal.reject.reason, times))
    for loss in choice.refused:
        c, n = loss.candidate, counts[loss.candidate]
        before, after = (n * figure(cost, objective) for cost in choice.costs[c])
        doubt = n * choice.doubt[c] if loss.by == "cost" else None
        parts.append(Unfired(c.rewrite.name, loss.kind, n, c.variant, before, after, doubt))
    groups: dict[tuple[str, str], list[Unfired]] = {}
    for part in parts:
        groups.setdefault((part.name, part.kind), []).append(part)
    return tuple(map(_together, groups.values()))


def _together(parts: Sequence[Unfired]) -> Unfired:
    """One of several; its form is the most frequent."""
    forms = Counter[str]()
    for part in parts:
        forms[part.form] += part.sites

    def total(name: str) -> float | None:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        return sum(values) if values else None

    first, sites = parts[0], sum(part.sites for part in parts)
    figures = (total(name) for name in ("before", "after", "doubt"))
    return Unfired(first.name, first.kind, sites, forms.most_common(1)[0][0], *figures)
