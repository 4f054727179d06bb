"""How full a device is while a program runs, and which candidates leave more room, or less.

    peak = weights and caches + max over steps of live bytes     (`ridgeline.cost_model.lifetimes`)

A candidate's kernel stores nothing of what its site's own nodes read, as attention its scores; at
the steps of its site it frees these bytes. One that makes values earlier, as layers side by side,
or that reads what was formed on the way, takes more. Sites add, all but exactly.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import fx

from ridgeline.cost_model import Lifetimes, Replaced, Step, Target
from ridgeline.cost_model.lifetimes import Pieces
from ridgeline.passes.base import Candidate


def _itself(candidate: Candidate) -> list[Replaced]:
    return [Replaced(candidate.site.nodes, candidate.site.outs)]


@dataclass(frozen=True, slots=True)
class Room:
    """copies: a candidate -> the sites that it stands for."""

    lifetimes: Lifetimes
    target: Target
    copies: Callable[[Candidate], list[Replaced]] = _itself

    def live_bytes(self, times: Mapping[Candidate, int] | None = None) -> np.ndarray:
        """Live bytes by step, with each candidate at so many of its sites."""
        sites = [s for c, n in (times or {}).items() for s in self.copies(c)[:n]]
        return self.lifetimes.live_bytes(self.target, sites)

    def peak_bytes(self, times: Mapping[Candidate, int] | None = None) -> int:
        """The same at the fullest step."""
        return int(self.live_bytes(times).max(initial=0))

    def relief(self, candidates: Iterable[Candidate]) -> "Relief":
        """What each candidate frees, or takes, at all the sites that it stands for."""
        known: dict[object, Pieces] = {}
        freed: dict[Candidate, Pieces] = {}
        for c in candidates:
            key = c.site.nodes, c.site.outs
            if key not in known:
                known[key] = self.lifetimes.freed(self.copies(c), self.target)
            if known[key]:
                freed[c] = known[key]
        return Relief(self.live_bytes(), freed)


@dataclass(frozen=True, slots=True)
class Relief:
    """live: bytes by step; freed: by candidate that changes any, by how much it lowers them."""

    live: np.ndarray
    freed: Mapping[Candidate, Pieces] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """At the fullest step."""
        return int(self.live.max(initial=0))

    def frees(self, candidate: Candidate) -> bool:
        """Does it lower them anywhere?"""
        return any(size > 0 for _, _, size in self.freed.get(candidate, ()))

    def takes(self, candidate: Candidate) -> bool:
        """Does it raise them anywhere?"""
        return any(size < 0 for _, _, size in self.freed.get(candidate, ()))

    def no_less(self, candidate: Candidate, other: Candidate) -> bool:
        """Does it free as much as another at every step?"""
        mine, others = (self.freed.get(c, ()) for c in (candidate, other))
        steps = {step for first, end, _ in (*mine, *others) for step in (first, end)}

        def at(pieces: Pieces, step: int) -> int:
            return sum(size for first, end, size in pieces if first <= step < end)

        return mine == others or all(at(mine, step) >= at(others, step) for step in steps)

    def unexpected(self, times: Iterable[Candidate], live: np.ndarray) -> np.ndarray:
        """By how much more is alive, by step, than these candidates' sum says."""
        left = self.live.copy()
        for c in times:
            for first, end, size in self.freed.get(c, ()):
                left[first:end] -= size
        return np.maximum(live - left, 0)

    def charged(self, candidate: Candidate, more: np.ndarray) -> "Relief":
        """The same, where a candidate takes so many bytes more by step than was known."""
        mine = -more
        for first, end, size in self.freed.get(candidate, ()):
            mine[first:end] += size
        ends = [0, *(np.flatnonzero(np.diff(mine)) + 1).tolist(), len(mine)]
        runs = ((a, b, int(mine[a])) for a, b in itertools.pairwise(ends))
        pieces = tuple(run for run in runs if run[2])
        return replace(self, freed={**self.freed, candidate: pieces})

    def steps(self, keys: Mapping[Candidate, str]) -> list[Step]:
        """Of the steps at which the same is freed, the fullest; `keys` of those that may be taken.
        No step that stays below what is left anywhere, whatever is taken."""
        lowest, highest = self.live.copy(), self.live.copy()
        by_step: dict[int, dict[str, int]] = {}
        for c, key in keys.items():
            for first, end, size in self.freed.get(c, ()):
                (lowest if size > 0 else highest)[first:end] -= size
                for step in range(first, end):
                    by_step.setdefault(step, {})[key] = size
        fullest: dict[frozenset[tuple[str, int]], int] = {}
        for step in np.flatnonzero(highest >= lowest.max(initial=0)):
            row = frozenset(by_step.get(step, {}).items())
            fullest[row] = max(int(self.live[step]), fullest.get(row, 0))
        return [Step(size, dict(sorted(row))) for row, size in fullest.items()]


