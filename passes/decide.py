"""One joint decision: candidates become options of the solver, its answer becomes `Decision`s."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from ridgeline.cost_model import Cost, Option, Target, Work, doubt, estimate, solve
from ridgeline.passes.base import Candidate
from ridgeline.passes.plan import RefusedBy
from ridgeline.passes.room import Room, relief_of, together

Objective = Literal["latency", "memory", "energy", "eflops"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A site that got nothing: its best candidate, why, and what would let it fire, if known. kind:
    the reason in a few words, without figures."""

    candidate: Candidate
    by: RefusedBy
    kind: str
    reason: str
    needed: str = ""


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
    relief = relief_of(candidates, counts, room, held, objective == "memory")
    peak = 0 if relief is None else int(relief.live.max(initial=0))
    too_large = held + peak > target.memory_bytes
    freeing = relief.freed if relief else {}  # also beside what holds more and then does not fit
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
    useful = _undominated(
        [
            c
            for c in candidates
            if worth[c] > max(price[c], doubts[c])
            or (too_large and c.memory_bytes < 0)
            or c in freeing
        ],
        worth,
        freeing,
    )
    touched: dict[fx.Node, list[int]] = {}
    for i, c in enumerate(useful):
        for node in c.site.nodes:
            touched.setdefault(node, []).append(i)
    whole = together({i for i, c in enumerate(useful) if c in freeing}, useful, touched)
    options = [
        Option(
            key=str(i),
            gain=(worth[c] - price[c]) * (n := counts[c] if i in whole else 1),
            memory_bytes=c.memory_bytes * n,
            error=c.error * sensitivity * n**0.5,
            conflicts=frozenset(str(j) for n in c.site.nodes for j in touched[n] if j != i),
            count=counts[c] // n,
        )
        for i, c in enumerate(useful)
    ]
    keys = {c: str(i) for i, c in enumerate(useful) if i in whole}
    taken = solve(
        options,
        error_budget=tolerance,
        capacity_bytes=target.memory_bytes,
        base_memory_bytes=held,
        steps=() if relief is None else relief.steps(keys),
        price_of_peak=1.0 if relief and objective == "memory" else 0.0,
    ).times
    times = {
        c: taken[str(i)] * (counts[c] if i in whole else 1)
        for i, c in enumerate(useful)
        if str(i) in taken
    }
    chosen = list(times)
    spent = sum(n * (c.error * sensitivity) ** 2 for c, n in times.items())

    def enough(error: float) -> float:
        """The tolerance under which a further error would fit."""
        return (spent + (error * sensitivity) ** 2) ** 0.5

    refused = _others(candidates, chosen, costs, worth, doubts, price, target, enough, objective)
    choice = Choice(chosen, refused, costs, worth, doubts, times)
    over = {} if room is None else room.too_much(times, held)
    if not over:
        return choice
    rest = choose(
        [c for c in candidates if c not in over],
        target,
        tolerance=tolerance,
        objective=objective,
        sensitivity=sensitivity,
        weight_bytes=weight_bytes,
        state_bytes=state_bytes,
        counts=counts,
        room=room,
    )
    reason = f"what is alive beside it does not fit {target.name} at the fullest step"
    needed = "choose a device with more memory"
    losses = [Loss(c, "budget", "does not fit the memory", reason, needed) for c in over]
    return replace(rest, refused=[*rest.refused, *losses], costs=costs, worth=worth, doubt=doubts)


NEXT_TO_NOTHING = 0.01
"""A relative difference of errors that is none: what was observed tells no more."""


