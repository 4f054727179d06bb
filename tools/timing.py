"""Compare functions by wall time: interleaved in one process, reported as ratios to a baseline.

In round r every function i is sampled once; a sample is the mean time of `inner` calls,

    t[i, r] = (elapsed over inner[i] calls) / inner[i]                      in seconds,

and what is reported is the median over rounds of the per-round ratio t[base, r] / t[i, r], with
its quartiles: a machine that slows down slows both sides of the same round, so its drift cancels.
The order is rotated from round to round, so no function always runs after the same other one.

The ceiling that a memory-bound function is held against is measured too: `dram_read_bandwidth`.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.ir.errors import RidgelineError

Clock = Callable[[], float]


class TimingError(RidgelineError):
    """A comparison that cannot be made as asked."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The three quartiles and the least value of a sample."""

    median: float
    lower: float
    upper: float
    least: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarise `values`; of a single value all four figures are that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values))


@dataclass(frozen=True, slots=True)
class Timings:
    """Samples of several functions, round by round.

    baseline: the name that ratios are against.
    samples: per name, seconds per call, one entry a round; entries of one index share a round.
    inner: per name, how many calls one sample averages over.
    threads: torch's intra-op threads while it was measured.
    """

    baseline: str
    samples: Mapping[str, tuple[float, ...]]
    inner: Mapping[str, int]
    threads: int

    def seconds(self, name: str) -> Spread:
        """Return the spread of seconds per call of `name`."""
        return Spread.of(list(self.samples[name]))

    def speedup(self, name: str) -> Spread:
        """Return the spread of baseline time over `name`'s time; above 1, `name` is faster."""
        pairs = zip(self.samples[self.baseline], self.samples[name], strict=True)
        return Spread.of([base / own for base, own in pairs])

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain values for JSON; seconds per call."""
        return {
            "baseline": self.baseline,
            "threads": self.threads,
            "inner": dict(self.inner),
            "samples": {name: list(values) for name, values in self.samples.items()},
        }

    def table(
        self, title: str = "", bytes_read: Mapping[str, int] | None = None, ceiling: float = 0.0
    ) -> Table:
        """Return a table of the times and of the speed-ups against the baseline, by name.

        bytes_read: per name, the bytes one call must read; with `ceiling` (bytes per second, of
            `dram_read_bandwidth`) it adds the fraction of the machine's ceiling reached.

        Raises TimingError if only one of the two is given.
        """
        if bool(bytes_read) != (ceiling > 0):
            raise TimingError("bytes_read and a positive ceiling should be given together")
        rounds = len(self.samples[self.baseline])
        # Text, not markup: rich would take "[quartiles]", or a name like "x[int4]", as a style.
        caption = Text(f"median [quartiles] of {rounds} interleaved rounds, ")
        caption.append(f"{self.threads} torch threads")
        table = Table(title=Text(title) if title else None, caption=caption)
        table.add_column("")
        table.add_column("time per call", justify="right")
        table.add_column("least", justify="right")
        table.add_column(Text(f"speed-up over {self.baseline}"), justify="right")
        if bytes_read:
            table.add_column("read rate", justify="right")
            table.add_column(f"of {ceiling / 1e9:.1f} GB/s", justify="right")
        for name in self.samples:
            time_, ratio = self.seconds(name), self.speedup(name)
            row = [
                name,
                f"{_format(time_.median)} [{_format(time_.lower)}, {_format(time_.upper)}]",
                _format(time_.least),
                "baseline"
                if name == self.baseline
                else f"{ratio.median:.2f}x [{ratio.lower:.2f}, {ratio.upper:.2f}]",
            ]
            if bytes_read:
                rate = bytes_read[name] / time_.median if name in bytes_read else None
                row.append("" if rate is None else f"{rate / 1e9:.1f} GB/s")
                row.append("" if rate is None else f"{rate / ceiling:.0%}")
            table.add_row(*map(Text, row))
        return table

    def print(self, title: str = "", console: Console | None = None) -> None:
        """Print `table(title)`."""
        (console or Console()).print(self.table(title))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 21,
    seconds_per_sample: float = 0.02,
    inner: int | None = None,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time `functions` side by side, and return every sample.

    functions: each called with no argument, and to be finished when it returns (a GPU function
        synchronises itself). Each is called at least twice first, outside the samples.
    rounds: samples per function.
    seconds_per_sample: how long a sample should take; the number of calls is set from it, for
        each function apart, unless `inner` fixes it for all.
    clock: seconds, monotonic.

    Raises TimingError if `baseline` is not a name in `functions`, or a number is not positive.
    """
    if baseline not in functions:
        raise TimingError(f"baseline should be one of {sorted(functions)}, but it is {baseline!r}")
    if rounds < 1 or seconds_per_sample <= 0 or (inner is not None and inner < 1):
        raise TimingError(
            "rounds, inner and seconds_per_sample should be positive, but they are "
            f"{rounds}, {inner} and {seconds_per_sample}"
        )
    calls: dict[str, int] = {}
    for name, function in functions.items():
        _sample(function, 1, clock)
        once = _sample(function, 1, clock)
        calls[name] = inner or _calls_for(function, once, seconds_per_sample, clock)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(functions[name], calls[name], clock))
    return Timings(
        baseline=baseline,
        samples={name: tuple(values) for name, values in samples.items()},
        inner=calls,
        threads=torch.get_num_threads(),
    )


def dram_read_bandwidth(
    megabytes: int = 512, rounds: int = 9, clock: Clock = time.perf_counter
) -> float:
    """Return the rate, in bytes per second, at which this CPU reads memory, with torch's threads.

    It reads a buffer of `megabytes` (10^6 bytes, to be several times the last cache) front to
    back `rounds` times after one warm-up and takes the best: a ceiling, so the least disturbed
    reading counts. The read is torch's vectorised sum of float32, one addition per four bytes.
    """
    # Written, not zeros: pages that were never written all map to one page of zeros.
    buffer = torch.ones(megabytes * 1_000_000 // 4, dtype=torch.float32)
    buffer.sum()
    best = min(_sample(buffer.sum, 1, clock) for _ in range(rounds))
    return buffer.numel() * buffer.element_size() / best


def _calls_for(
    function: Callable[[], object], once: float, seconds_per_sample: float, clock: Clock
) -> int:
    """Return how many calls fill a sample; the estimate is refined on ten calls at most."""
    probe = min(10, max(1, int(seconds_per_sample / once))) if once > 0 else 10
    each = _sample(function, probe, clock)
    if each <= 0:
        raise TimingError(
            f"{probe} calls took no time that the clock can show; give `inner` instead"
        )
    return max(1, round(seconds_per_sample / each))


def _sample(function: Callable[[], object], inner: int, clock: Clock) -> float:
    """Return seconds per call, over `inner` calls."""
    start = clock()
    for _ in range(inner):
        function()
    return (clock() - start) / inner


def _format(seconds: float) -> str:
    """Write a time with three figures and the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
