"""Times of many calls on a machine that others use too.

Calls are timed in turn, in rounds. A sample in which threads of this process waited for a core for
more than WAITED of its time tells of others' work and does not count
(`ridgeline.cost_model.waiting`). Before each sample the process sleeps: schedulers give way to who
has not run. A call's time is the least of its samples; it is known once the AGREEING least ones, of
as many rounds, agree within SETTLED, and rounds go on for the calls that are not until the patience
is over.

    doubt = AGREEING-th least sample / least sample - 1
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ridgeline.cost_model.waiting import waited_seconds

WAITED = 0.02
AGREEING, SETTLED = 3, 0.05
PAUSE_S = 0.003

Call = Callable[[], object]


@dataclass(slots=True)
class Samples:
    """Seconds per call of the samples that count; disturbed: how many did not."""

    seconds: list[float] = field(default_factory=list)
    disturbed: int = 0

    @property
    def least(self) -> float:
        """inf where none counts."""
        return min(self.seconds, default=float("inf"))

    @property
    def doubt(self) -> float:
        """inf where too few count."""
        if len(self.seconds) < AGREEING:
            return float("inf")
        return sorted(self.seconds)[AGREEING - 1] / self.least - 1


def time_calls(
    calls: Sequence[Call],
    rounds: int,
    seconds: float,
    patience: float,
    clock: Callable[[], float] = time.perf_counter,
    waited: Callable[[], float] = waited_seconds,
) -> list[Samples]:
    """Time each in at least `rounds` samples of `seconds`, and up to `patience` seconds longer
    those that are not settled."""
    loops = [_loops(call, seconds, clock) for call in calls]
    found = [Samples() for _ in calls]
    for _ in range(rounds):
        for call, n, samples in zip(calls, loops, found, strict=True):
            _sample(call, n, samples, clock, waited)
    end = clock() + patience
    while (open_ := [i for i, s in enumerate(found) if s.doubt > SETTLED]) and clock() < end:
        for i in open_:
            _sample(calls[i], loops[i], found[i], clock, waited)
    return found


def _sample(
    call: Call,
    loops: int,
    samples: Samples,
    clock: Callable[[], float],
    waited: Callable[[], float],
) -> None:
    time.sleep(PAUSE_S)
    call()  # what the pause has cooled
    before, start = waited(), clock()
    for _ in range(loops):
        call()
    spent = clock() - start
    if waited() - before > WAITED * spent:
        samples.disturbed += 1
    else:
        samples.seconds.append(spent / loops)


def _loops(call: Call, seconds: float, clock: Callable[[], float]) -> int:
    call()
    start = clock()
    call()
    call()
    return max(1, int(seconds / max((clock() - start) / 2, 1e-7)))
