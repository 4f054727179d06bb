"""Tensor parallelism: how one model is split over the ranks of a device mesh."""

from ridgeline.passes.parallel.plan import ParallelPlan, Unparallel, plan_parallel

__all__ = ["ParallelPlan", "Unparallel", "plan_parallel"]
