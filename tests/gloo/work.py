"""What ranks do in the tests; each function returns plain data."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from gloo.models import build, ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ridgeline

PLAIN: dict[str, Any] = {"target": "a100", "passes": (), "lowering": "eager", "fuse": "always"}
"""Nothing but the collectives is rewritten, and what is left runs op by op."""


class Sent(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def error(got: Tensor, expected: Tensor) -> float:
    """The relative Frobenius error."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def outputs(family: str, dtype: str, batch: int, length: int) -> dict[str, Any]:
    """Errors of logits and residuals against one process, and what was sent in a call."""
    model = build(family, getattr(torch, dtype))
    before = [p.clone() for p in model.parameters()]
    x = ids(batch, length)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True, use_cache=False)
        part = ridgeline.parallelize(model, **PLAIN)
        got = part(x, output_hidden_states=True, use_cache=False)
        part(x, use_cache=False)
        with Sent() as sent:
            logits = part(x, use_cache=False).logits
    residuals = zip(got.hidden_states, expected.hidden_states, strict=True)
    bytes_of = {id(p): p.nbytes for p in part.parameters()}
    return {
        "logits": error(logits, expected.logits),
        "residuals": max(error(a, b) for a, b in residuals),
        "hidden": len(expected.hidden_states),
        "sent": dict(sent.count),
        "applied": [d.rewrite for d in part.plan.applied],
        "refused": [d.reason for d in part.plan.refused],
        "notes": part.plan.notes,
        "bytes": sum(bytes_of.values()),
        "unchanged": all(map(torch.equal, before, model.parameters())),
    }


def generated(family: str) -> dict[str, Any]:
    """Tokens of a greedy generation, on the ranks and in one process."""
    model, x = build(family), ids(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    part = ridgeline.parallelize(model, **PLAIN)
    return {
        "got": part.generate(x, **options).tolist(),
        "expected": model.generate(x, **options).tolist(),
        "refused": [(d.phase, d.reason) for d in part.plan.refused],
        "fallbacks": part.fallbacks,
    }


def other_model(odd: int) -> None:
    """Rank `odd` has another checkpoint."""
    model = build("llama")
    if dist.get_rank() == odd:
        with torch.no_grad():
            model.model.norm.weight[3] += 1
    ridgeline.parallelize(model, **PLAIN)
