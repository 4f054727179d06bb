"""Lines of a plan's account from candidates and refusals."""

from ridgeline.cost_model import Cost
from ridgeline.ir.provenance import source_of
from ridgeline.passes.base import Candidate, location
from ridgeline.passes.plan import Certificate, Decision, RefusedBy
from ridgeline.passes.propose import Refusal


def decision(
    candidate: Candidate,
    costs: tuple[Cost, Cost],
    phase: str,
    by: RefusedBy | None = None,
    reason: str = "",
    needed: str = "",
    certificate: Certificate | None = None,
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
        needed=needed,
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
        refused_by=refusal.by,
        reason=refusal.reject.reason,
        phase=phase,
        needed=refusal.reject.needed,
        source=source_of(refusal.reject.node),
    )
