"""Why the sites that got nothing got nothing, with both sides' numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ridgeline.cost_model import Cost, Target
from ridgeline.passes.base import Candidate
from ridgeline.passes.plan import RefusedBy
from ridgeline.passes.room import Relief

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
class Weighing:
    """What was known of every candidate: predicted (before, after), what the objective wins by it,
    by how much that may be wrong, and what its error costs. relief: of memory, where it is
    short."""

    target: Target
    objective: Objective
    costs: Mapping[Candidate, tuple[Cost, Cost]]
    worth: Mapping[Candidate, float]
    doubt: Mapping[Candidate, float]
    price: Mapping[Candidate, float]
    relief: Relief | None = None


Spot = tuple[str, tuple[fx.Node, ...]]
"""A pass and the values that it makes: what counts as one site with several forms."""


def spots(candidates: Sequence[Candidate]) -> dict[Candidate, Spot]:
    """Sites with one first output are one spot; only one made of several that each stand alone too,
    as layers side by side, is a spot of its own."""
    alone = {(c.rewrite.name, c.site.outs[0]) for c in candidates if len(c.site.outs) == 1}

    def spot(c: Candidate) -> Spot:
        name, outs = c.rewrite.name, c.site.outs
        return name, outs if all((name, out) in alone for out in outs) else outs[:1]

    return {c: spot(c) for c in candidates}


def losses(
    weighing: Weighing,
    chosen: Sequence[Candidate],
    enough: Callable[[float], float],
    tolerance: float,
) -> list[Loss]:
    """Why each site that got nothing got nothing; the forms beside a chosen one are no refusals.

    enough: the tolerance under which a further error would fit.
    """
    taken, won = {n: c for c in chosen for n in c.site.nodes}, set(chosen)
    sites: dict[Spot, list[Candidate]] = {}
    for c, spot in spots(list(weighing.worth)).items():
        sites.setdefault(spot, []).append(c)
    values: dict[Spot, list[Candidate]] = {}
    for c in weighing.worth:
        values.setdefault((c.rewrite.name, c.site.outs), []).append(c)
    refused: list[Loss] = []
    for (name, outs), forms in sites.items():
        if not won.isdisjoint(forms):
            continue
        best = max(forms, key=lambda c: weighing.worth[c])
        owner = next((taken[n] for n in best.site.nodes if n in taken), None)
        covered = owner is not None and owner.rewrite.name == name
        if covered or len(outs) > 1:  # layers side by side: applied so, or each one says why not
            continue
        # The forms of the pass that make the very values that the owner makes.
        rivals = [] if owner is None else values.get((name, owner.site.outs), [])
        refused.append(_loss(weighing, forms, best, owner, rivals, enough, tolerance))
    return refused


def _loss(
    weighing: Weighing,
    forms: Sequence[Candidate],
    best: Candidate,
    owner: Candidate | None,
    rivals: Sequence[Candidate],
    enough: Callable[[float], float],
    tolerance: float,
) -> Loss:
    """Why a site got nothing. owner: what has a node of its best form."""
    w, target = weighing, weighing.target
    if w.worth[best] <= 0:
        return Loss(best, "cost", "not better", _no_gain(w, best))
    if owner is not None and rivals:
        needed = f"leave {owner.rewrite.name} out of passes= to take this one"
        kind = f"{owner.rewrite.name} is better there"
        return Loss(best, "cost", kind, _rivalry(w, rivals, owner), needed)
    if owner is not None:
        reason = f"its nodes are part of {owner.rewrite.name} at {owner.at}"
        needed = f"leave {owner.rewrite.name} out of passes= to weigh this one alone"
        return Loss(best, "overlap", f"part of {owner.rewrite.name}", reason, needed)
    if all(w.worth[c] <= w.doubt[c] for c in forms):
        return Loss(best, "cost", "gain within the doubt", _no_clear_gain(w, best))
    if all(w.worth[c] <= w.price[c] for c in forms):
        spent = "its error" if best.error else f"{best.memory_bytes} bytes more"
        kind = f"wins too little for its {'error' if best.error else 'bytes'}"
        return Loss(best, "cost", kind, f"wins too little for {spent}: {_sides(w, best)}")
    smallest = min(c.error for c in forms if w.worth[c] > w.doubt[c])
    takes = w.relief is not None and w.relief.takes(best)
    if not best.error or (takes and enough(smallest) <= tolerance):
        reason = f"its {best.memory_bytes} bytes do not fit {target.name} beside the rest"
        if takes:
            reason = f"what is alive beside it does not fit {target.name} at the fullest step"
        needed = "choose a device with more memory"
        return Loss(best, "budget", "does not fit the memory", reason, needed)
    reason = f"its error ({smallest:.2g} at the least) does not fit beside the others'"
    needed = f"pass tolerance={enough(smallest) * 1.05:.2g}"
    return Loss(best, "budget", "does not fit the tolerance", reason, needed)


def _no_gain(weighing: Weighing, candidate: Candidate) -> str:
    """Why the candidate wins nothing."""
    if weighing.objective == "memory" and candidate.memory_bytes > 0:
        form = candidate.variant or candidate.rewrite.name
        return f"not smaller: {form} holds {candidate.memory_bytes} bytes more"
    return f"not better on {weighing.target.name}: {_sides(weighing, candidate)}"


def _no_clear_gain(weighing: Weighing, candidate: Candidate) -> str:
    """Why the candidate may win nothing."""
    before, after = weighing.costs[candidate]
    gain, within = (before.seconds - after.seconds) * 1e6, weighing.doubt[candidate] * 1e6
    return (
        f"not surely better on {weighing.target.name}: {_sides(weighing, candidate)}; the gain of"
        f" {gain:.1f} µs is within the doubt of {within:.1f} µs about the two"
    )


ABOUT = 1.5
"""How much larger the error of a form may be that another is compared with."""


def _rivalry(weighing: Weighing, rivals: Sequence[Candidate], owner: Candidate) -> str:
    """Both sides' numbers: of what was taken, and of the best rival about as exact, or else of the
    most exact one."""
    worth = weighing.worth
    like = [c for c in rivals if c.error <= ABOUT * owner.error]
    best = max(like, key=lambda c: worth[c]) if like else min(rivals, key=lambda c: c.error)

    def told(c: Candidate) -> str:
        error = f" at an error of {c.error:.1g}" if c.error or owner.error else ""
        after = _figure(weighing.costs[c][1], weighing.objective)
        return f"{after} as {c.variant or c.rewrite.name}{error}"

    return f"{owner.rewrite.name} is better there: {told(owner)}, {told(best)}"


def _sides(weighing: Weighing, candidate: Candidate) -> str:
    """Both sides' numbers, in the unit of the objective."""
    form = candidate.variant or candidate.rewrite.name
    before, after = (_figure(cost, weighing.objective) for cost in weighing.costs[candidate])
    return f"{before} as it is, {after} as {form}"


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