def _undominated(
    candidates: Sequence[Candidate], worth: dict[Candidate, float], freeing: Collection[Candidate]
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
            and (d in freeing or c not in freeing)
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
    for c, spot in _spots(list(worth)).items():
        best[spot] = max(best.get(spot, 0.0), counts[c] * worth[c])
    whole = PRICE_OF_TOLERANCE * sum(best.values())
    share = {c: min(c.error * sensitivity / tolerance, 1.0) if c.error else 0.0 for c in worth}
    return {c: whole * share[c] ** 2 for c in worth}


Spot = tuple[str, tuple[fx.Node, ...]]
"""A pass and the values that it makes: what counts as one site with several forms."""


def _spots(candidates: Sequence[Candidate]) -> dict[Candidate, Spot]:
    """Sites with one first output are one spot; only one made of several that each stand alone too,
    as layers side by side, is a spot of its own."""
    alone = {(c.rewrite.name, c.site.outs[0]) for c in candidates if len(c.site.outs) == 1}

    def spot(c: Candidate) -> Spot:
        name, outs = c.rewrite.name, c.site.outs
        return name, outs if all((name, out) in alone for out in outs) else outs[:1]

    return {c: spot(c) for c in candidates}


def _gain(before: Cost, after: Cost, candidate: Candidate, objective: Objective) -> float:
    """What the objective wins by the candidate, in its own unit."""
    if objective == "memory":  # a second counts as one byte: it only decides between equals
        return before.seconds - after.seconds - candidate.memory_bytes
    return figure(before, objective) - figure(after, objective)


def _others(
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    costs: dict[Candidate, tuple[Cost, Cost]],
    worth: dict[Candidate, float],
    doubts: dict[Candidate, float],
    price: dict[Candidate, float],
    target: Target,
    enough: Callable[[float], float],
    objective: Objective,
) -> list[Loss]:
    """Why each site that got nothing got nothing; the forms beside a chosen one are no refusals."""
    taken, won = {n: c for c in chosen for n in c.site.nodes}, set(chosen)
    spots = _spots(candidates)
    sites: dict[Spot, list[Candidate]] = {}
    for c in candidates:
        sites.setdefault(spots[c], []).append(c)
    refused: list[Loss] = []
    for (name, outs), forms in sites.items():
        if not won.isdisjoint(forms):
            continue
        best = max(forms, key=lambda c: worth[c])
        owner = next((taken[n] for n in best.site.nodes if n in taken), None)
        covered = owner is not None and owner.rewrite.name == name
        if covered or len(outs) > 1:  # layers side by side: applied so, or each one says why not
            continue
        if worth[best] <= 0:
            refused.append(
                Loss(best, "cost", "not better", _no_gain(best, *costs[best], target, objective))
            )
        elif owner is not None and (rivals := _rivals(candidates, name, owner)):
            reason = _rivalry(rivals, owner, worth, costs, objective)
            needed = f"leave {owner.rewrite.name} out of passes= to take this one"
            kind = f"{owner.rewrite.name} is better there"
            refused.append(Loss(best, "cost", kind, reason, needed))
        elif owner is not None:
            reason = f"its nodes are part of {owner.rewrite.name} at {owner.at}"
            needed = f"leave {owner.rewrite.name} out of passes= to weigh this one alone"
            refused.append(Loss(best, "overlap", f"part of {owner.rewrite.name}", reason, needed))
        elif all(worth[c] <= doubts[c] for c in forms):
            reason = _no_clear_gain(best, *costs[best], doubts, target)
            refused.append(Loss(best, "cost", "gain within the doubt", reason))
        elif all(worth[c] <= price[c] for c in forms):
            sides = _sides(best, *costs[best], objective)
            spent = "its error" if best.error else f"{best.memory_bytes} bytes more"
            kind = f"wins too little for its {'error' if best.error else 'bytes'}"
            refused.append(Loss(best, "cost", kind, f"wins too little for {spent}: {sides}"))
        elif not best.error:
            reason = f"its {best.memory_bytes} bytes do not fit {target.name} beside the rest"
            needed = "choose a device with more memory"
            refused.append(Loss(best, "budget", "does not fit the memory", reason, needed))
        else:
            smallest = min(c.error for c in forms if worth[c] > doubts[c])
            reason = f"its error ({smallest:.2g} at the least) does not fit beside the others'"
            needed = f"pass tolerance={enough(smallest) * 1.05:.2g}"
            refused.append(Loss(best, "budget", "does not fit the tolerance", reason, needed))
    return refused


def _no_gain(
    candidate: Candidate, before: Cost, after: Cost, target: Target, objective: Objective
) -> str:
    """Why the candidate wins nothing."""
    if objective == "memory" and candidate.memory_bytes > 0:
        form = candidate.variant or candidate.rewrite.name
        return f"not smaller: {form} holds {candidate.memory_bytes} bytes more"
    return f"not better on {target.name}: {_sides(candidate, before, after, objective)}"


def _no_clear_gain(
    candidate: Candidate,
    before: Cost,
    after: Cost,
    doubts: dict[Candidate, float],
    target: Target,
) -> str:
    """Why the candidate may win nothing."""
    sides = _sides(candidate, before, after, "latency")
    gain, within = (before.seconds - after.seconds) * 1e6, doubts[candidate] * 1e6
    return (
        f"not surely better on {target.name}: {sides}; the gain of {gain:.1f} µs is within the"
        f" doubt of {within:.1f} µs about the two"
    )


ABOUT = 1.5
"""How much larger the error of a form may be that another is compared with."""


def _rivals(candidates: Sequence[Candidate], name: str, owner: Candidate) -> list[Candidate]:
    """The forms of the pass `name` that make the very values that `owner` makes."""
    return [c for c in candidates if c.rewrite.name == name and c.site.outs == owner.site.outs]


def _rivalry(
    rivals: Sequence[Candidate],
    owner: Candidate,
    worth: dict[Candidate, float],
    costs: dict[Candidate, tuple[Cost, Cost]],
    objective: Objective,
) -> str:
    """Both sides' numbers: of what was taken, and of the best rival about as exact, or else of the
    most exact one."""
    like = [c for c in rivals if c.error <= ABOUT * owner.error]
    best = max(like, key=lambda c: worth[c]) if like else min(rivals, key=lambda c: c.error)

    def told(c: Candidate) -> str:
        error = f" at an error of {c.error:.1g}" if c.error or owner.error else ""
        return f"{_figure(costs[c][1], objective)} as {c.variant or c.rewrite.name}{error}"

    return f"{owner.rewrite.name} is better there: {told(owner)}, {told(best)}"


def _sides(candidate: Candidate, before: Cost, after: Cost, objective: Objective) -> str:
    """Both sides' numbers, in the unit of the objective."""
    form = candidate.variant or candidate.rewrite.name
    return f"{_figure(before, objective)} as it is, {_figure(after, objective)} as {form}"


def figure(cost: Cost, objective: Objective) -> float:
    """What the objective makes small, in its own unit: seconds, bytes of weights, joules, FLOPs."""
    return getattr(cost, FIGURES[objective])


FIGURES: dict[Objective, str] = {
    "latency": "seconds", "memory": "weight_bytes", "energy": "energy_joules", "eflops": "eflops",
}  # fmt: skip


def _figure(cost: Cost, objective: Objective) -> str:
    if objective == "memory" and cost.weight_bytes:
        return f"{cost.weight_bytes / 2**10:.1f} KiB"
    unit, factor, field = {
        "energy": ("µJ", 1e6, "energy_joules"),
        "eflops": ("eMFLOPs", 1e-6, "eflops"),
    }.get(objective, ("µs", 1e6, "seconds"))
    return f"{getattr(cost, field) * factor:.1f} {unit}"
