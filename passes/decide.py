"""One joint decision: candidates become options of the solver, its answer becomes `Decision`s."""

from collections.abc import Sequence

from torch import fx

from ridgeline.cost_model import Cost, Option, Target, estimate, solve
from ridgeline.passes.base import Candidate, location
from ridgeline.passes.plan import Decision
from ridgeline.passes.propose import Refusal


def choose(
    candidates: Sequence[Candidate],
    target: Target,
    *,
    tolerance: float,
    objective: str,
    sensitivity: float,
    weight_bytes: int,
) -> tuple[list[Candidate], list[tuple[Candidate, str, str]], dict[Candidate, tuple[Cost, Cost]]]:
    """Pick the candidates to apply on `target`.

    sensitivity: output error per unit of local error, measured by a probe. weight_bytes: of all
    weights of the program. Returns the chosen, the
    others with (refused_by, reason), and every candidate's predicted (before, after).
    """
    costs = {
        c: tuple(estimate(w, target, resident_bytes=weight_bytes) for w in (c.before, c.after))
        for c in candidates
    }
    worth = {c: _gain(*costs[c], c, objective) for c in candidates}
    useful = _worthwhile([c for c in candidates if worth[c] > 0], worth)
    touched: dict[fx.Node, list[int]] = {}
    for i, c in enumerate(useful):
        for node in c.site.nodes:
            touched.setdefault(node, []).append(i)
    options = [
        Option(
            key=str(i),
            gain=worth[c],
            memory_bytes=c.memory_bytes,
            error=c.error * sensitivity,
            conflicts=frozenset(str(j) for n in c.site.nodes for j in touched[n] if j != i),
        )
        for i, c in enumerate(useful)
    ]
    chosen_keys = solve(
        options,
        error_budget=tolerance,
        capacity_bytes=target.memory_bytes,
        base_memory_bytes=weight_bytes,
    ).chosen
    chosen = [c for i, c in enumerate(useful) if str(i) in chosen_keys]
    return chosen, _others(candidates, chosen, costs, worth, target, tolerance), costs


MARGIN = 1.05
"""What a form must win over a more exact one of its site, as a factor, to be worth its error."""


def _worthwhile(candidates: Sequence[Candidate], worth: dict[Candidate, float]) -> list[Candidate]:
    """The candidates without those whose error buys next to nothing at their site."""
    kept: set[Candidate] = set()
    best: dict[fx.Node, float] = {}
    for c in sorted(candidates, key=lambda c: c.error):
        out = c.site.outs[0]
        if out not in best or worth[c] > MARGIN * best[out]:
            kept.add(c)
            best[out] = worth[c]
    return [c for c in candidates if c in kept]


def _gain(before: Cost, after: Cost, candidate: Candidate, objective: str) -> float:
    """What the objective wins by the candidate, in its own unit."""
    if objective == "memory":
        return float(-candidate.memory_bytes)
    field = {"latency": "seconds", "energy": "energy_joules", "eflops": "eflops"}[objective]
    return getattr(before, field) - getattr(after, field)


def _others(candidates, chosen, costs, worth, target: Target, tolerance: float):
    """Why each site that got nothing got nothing; the forms beside a chosen one are no refusals."""
    taken = {n: c for c in chosen for n in c.site.nodes}
    sites: dict[fx.Node, list[Candidate]] = {}
    for c in candidates:
        sites.setdefault(c.site.outs[0], []).append(c)
    refused = []
    for out, forms in sites.items():
        if out in taken and taken[out] in forms:
            continue
        best = max(forms, key=lambda c: worth[c])
        before, after = costs[best]
        if worth[best] <= 0:
            by, reason = (
                "cost",
                (
                    f"not better on {target.name}: {before.seconds * 1e6:.1f} µs as it is,"
                    f" {after.seconds * 1e6:.1f} µs as {best.variant or best.rewrite.name}"
                ),
            )
        elif any(n in taken for n in best.site.nodes):
            by, reason = "overlap", f"its nodes are part of {taken[out].rewrite.name}"
        else:
            smallest = min(c.error for c in forms if worth[c] > 0)
            by, reason = (
                "budget",
                (
                    f"its error ({smallest:.2g} at the least) does not fit the tolerance"
                    f" {tolerance:g} beside the other rewrites"
                ),
            )
        refused.append((best, by, reason))
    return refused


def decision(
    candidate: Candidate,
    costs: tuple[Cost, Cost],
    phase: str,
    by=None,
    reason: str = "",
    certificate=None,
) -> Decision:
    """A candidate's line in the account."""
    return Decision(
        rewrite=candidate.rewrite.name,
        at=candidate.at,
        exactness=candidate.rewrite.exactness,
        refused_by=by,
        reason=reason,
        phase=phase,
        variant=candidate.variant,
        before=costs[0],
        after=costs[1],
        certificate=certificate,
    )


def refusal_decision(refusal: Refusal, phase: str) -> Decision:
    """The line of a site that never became a candidate."""
    return Decision(
        rewrite=refusal.rewrite.name,
        at=location(refusal.reject.node),
        exactness=refusal.rewrite.exactness,
        refused_by=refusal.by,  # pyright: ignore[reportArgumentType]
        reason=refusal.reject.reason,
        phase=phase,
        needed=refusal.reject.needed,
    )
