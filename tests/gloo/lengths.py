"""Calls of one compiled model with sequences of several lengths."""

import warnings
from typing import Any

import torch

from gloo.forms import WIDTH, by_dtensor, by_hand, entered, network, seeded, whole
from gloo.work import error
from ridgeline.passes.plan import Plan


def of_lengths(cases: list[tuple[str, bool | None, list[int]]]) -> list[dict[str, Any]]:
    """Calls of one compiled model with sequences of these lengths: what each plan says, and errors
    against one process. Lengths need not divide by the ranks."""
    warnings.simplefilter("ignore")
    told = []
    for form, dynamic, lengths in cases:
        plans: list[Plan] = []
        options = {"target": "a100", "fuse": "always", "on_plan": plans.append}
        sequence = form == "sequence"
        model = by_dtensor(sequence) if form in ("dtensor", "sequence") else by_hand(form)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="ridgeline", dynamic=dynamic, options=options)
        errors = []
        with torch.no_grad():
            for length in lengths:
                x = torch.randn(2, length, WIDTH, generator=seeded())
                got = fast(entered(x) if sequence else x)
                errors.append(error(whole(got), network()(x)))
        told.append(
            {
                "errors": errors,
                "plans": [
                    {
                        "applied": [d.rewrite for d in p.applied],
                        "refused": [d.reason for d in p.refused],
                        "notes": p.notes,
                    }
                    for p in plans
                ],
            }
        )
    return told
