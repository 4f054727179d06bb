"""Graphs that send things by themselves: models that were split over ranks before they came here.

    parallelize_module (DTensor), funcol.all_reduce, dist.all_reduce in place, _c10d_functional ops

`MeshCompiler` is `Compiler` for graphs that send nothing. Others are the same graph on every rank
of their group, so every rank compiles them in step: they agree, the collectives are rewritten
(`rewrite`), and only what is equal in real arithmetic is applied beside them. What was split is
known where the graph was over DTensors, from their placements. Nothing says of another graph that
its inputs are the same on all ranks, so norms stay where they are unless `fuse` is given. Where the
ranks' graphs differ, or are in no normal form, all leave them as they came.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.distributed import distributed_c10d

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.match import Reject
from ridgeline.ir.program import SHARDED, WEIGHT, Program
from ridgeline.passes.apply import copy_graph
from ridgeline.passes.compiler import Compiler, graph_figures
from ridgeline.passes.parallel.agree import LeftAsItIs, Ranks
from ridgeline.passes.parallel.collectives import group_of, is_collective
from ridgeline.passes.parallel.compiler import ParallelCompiler, usual
from ridgeline.passes.parallel.layouts import COLUMN, ROW, Part
from ridgeline.passes.parallel.rewrite import ParallelDefect, When, check_when, refusal
from ridgeline.passes.parallel.signature import versions

TRAINED = "gradients are recorded, and norms move to a shard of the tokens for inference only"
NEEDED = "call within torch.no_grad()"
UNDECLARED = (
    "norms stay on all tokens: nothing says that this graph's inputs are the same on all ranks;"
    ' pass fuse="measured" (or another) to state that they are, and values between collectives too'
)


class MeshCompiler(Compiler):
    """`Compiler` for models that may send; fuse: as `parallelize` takes it. Other than "never", it
    states of a graph that is not over DTensors that its inputs, and its values between
    collectives, are the same on all ranks; None does not."""

    def __init__(self, target: Any, *, fuse: When | None = None, **options: Any) -> None:
        super().__init__(target, **options)
        check_when("fuse", fuse)
        self.fuse: When | None = fuse

    def __call__(self, program: Program) -> Callable[..., Any]:
        """Raises also RankMismatch and RankLost, where the other ranks compile something else."""
        first = first_collective(program.module.graph)
        if first is None:
            return super().__call__(program)
        if program.training:
            return self._as_it_is(program, Reject(TRAINED, first, NEEDED))
        splits = declared_splits(program.module.graph)
        fuse = self.fuse or (usual(self.target) if splits else "never")
        ranks = Ranks.of(distributed_c10d._resolve_process_group(group_of(first)))
        ranks.agree(
            "how to compile a model that sends",
            {
                "target": self.target.name,
                "fuse": fuse,
                "objective": self.objective,
                "ignore": repr(self.ignore),
                **versions(),
            },
        )
        compiler = ParallelCompiler(
            self.target,
            ranks=ranks,
            splits=splits,
            fuse=fuse,
            weave="never",
            strict=False,
            objective=self.objective,
            passes=[p for p in self.passes if p.exactness != "approximate"],
            ignore=self.ignore,
            lowering=self.lowering,
            workload=self.workload,
        )
        compiler.plan, compiler._labels, compiler._weights = self.plan, self._labels, self._weights
        if not (self.fuse or splits):
            self.plan.note(UNDECLARED)
        if self.tolerance > 0:
            self.plan.note(
                "a graph with collectives gets no approximate rewrites, which each rank would"
                " measure by itself"
            )
        with ranks.together():
            try:
                run = compiler(program)
            except LeftAsItIs as left:
                run = ranks.guarded(self._as_it_is(program, left.reject))
            except RidgelineError:
                raise
            except Exception as error:  # the others wait for this rank, which cannot go on alone
                raise ParallelDefect(
                    f"compiling a graph with collectives failed ({type(error).__name__}: {error}),"
                    " which is a defect of ridgeline; please report it"
                ) from error
            ranks.agree("a compiled graph", {})
            return run

    def _as_it_is(self, program: Program, reject: Reject) -> Callable[..., Any]:
        """The graph compiled without any rewrite; the plan says why."""
        label = self.plan.label(program.phase)
        self._labels[id(program)] = label
        self.plan.refused.append(refusal(reject, label, "precondition"))
        module, _ = copy_graph(program.module)
        figures = graph_figures(module, self.target)
        self.plan.predicted[label] = {"before": figures, "after": figures}
        return self.lower(module, program)


def first_collective(graph: fx.Graph) -> fx.Node | None:
    """The first all_reduce, by whose group the model is split; else the first of any kind."""
    found = [node for node in graph.nodes if is_collective(node)]
    sums = [n for n in found if n.target is torch.ops._c10d_functional.all_reduce.default]
    return next(iter(sums or found), None)


def declared_splits(graph: fx.Graph) -> dict[str, Part]:
    """Placeholder -> how what it takes is split, as `propagate` takes it: read off DTensors."""
    return {
        str(node.target): Part(ROW if node.meta[SHARDED] == 1 and WEIGHT in node.meta else COLUMN)
        for node in graph.find_nodes(op="placeholder")
        if SHARDED in node.meta
    }
