"""Benchmarks against the cost model: what was predicted of each contender goes to the log.

Law of the log: `ridgeline.cost_model.record`. A benchmark gives its contenders' work; what is
predicted for this CPU stands beside the median of the rounds.
"""

from collections.abc import Mapping

from ridgeline.cost_model import Target, Work, estimate
from ridgeline.cost_model.estimate import kernel_seconds, kind_of
from ridgeline.cost_model.record import append
from ridgeline.tools.timing import Timings


def log_timings(
    title: str,
    timings: Timings,
    works: Mapping[str, Work],
    target: Target,
    resident_bytes: float = 0.0,
) -> None:
    """Log the contenders that `works` names; the others' work is not known.

    resident_bytes: as in `estimate`, the weights that a benchmark walks through between two uses of
    one.
    """
    for name, work in works.items():
        cost = estimate(work, target, resident_bytes=resident_bytes)
        longest = max(work.kernels, key=lambda k: sum(kernel_seconds(k, target)[:2]))
        what = f"{title}: {name}"
        append(target.name, kind_of(longest), what, cost.seconds, timings.seconds(name).median)
