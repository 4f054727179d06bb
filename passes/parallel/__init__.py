"""Tensor parallelism: how one model is split over the ranks of a device mesh, and run there."""

from ridgeline.passes.parallel.agree import RankLost, RankMismatch
from ridgeline.passes.parallel.compiler import InferenceOnly
from ridgeline.passes.parallel.layouts import Layout, LayoutError
from ridgeline.passes.parallel.parallelize import parallelize
from ridgeline.passes.parallel.plan import ParallelPlan, Unparallel, plan_parallel

__all__ = [
    "InferenceOnly",
    "Layout",
    "LayoutError",
    "ParallelPlan",
    "RankLost",
    "RankMismatch",
    "Unparallel",
    "parallelize",
    "plan_parallel",
]
