"""How full a device is while a program runs, and which candidates leave more room.

    peak = weights and caches + max over steps of live bytes     (`ridgeline.cost_model.lifetimes`)

A candidate's kernel stores nothing of what its site's own nodes read, as attention its scores; at
the steps of its site it frees these bytes. Sites add.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from ridgeline.cost_model import Lifetimes, Replaced, Step, Target
from ridgeline.passes.base import Candidate


def _itself(candidate: Candidate) -> list[Replaced]:
    return [Replaced(candidate.site.nodes, candidate.site.outs)]


@dataclass(frozen=True, slots=True)
class Room:
    """copies: a candidate -> the sites that it stands for."""

    lifetimes: Lifetimes
    target: Target
    copies: Callable[[Candidate], list[Replaced]] = _itself

    def peak_bytes(self, times: Mapping[Candidate, int] | None = None) -> int:
        """Live bytes at the fullest step, with each candidate at so many of its sites."""
        sites = [s for c, n in (times or {}).items() for s in self.copies(c)[:n]]
        return int(self.lifetimes.having(sites).live_bytes(self.target).max(initial=0))

    def too_much(self, times: Mapping[Candidate, int], held_bytes: int) -> dict[Candidate, None]:
        """Of a choice that does not fit beside what is held, the candidates of the pass without
        which the fullest step is least; none where it fits, or every pass leaves that where it is.
        `relief` takes sites one by one, and knows no peak that is higher for a rewrite."""

        def peak(chosen: Mapping[Candidate, int]) -> int:
            return self.peak_bytes(chosen) + sum(n * c.memory_bytes for c, n in chosen.items())

        whole = peak(times)
        if held_bytes + whole <= self.target.memory_bytes:
            return {}
        names = dict.fromkeys(c.rewrite.name for c in times)
        less = {
            name: peak({c: n for c, n in times.items() if c.rewrite.name != name}) for name in names
        }
        least = min(less, key=lambda name: less[name], default="")
        if not names or less[least] >= whole:
            return {}
        return dict.fromkeys(c for c in times if c.rewrite.name == least)

    def relief(self, candidates: Iterable[Candidate]) -> "Relief":
        """What each candidate frees, at all the sites that it stands for."""
        live = self.lifetimes.live_bytes(self.target)
        known: dict[object, np.ndarray] = {}
        freed: dict[Candidate, np.ndarray] = {}
        for c in candidates:
            key = c.site.nodes, c.site.outs
            if key not in known and self.lifetimes.relieves(_itself(c)[0]):
                known[key] = live - self.lifetimes.having(self.copies(c)).live_bytes(self.target)
            if key in known and known[key].max() > 0:
                freed[c] = known[key]
        return Relief(live, freed)


@dataclass(frozen=True, slots=True)
class Relief:
    """live: bytes by step; freed: by candidate that frees any, by how much it lowers them."""

    live: np.ndarray
    freed: Mapping[Candidate, np.ndarray] = field(default_factory=dict)

    def steps(self, keys: Mapping[Candidate, str]) -> list[Step]:
        """Of the steps at which the same is freed, the fullest; `keys` of those that may be taken.
        No step below what is left anywhere, whatever is taken."""
        freed = {key: self.freed[c] for c, key in keys.items() if c in self.freed}
        if not freed:
            return [Step(int(self.live.max(initial=0)))]
        table = np.stack(list(freed.values()), axis=1)
        left = (self.live - np.maximum(table, 0).sum(axis=1)).max()
        fullest: dict[tuple[int, ...], int] = {}
        for step in np.flatnonzero(self.live >= left):
            row = tuple(map(int, table[step]))
            fullest[row] = max(int(self.live[step]), fullest.get(row, 0))
        return [
            Step(size, {k: n for k, n in zip(freed, row, strict=True) if n})
            for row, size in fullest.items()
        ]


def relief_of(
    candidates: Sequence[Candidate],
    counts: Mapping[Candidate, int],
    room: Room | None,
    held_bytes: int,
    always: bool,
) -> Relief | None:
    """What candidates free while the program runs; unless `always`, None where all of them fit
    beside it."""
    if room is None:
        return None
    more = sum(max(c.memory_bytes, 0) * counts[c] for c in candidates)
    if not always and held_bytes + room.peak_bytes() + more <= room.target.memory_bytes:
        return None
    return room.relief(candidates)


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
