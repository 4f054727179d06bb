"""Where decisions flip along the batch, by search on the decision itself.

A pass fires at a batch where it is taken at most of its sites. The search asks at 1, 2, 4, ... and
halves each interval between neighbours that differ down to one batch:

    fires(low) != fires(high)   ->   ask at the middle, until high = low + 1

so two flips between neighbouring powers of two, back and forth, are not seen. No formula of its own
stands behind it: every point is one answer of `ridgeline.passes.what_if`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ridgeline.cost_model import launch_queue
from ridgeline.passes.what_if import Answer

Ask = Callable[[int], Answer]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where a pass fires: (first, last) batches, in order. largest: the last batch that was asked
    and that fits the memory; capped: is it the machine's memory that ends there? form: that it
    takes most often at the first of these batches, "" where others are of another width."""

    fires: tuple[tuple[int, int], ...]
    largest: int
    capped: bool
    form: str = ""

    def __str__(self) -> str:
        end = f"to batch {self.largest}, the largest that fits" if self.capped else ""
        return ", ".join(filter(None, (" ".join(filter(None, self.words)), end)))

    @property
    def words(self) -> tuple[str, str]:
        """("below batch", "52"): what may stand once for several machines, and the rest."""
        if not self.fires:
            return "never", ""
        if self.fires == ((1, self.largest),):
            return "always", ""
        said = []
        for first, last in self.fires:
            if first == 1:
                said.append(("below batch", str(last + 1)))
            elif last == self.largest:
                said.append(("from batch", str(first)))
            else:
                said.append(("from batch", f"{first} to {last}"))
        start, number = said[0]
        return start, " and ".join([number, *(" ".join(pair) for pair in said[1:])])


def flips(ask: Ask, largest: int) -> dict[str, Ranges] | None:
    """Of each pass that fires anywhere up to batch `largest`; None where not even batch 1 fits."""
    grid = [1]
    while grid[-1] * 2 <= largest:
        grid.append(grid[-1] * 2)
    if not ask(1).fits:
        return None
    fitting = [batch for batch in grid if ask(batch).fits]
    last = fitting[-1]
    capped = len(fitting) < len(grid)
    if capped:
        last = _flip(lambda batch: ask(batch).fits, last, grid[len(fitting)]) - 1
        if last not in fitting:
            fitting.append(last)
    names = dict.fromkeys(name for batch in fitting for name in ask(batch).firing)
    found = {name: _ranges(name, ask, fitting) for name in names}
    return {
        name: Ranges(ranges, last, capped, _form(name, ask, ranges, fitting))
        for name, ranges in found.items()
        if ranges
    }


def _ranges(name: str, ask: Ask, grid: list[int]) -> tuple[tuple[int, int], ...]:
    def fires(batch: int) -> bool:
        firing = ask(batch).firing.get(name)
        return firing is not None and firing.most

    ranges: list[tuple[int, int]] = []
    start = 1 if fires(1) else None
    for low, high in itertools.pairwise(grid):
        if fires(low) == fires(high):
            continue
        at = _flip(fires, low, high)
        if start is None:
            start = at
        else:
            ranges.append((start, at - 1))
            start = None
    if start is not None:
        ranges.append((start, grid[-1]))
    return tuple(ranges)


def _form(name: str, ask: Ask, ranges: tuple[tuple[int, int], ...], grid: list[int]) -> str:
    """That it fires in first; "" where it fires in forms of other widths as well."""
    inside = [b for first, last in ranges for b in (first, *grid, last) if first <= b <= last]
    forms = [ask(batch).firing[name].form for batch in inside]
    return forms[0] if len({form.partition(" ")[0] for form in forms}) == 1 else ""


def host_bound_below(ask: Ask, largest: int) -> int | None:
    """The first batch at which the device, no longer the host, bounds kernels that are launched one
    by one; `largest` + 1 where there is none up to it, None for a CPU or where batch 1 does not
    fit."""

    def bound(batch: int) -> bool:
        answer = ask(batch)
        work = answer.work_after
        return work is not None and launch_queue(work, answer.target).host_bound

    first = ask(1)
    if first.target.kind == "cpu" or not first.fits:
        return None
    low = 1
    if not bound(low):
        return low
    while low < largest:
        high = min(2 * low, largest)
        if not bound(high):
            return _flip(bound, low, high)
        low = high
    return largest + 1


def _flip(state: Callable[[int], bool], low: int, high: int) -> int:
    """The first batch with the state of `high`, taking it to change once between the two."""
    before = state(low)
    while high - low > 1:
        middle = (low + high) // 2
        if state(middle) == before:
            low = middle
        else:
            high = middle
    return high