def corrected(
    relief: Relief, room: Room, times: Mapping[Candidate, int], worth: Mapping[Candidate, float]
) -> Relief:
    """What was known, and that a choice was found not to fit: sites may take more together than
    their sum, and what they do is charged to one of them, so that without it all is as before.

    It is the least of worth without which they take less at the fullest step, as halving finds it.
    """
    live = room.live_bytes(times)
    more, fullest = relief.unexpected(times, live), int(live.argmax())
    ordered = sorted(times, key=lambda c: -worth[c])
    few, many = 0, len(ordered)
    while many - few > 1:
        middle = (few + many) // 2
        some = {c: times[c] for c in ordered[:middle]}
        reached = relief.unexpected(some, room.live_bytes(some))[fullest] >= more[fullest]
        few, many = (few, middle) if reached else (middle, many)
    return relief.charged(ordered[many - 1], more)


def relief_of(
    candidates: Sequence[Candidate],
    counts: Mapping[Candidate, int],
    room: Room | None,
    held_bytes: int,
    always: bool,
) -> Relief | None:
    """What candidates free, or take, while the program runs; unless `always`, None where all of
    them fit beside it, but for what they take. Those that take more and free nothing are left out
    where they stand for several sites: they could be taken at all of them or none."""
    if room is None:
        return None
    more = sum(max(c.memory_bytes, 0) * counts[c] for c in candidates)
    if not always and held_bytes + room.peak_bytes() + more <= room.target.memory_bytes:
        return None
    relief = room.relief(candidates)
    kept = {c: p for c, p in relief.freed.items() if counts[c] == 1 or relief.frees(c)}
    return replace(relief, freed=kept)


def together(
    some: Iterable[int], useful: Sequence[Candidate], touched: Mapping[fx.Node, Sequence[int]]
) -> set[int]:
    """Those of which all copies are taken or none: they free memory only together, and so do those
    that conflict with them."""
    found, stack = set[int](), list(some)
    while stack:
        i = stack.pop()
        if i not in found:
            found.add(i)
            stack.extend(j for n in useful[i].site.nodes for j in touched[n])
    return found


def too_full(label: str, after: Mapping[str, Any], target: Target, training: bool) -> str:
    """A sentence where the target does not hold all that is alive at once; "" where it does.

    after: weights, caches and live bytes, as `graph_figures` names them. Of a training step the
    gradients, and what waits for them, are not in its graph: it says the least that is needed.
    """
    weights, caches, live = (after[k] for k in ("held_bytes", "state_bytes", "live_bytes"))
    needed = weights + caches + live
    if needed <= target.memory_bytes:
        return ""
    least = ", gradients not counted," if training else ""
    named = (("weights", weights), ("caches", caches), ("what else is alive", live))
    figures = [f"{name} {size / 1e9:.3g} GB" for name, size in named if size]
    return (
        f"{label}: does not fit {target.name}: {' + '.join(figures)} at the fullest step{least} is"
        f" {needed / 1e9:.3g} GB of {target.memory_bytes / 1e9:.3g} GB; choose a smaller batch or"
        " context, or a device with more memory"
    )
