"""Forms of one graph, and which is quicker when both run here, on all ranks alike.

quicker = median(other) < WIN median(now) and min(other) < min(now)      of the slowest rank
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ridgeline.codegen.inductor import Compiled
from ridgeline.ir.program import Program
from ridgeline.passes.observe import rehearsal
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.plan import Plan

ROUNDS = 7
"""Timed runs of each form, after one that is not counted."""
WIN = 0.9
"""The part of the median time as it is that a form must stay below, with its quickest run below the
other's: less cannot be told from noise."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way to run a graph. module: the graph as it was lowered; plan: its own account; fused:
    whether norms were to move to a shard; expected: seconds that this machine is predicted to take
    for it, None where that is not known."""

    run: Compiled
    module: fx.GraphModule
    plan: Plan
    label: str
    fused: bool
    expected: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of two forms of one graph: as it was, and the other."""

    measured: tuple[float, float]
    predicted: tuple[float, float]


def quicker(
    ranks: Ranks, program: Program, now: Callable[..., Any], other: Callable[..., Any]
) -> tuple[bool, float, float]:
    """Is `other` quicker than `now`, run by turns on the example inputs? With the seconds of
    both, medians of the slowest rank.

    Raises RankLost at once where another rank fails in a run.
    """
    taken: list[list[float]] = [[], []]

    def by_turns() -> None:
        for _ in range(ROUNDS + 1):
            for run, times in zip((now, other), taken, strict=True):
                with rehearsal(program) as inputs:
                    ranks.barrier()
                    start = time.perf_counter()
                    outputs = run(*inputs)
                    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in outputs):
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)

    ranks.beside(by_turns)
    medians = [statistics.median(times[1:]) for times in taken]
    quickest = [min(times[1:]) for times in taken]
    before, after, first, second = ranks.largest([*medians, *quickest])
    return after < WIN * before and second < first, before, after
