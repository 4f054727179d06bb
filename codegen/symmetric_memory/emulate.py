"""The fused kernels' protocol and arithmetic on tensors: W ranks in one process, in any order.

Law: the steps of `protocol`, taken one at a time in an order that a seed draws from all that the
protocol allows, on W buffers [T,N] and their signal words. Row t of a launch, in fp32:

    s = x_0[t] + x_1[t] + ... + residual[t]       multimem: the sum over ranks rounded to the dtype
    residual'[t] = round(s);   y[t] = round(s / sqrt(mean(s²) + eps) * (shift + weight))

Ranks run as far apart as the signals let them, so a launch may begin on one rank while another is
still in the last. Deterministic for a seed. `ridgeline.codegen.triton.all_reduce_norm` is what
is emulated; PyTorch's own symmetric memory exists on CUDA devices only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ridgeline.codegen.symmetric_memory.protocol import Protocol, Run, Step
from ridgeline.ir.errors import RidgelineError


class Deadlock(RidgelineError):
    """No step can be taken: a signal is missing, or blocks wait for others that never start."""


@dataclass(frozen=True, slots=True)
class Launch:
    """partials: [T,N] of each rank, one dtype; residual [T,N], the same on all; weight [N]."""

    partials: Sequence[Tensor]
    residual: Tensor
    weight: Tensor | None = None
    eps: float = 1e-6
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One rank after one launch: y [T,N]; residual [T,N], or its shard [ceil(T/W),N], whose rows
    beyond T are 0."""

    y: Tensor
    residual: Tensor


def emulate(
    variant: str,
    launches: Sequence[Launch],
    *,
    blocks: int | Sequence[int] = 2,
    seed: int = 0,
    protocol: Protocol | None = None,
) -> list[list[Result]]:
    """[launch][rank] results of `variant` ("one_shot", "two_shot" or "multimem").

    blocks: of every rank, or of each; protocol: one with something switched off, to see it fail.
    Raises DivergentGrids, Deadlock, and InvalidRun for shapes that no run has.
    """
    world, rows = len(launches[0].partials), len(launches[0].residual)
    grids = (blocks,) * world if isinstance(blocks, int) else tuple(blocks)
    shots = (
        "one_shot" if variant == "one_shot" else "two_shot" if variant == "multimem" else variant
    )
    run = Run(protocol or Protocol(shots), world, rows, grids, len(launches))
    memory = _Memory(run, variant, launches)
    waiting = {step: run.order.in_degree(step) for step in run.order}
    ready = [step for step, needs in waiting.items() if not needs]
    order, draw = run.order, random.Random(seed)
    while ready:
        # Draws without replacement until one can be taken; spinning threads stay in the list.
        for at in draw.sample(range(len(ready)), len(ready)):
            if memory.take(ready[at]):
                break
        else:
            raise Deadlock(f"nothing can go on; waiting: {'; '.join(map(str, ready))}")
        step = ready.pop(at)
        for later in order.successors(step):
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
    return memory.results


class _Memory:
    """Buffers and signal words of all ranks, what blocks hold in registers, and the results."""

    def __init__(self, run: Run, variant: str, launches: Sequence[Launch]) -> None:
        self.run, self.variant, self.launches = run, variant, launches
        first = launches[0].residual
        self.dtype = first.dtype
        self.buffers = [torch.full_like(first, torch.nan) for _ in range(run.world)]
        self.words: dict[tuple[int, int, int, int], int] = {}
        self.sums: dict[tuple[int, int, int], Tensor] = {}
        kept = len(first) if variant == "one_shot" else -(-len(first) // run.world)
        self.kept = kept
        self.results = [
            [
                Result(torch.full_like(first, torch.nan), first.new_zeros(kept, first.shape[1]))
                for _ in range(run.world)
            ]
            for _ in launches
        ]

    def take(self, step: Step) -> bool:
        """Does the step; False where its thread must spin. Raises DivergentGrids."""
        if step.kind in ("put", "wait"):
            at = self.run.word(step)
            word = self.run.signal(step, self.words.get(at, 0))
            if word is None:
                return False
            self.words[at] = word
        elif step.kind == "produce":
            self.buffers[step.rank].copy_(self.launches[step.launch].partials[step.rank])
        elif step.kind == "load":
            self._load(step)
        elif step.kind == "store":
            self.buffers[step.peer][step.row] = self._normed(step)
        elif step.kind == "consume" and self.variant != "one_shot":
            self.results[step.launch][step.rank].y.copy_(self.buffers[step.rank])
        return True

    def _load(self, step: Step) -> None:
        key = step.rank, step.launch, step.row
        part = self.buffers[step.peer][step.row].float()
        self.sums[key] = part if step.peer == 0 else self.sums[key] + part
        if step.peer < self.run.world - 1:
            return
        total = self.sums[key]
        if self.variant == "multimem":
            total = total.to(self.dtype).float()
        self.sums[key] = total + self.launches[step.launch].residual[step.row].float()
        result = self.results[step.launch][step.rank]
        own = step.row if self.variant == "one_shot" else step.row % self.kept
        result.residual[own] = self.sums[key].to(self.dtype)
        if self.variant == "one_shot":
            result.y[step.row] = self._normed(step)

    def _normed(self, step: Step) -> Tensor:
        launch = self.launches[step.launch]
        s = self.sums[step.rank, step.launch, step.row]
        y = s * torch.rsqrt(s.square().mean() + launch.eps)
        if launch.weight is not None:
            y = y * (launch.weight.float() + launch.shift)
        return y.to(self.dtype)
