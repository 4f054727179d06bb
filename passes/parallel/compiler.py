"""From the captured program of one rank to code, in step with the other ranks.

    normal form -> collectives, on which the ranks agree -> the passes of `optimize`

Only what is equal in real arithmetic is applied after the ranks agree, and none of it holds a
collective: ranks with other numbers of heads may choose other kernels, and still send the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.certify import relative_error
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.decide import Choice
from ridgeline.passes.observe import outputs_of
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.rewrite import (
    Fuse,
    ParallelDefect,
    check_counts,
    rewrite_collectives,
)
from ridgeline.passes.settle import rounding_limit


class ParallelCompiler(Compiler):
    """`Compiler` for a rank's model; splits: weight -> how it is split, as `propagate` takes it."""

    def __init__(
        self, target: Any, *, ranks: Ranks, splits: dict[str, str], fuse: Fuse, **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.ranks, self.splits, self.fuse = ranks, splits, fuse
        self._before: fx.GraphModule | None = None

    def __call__(self, program: Program) -> Callable[..., Any]:
        with self.ranks.together():
            run = super().__call__(program)
        return self.ranks.guarded(run)

    def rewrite(self, program: Program) -> fx.GraphModule:
        module, label = program.module, self.plan.label(program.phase)
        self._before, _ = copy_graph(module)
        with program.spent("collectives"):
            account = rewrite_collectives(
                normalize(module),
                self.ranks,
                splits=self.splits,
                results=program.results,
                fuse=self.fuse,
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
            run = self.ranks.guarded(outputs_of)
            expected = run(self._before, program)
            error = relative_error(run(apply(module, list(origin)), program), expected)
            (error,) = self.ranks.largest([error])
        self._before = None
        if error > (limit := rounding_limit(module)):
            raise ParallelDefect(
                f"the rewritten graph moves the outputs by {error:.1e}, where rounding explains"
                f' {limit:.0e}; please report it, and pass fuse="never" until then'
            )
        return origin, list(origin), {}, error
