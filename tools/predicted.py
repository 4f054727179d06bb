"""Benchmarks against the cost model: what was predicted of each contender goes to the log.

Law of the log: `ridgeline.cost_model.record`. A benchmark gives its contenders' work; what is
predicted for this CPU stands beside the median of the rounds. Of whole programs, as `ridgeline
optimize` and `ridgeline verify` compile them, what `estimate` says of all kernels does.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ridgeline.cost_model import Target, Work, estimate
from ridgeline.cost_model.estimate import kernel_seconds, kind_of
from ridgeline.cost_model.record import append
from ridgeline.tools.timing import Timings, interleave

PROGRAM = "whole program"
"""The kind under which programs are logged."""
PROGRAM_ROUNDS = 3


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


def time_programs(
    title: str,
    runs: Mapping[str, tuple[Callable[..., Any], float]],
    inputs: list[Any],
    target: Target,
) -> Timings:
    """Time compiled programs side by side, and log them.

    runs: name -> (the program on `inputs`, predicted seconds); the first is the baseline.
    """
    calls = {name: _call(run, inputs) for name, (run, _) in runs.items()}
    timings = interleave(calls, baseline=next(iter(runs)), rounds=PROGRAM_ROUNDS)
    for name, (_, predicted) in runs.items():
        what = f"{title}: {name}"
        append(target.name, PROGRAM, what, predicted, timings.seconds(name).median)
    return timings


def _call(run: Callable[..., Any], inputs: list[Any]) -> Callable[[], Any]:
    return lambda: run(*inputs)
