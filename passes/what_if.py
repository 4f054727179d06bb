"""What would be rewritten, and what it would cost, on a machine and at sizes that are not here.

`WhatIf(program)` finds the sites of every pass once; `at(target, batch, context)` then lets the
passes weigh them at those sizes and the chooser decide, as `optimize` does: the same candidates,
the same `choose`. Nothing is rewritten, certified or run, and no weight is read. Of errors nothing
is known then: approximate rewrites are taken to be allowed, and cost alone decides.

    before = sum over nodes outside the chosen sites + sum of the sites as they stand
    after  = the same outside                        + sum of the sites as they would be
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ridgeline.cost_model import Cost, InfeasibleChoice, Target, Work, estimate, work_of
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.ir.sizes import sizes_at
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.compiler import weight_bytes
from ridgeline.passes.decide import Choice, Objective, choose
from ridgeline.passes.propose import find_sites, weigh
from ridgeline.passes.unobserved import UnknownWeights, Unobserved
from ridgeline.passes.workload import Sizes, WorkloadError, sizes_of, state_bytes

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
    def most(self) -> bool:
        """Does it fire at most of its sites?"""
        return 2 * self.made > self.values


@dataclass(frozen=True, slots=True)
class Answer:
    """One decision: passes by name, cost before and after, bytes held.

    weights: (before, after) of the program's weights; state: of its caches. before, after, and the
    kernels of work_before, work_after, are None where no choice fits the machine's memory.
    """

    target: Target
    sizes: Sizes
    weights: tuple[int, int]
    state: int
    firing: dict[str, Firing]
    before: Cost | None = None
    after: Cost | None = None
    work_before: Work | None = None
    work_after: Work | None = None

    @property
    def fits(self) -> bool:
        """Does the machine's memory hold it?"""
        return self.after is not None


class WhatIf:
    """A captured program, and what the passes found in it."""

    def __init__(
        self, program: Program, passes: Sequence[Pass], objective: Objective = "latency"
    ) -> None:
        self.program, self.objective = program, objective
        module = normalize(program.module)
        self.graph: fx.Graph = module.graph
        self.weight_bytes = weight_bytes(module)
        self._found = find_sites(passes, module.graph)
        self._weights, self._observed = UnknownWeights(), Unobserved()
        self._proofs: dict[Any, Any] = {}
        self._works: dict[tuple[Any, ...], dict[fx.Node, Work]] = {}

    @property
    def has_context(self) -> bool:
        """Has the program a length, of its inputs or caches?"""
        return sizes_of(self.program, None, None).context is not None

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
            candidates, _ = weigh(self._found, self.graph, setting)
            state = state_bytes(self.program)
            try:
                choice = choose(
                    candidates,
                    target,
                    tolerance=ALLOWED,
                    objective=self.objective,
                    sensitivity=0.0,
                    weight_bytes=self.weight_bytes,
                    state_bytes=state,
                )
            except InfeasibleChoice:
                return Answer(target, sizes, (self.weight_bytes,) * 2, state, {})
            return self._answer(target, sizes, state, candidates, choice)

    def _answer(
        self,
        target: Target,
        sizes: Sizes,
        state: int,
        candidates: Sequence[Candidate],
        choice: Choice,
    ) -> Answer:
        taken = {node for c in choice.chosen for node in c.site.nodes}
        works = self._work_by_node(sizes)
        outside = [k for n, work in works.items() if n not in taken for k in work.kernels]
        sides = [
            Work((*outside, *(k for c in choice.chosen for k in getattr(c, side).kernels)))
            for side in ("before", "after")
        ]
        held = self.weight_bytes + sum(c.memory_bytes for c in choice.chosen)
        costs = [estimate(w, target, resident_bytes=self.weight_bytes) for w in sides]
        firing = _firing(candidates, choice.chosen)
        return Answer(target, sizes, (self.weight_bytes, held), state, firing, *costs, *sides)

    def _work_by_node(self, sizes: Sizes) -> dict[fx.Node, Work]:
        """The same for every target."""
        key = tuple(sizes.values.values())
        if key not in self._works:
            self._works[key] = {node: work_of(node) for node in self.graph.nodes}
        return self._works[key]


def _firing(candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> dict[str, Firing]:
    names = dict.fromkeys(c.rewrite.name for c in candidates)

    def outs(of: Sequence[Candidate], name: str) -> int:
        return len({out for c in of if c.rewrite.name == name for out in c.site.outs})

    def variants(name: str) -> dict[str, int]:
        forms = Counter(c.variant for c in chosen if c.rewrite.name == name)
        return dict(sorted(forms.items()))

    return {n: Firing(outs(candidates, n), outs(chosen, n), variants(n)) for n in names}
