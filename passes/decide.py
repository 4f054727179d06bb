"""One joint decision: candidates become options of the solver, its answer becomes `Decision`s."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ridgeline.cost_model import Cost, Option, Target, Work, doubt, estimate, solve
from ridgeline.passes.base import Candidate
from ridgeline.passes.losses import Loss, Objective, Spot, Weighing, figure, losses, spots
from ridgeline.passes.room import Relief, Room, corrected, relief_of, together


@dataclass(frozen=True, slots=True)
class Choice:
    """The chooser's answer.

    chosen: to be applied. refused: the sites that got nothing. costs: every candidate's predicted
    (before, after); worth: what the objective wins by it; doubt: by how much that may be wrong.
    times: how many sites of its count each of `chosen` is applied at.
    """

    chosen: list[Candidate]
    refused: list[Loss]
    costs: dict[Candidate, tuple[Cost, Cost]]
    worth: dict[Candidate, float]
    doubt: dict[Candidate, float]
    times: dict[Candidate, int] = field(default_factory=dict)

    def safer(self, given_back: Iterable[Candidate]) -> list[Candidate]:
        """For each site given back, its useful form of least error, where that is a safer one."""
        forms = []
        for back in given_back:
            useful = [
                c for c in self.worth if c.site is back.site and self.worth[c] > self.doubt[c]
            ]
            best = min(useful, key=lambda c: c.error, default=back)
            if best.error < back.error:
                forms.append(best)
        return forms


def choose(
    candidates: Sequence[Candidate],
    target: Target,
    *,
    tolerance: float,
    objective: Objective,
    sensitivity: float,
    weight_bytes: int,
    state_bytes: int = 0,
    counts: Mapping[Candidate, int] | None = None,
    room: Room | None = None,
) -> Choice:
    """Pick the candidates to apply on `target`.

    sensitivity: output error per unit of local error, measured by a probe; 0 where nothing is known
    of errors, and cost alone decides. weight_bytes: of all weights of the program; state_bytes: of
    its caches, which take device memory too. counts: how many sites alike each candidate stands for
    (`Option.count`); one each where it is None. room: what else is alive while it runs; None: not
    counted. Raises InfeasibleChoice where no choice fits the memory.
    """
    counts = counts or dict.fromkeys(candidates, 1)
    held = weight_bytes + state_bytes
    weighing = _weigh(candidates, target, objective, tolerance, sensitivity, weight_bytes, counts)
    limits = _Limits(tolerance, sensitivity, held, counts)
    first = relief_of(candidates, counts, room, held, objective == "memory")
    choice = _choice(replace(weighing, relief=first), limits)
    relief: Relief | None = None
    for _ in range(ROUNDS if room else 0):
        peak = room.peak_bytes(choice.times)
        more = sum(n * c.memory_bytes for c, n in choice.times.items())
        if held + more + peak <= target.memory_bytes:
            break
        if relief is None:
            relief = room.relief(candidates)
        else:
            relief = corrected(relief, room, choice.times, weighing.worth)
        choice = _choice(replace(weighing, relief=relief), limits)
    return choice


ROUNDS = 6
"""How often a choice that does not fit is made again, by what was seen of it."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """held: bytes of weights and caches."""

    tolerance: float
    sensitivity: float
    held: int
    counts: Mapping[Candidate, int]


def _weigh(
    candidates: Sequence[Candidate],
    target: Target,
    objective: Objective,
    tolerance: float,
    sensitivity: float,
    weight_bytes: int,
    counts: Mapping[Candidate, int],
) -> Weighing:
    known: dict[Work, Cost] = {}  # a model repeats its layers

    def cost(work: Work) -> Cost:
        if work not in known:
            known[work] = estimate(work, target, resident_bytes=weight_bytes)
        return known[work]

    costs = {c: (cost(c.before), cost(c.after)) for c in candidates}
    worth = {c: _gain(*costs[c], c, objective) for c in candidates}
    doubts = dict.fromkeys(candidates, 0.0)  # bytes and operations are counted
    if objective == "latency":
        pairs = {
            pair: doubt(*pair, target, resident_bytes=weight_bytes)
            for pair in dict.fromkeys((c.before, c.after) for c in candidates)
        }
        doubts = {c: pairs[c.before, c.after] for c in candidates}
    price = _price(worth, counts, sensitivity, tolerance)
    for c in candidates:
        if objective == "latency" and c.memory_bytes > 0:
            price[c] += PRICE_OF_MEMORY * costs[c][0].seconds
    return Weighing(target, objective, costs, worth, doubts, price)


def _choice(weighing: Weighing, limits: _Limits) -> Choice:
    """The best under these limits."""
    worth, price, relief, counts = weighing.worth, weighing.price, weighing.relief, limits.counts
    target, objective = weighing.target, weighing.objective
    too_large = limits.held + (relief.peak_bytes if relief else 0) > target.memory_bytes
    useful = _undominated(
        [
            c
            for c in worth
            if worth[c] > max(price[c], weighing.doubt[c])
            or (too_large and c.memory_bytes < 0)
            or (relief is not None and relief.frees(c))
        ],
        worth,
        relief,
    )
    touched: dict[fx.Node, list[int]] = {}
    for i, c in enumerate(useful):
        for node in c.site.nodes:
            touched.setdefault(node, []).append(i)
    changing = relief.freed if relief else {}
    whole = together({i for i, c in enumerate(useful) if c in changing}, useful, touched)
    options = [
        Option(
            key=str(i),
            gain=(worth[c] - price[c]) * (n := counts[c] if i in whole else 1),
            memory_bytes=c.memory_bytes * n,
            error=c.error * limits.sensitivity * n**0.5,
            conflicts=frozenset(str(j) for n in c.site.nodes for j in touched[n] if j != i),
            count=counts[c] // n,
        )
        for i, c in enumerate(useful)
    ]
    keys = {c: str(i) for i, c in enumerate(useful) if i in whole}
    taken = solve(
        options,
        error_budget=limits.tolerance,
        capacity_bytes=target.memory_bytes,
        base_memory_bytes=limits.held,
        steps=() if relief is None else relief.steps(keys),
        price_of_peak=1.0 if relief and objective == "memory" else 0.0,
    ).times
    times = {
        c: taken[str(i)] * (counts[c] if i in whole else 1)
        for i, c in enumerate(useful)
        if str(i) in taken
    }
    spent = sum(n * (c.error * limits.sensitivity) ** 2 for c, n in times.items())

    def enough(error: float) -> float:
        return (spent + (error * limits.sensitivity) ** 2) ** 0.5

    chosen = list(times)
    refused = losses(weighing, chosen, enough, limits.tolerance)
    return Choice(chosen, refused, weighing.costs, worth, weighing.doubt, times)


NEXT_TO_NOTHING = 0.01
"""A relative difference of errors that is none: what was observed tells no more."""


def _undominated(
    candidates: Sequence[Candidate], worth: Mapping[Candidate, float], relief: Relief | None
) -> list[Candidate]:
    """Without the forms beside which the same pass has one, for the same values, that wins more,
    takes no other nodes, holds no more memory and is as exact but for next to nothing."""
    sites: dict[tuple[str, tuple[fx.Node, ...]], list[Candidate]] = {}
    for c in candidates:
        sites.setdefault((c.rewrite.name, c.site.outs), []).append(c)

    def dominated(c: Candidate) -> bool:
        return any(
            worth[d] > worth[c]
            and set(d.site.nodes) <= set(c.site.nodes)
            and d.memory_bytes <= c.memory_bytes
            and d.error <= c.error * (1 + NEXT_TO_NOTHING)
            and (relief is None or relief.no_less(d, c))
            for d in sites[c.rewrite.name, c.site.outs]
        )

    return [c for c in candidates if not dominated(c)]


PRICE_OF_TOLERANCE = 0.05
"""What spending the whole tolerance must win, as a part of all that there is to win: less than that
the estimates cannot tell apart."""


PRICE_OF_MEMORY = 0.05
"""What holding more weights must win, as a part of the site's time: a second copy of a layer is not
taken for less than the estimates can tell apart."""


def _price(
    worth: dict[Candidate, float],
    counts: Mapping[Candidate, int],
    sensitivity: float,
    tolerance: float,
) -> dict[Candidate, float]:
    """What each candidate's error costs, in the unit of the objective, so that none is spent on
    next to nothing: errors add as squares, and the whole tolerance has the price above."""
    best: dict[Spot, float] = {}
    for c, spot in spots(list(worth)).items():
        best[spot] = max(best.get(spot, 0.0), counts[c] * worth[c])
    whole = PRICE_OF_TOLERANCE * sum(best.values())
    share = {c: min(c.error * sensitivity / tolerance, 1.0) if c.error else 0.0 for c in worth}
    return {c: whole * share[c] ** 2 for c in worth}


def _gain(before: Cost, after: Cost, candidate: Candidate, objective: Objective) -> float:
    """What the objective wins by the candidate, in its own unit."""
    if objective == "memory":  # a second counts as one byte: it only decides between equals
        return before.seconds - after.seconds - candidate.memory_bytes
    return figure(before, objective) - figure(after, objective)
