"""The account of one graph for torch's own tools: ``TORCH_LOGS="+ridgeline"``, ``TORCH_TRACE``.

torch takes any importable module's name in ``TORCH_LOGS``, so the standard logger of this module
is all it takes: one INFO line per group of equal sites, one DEBUG line per site. ``TORCH_TRACE``
gets the same decisions as a json artifact, which tlparse lists beside torch's own.
"""

import json
import logging

from torch._logging import trace_structured

from ridgeline.passes.plan import Plan
from ridgeline.passes.plan_text import sentence, summaries

log = logging.getLogger(__name__)


def record(plan: Plan, label: str) -> None:
    """Send the decisions about the graph `label` to torch's log and trace."""
    applied = [d for d in plan.applied if d.phase == label]
    refused = [d for d in plan.refused if d.phase == label]
    for sign, decisions in (("+", applied), ("-", refused)):
        for heading, members in summaries(decisions):
            log.info("%s: %s %s", label, sign, sentence(heading, members))
        for d in decisions:
            log.debug("%s: %s %s", label, sign, sentence(d.at, [d], detail=True))

    def payload() -> str:
        return json.dumps(
            {
                "graph": label,
                "target": plan.target,
                "tolerance": plan.tolerance,
                "applied": [d.to_dict() for d in applied],
                "refused": [d.to_dict() for d in refused],
                "predicted": plan.predicted.get(label),
            },
            default=str,
        )

    name = f"ridgeline_plan_{label.replace(' ', '_')}"
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=payload,
    )
