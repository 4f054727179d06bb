"""What measuring the whole program says: which of the chosen rewrites may stay.

A rewrite equal in real arithmetic may move the outputs by rounding and no more; what goes further
is given back whatever the tolerance. Approximate rewrites are given back worst first until the
measured error of the outputs holds the tolerance.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ridgeline.ir.program import Program
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate
from ridgeline.passes.certify import relative_error
from ridgeline.passes.observe import outputs_of

ROUNDING_LIMIT = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
"""Output error that another order of roundings may cause in a deep model, by its narrowest dtype:
some thousand roundings. A wrong rewrite of one layer is rarely below it, and a certificate per site
looks closer; this is the net beneath."""

ErrorOf = Callable[[Sequence[Candidate]], float]


def settle(
    program: Program,
    captured: fx.GraphModule,
    module: fx.GraphModule,
    chosen: Sequence[Candidate],
    tolerance: float,
) -> tuple[list[Candidate], dict[Candidate, str], float]:
    """(kept, given back -> the reason, measured output error) of the `chosen`.

    captured: what the program was before `module`, its normal form; outputs are compared with its.
    """
    if not chosen:
        return [], {}, 0.0
    expected = outputs_of(captured, program)

    def error_of(candidates: Sequence[Candidate]) -> float:
        return relative_error(outputs_of(apply(module, candidates), program), expected)

    return back_off(chosen, tolerance, rounding_limit(module), error_of)


def rounding_limit(module: fx.GraphModule) -> float:
    """The output error that roundings explain, by the narrowest floating dtype in the graph."""
    dtypes = {v.dtype for n in module.graph.nodes if isinstance(v := n.meta.get("val"), Tensor)}
    return max((ROUNDING_LIMIT[d] for d in dtypes if d in ROUNDING_LIMIT), default=0.0)


def back_off(
    chosen: Sequence[Candidate], tolerance: float, rounding: float, error_of: ErrorOf
) -> tuple[list[Candidate], dict[Candidate, str], float]:
    """Keep what the limits allow; error_of: applies candidates and measures the outputs' error.

    Of the approximate rewrites the largest prefix, safest first, that holds `tolerance`.
    """
    lossy = [c for c in chosen if c.rewrite.exactness == "approximate"]
    fixed, back, measured = _within_rounding(
        [c for c in chosen if c not in lossy], rounding, error_of
    )
    ranked = sorted(lossy, key=lambda c: c.error)
    whole = error_of([*fixed, *ranked]) if ranked else measured
    low, high = 0, len(ranked)
    if whole <= tolerance or not ranked:
        low, measured = high, whole
    while high - low > 1:
        middle = (low + high) // 2
        error = error_of([*fixed, *ranked[:middle]])
        if error <= tolerance:
            low, measured = middle, error
        else:
            high = middle
    reason = f"given back: with it the measured output error exceeds {tolerance:g}"
    back |= dict.fromkeys(ranked[low:], reason)
    return [c for c in chosen if c not in back], back, measured


def _within_rounding(
    fixed: list[Candidate], limit: float, error_of: ErrorOf
) -> tuple[list[Candidate], dict[Candidate, str], float]:
    measured = error_of(fixed) if fixed else 0.0
    if measured <= limit:
        return fixed, {}, measured
    alone = {c: error_of([c]) for c in fixed}
    kept = [c for c in fixed if alone[c] <= limit]
    measured = error_of(kept) if kept else 0.0
    if measured > limit:
        kept, measured = [], 0.0
    reason = (
        "given back: equal in real arithmetic, and yet it moves the outputs by {:.1e}, where"
        " rounding explains {:.0e}"
    )
    return kept, {c: reason.format(alone[c], limit) for c in fixed if c not in kept}, measured
