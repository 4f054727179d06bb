"""How far two estimates for one machine can be told apart: the interval of their difference.

    D = t(after) - t(before)
    doubt² = sum over kinds of kernel (OWN e_kind · (busy after - busy before)_kind)²
             + (LAUNCH · (fixed after - fixed before))²

What is wrong about a machine (its bandwidth, its floor of a launch) is wrong on both sides, and so
is what is wrong about one kind of kernel: only the difference of what each kind takes counts. What
two kinds share of their error cancels too; OWN is the rest. A rewrite is worth its name where its
gain exceeds the doubt. Errors that were measured count: a CPU's kinds have none until `ridgeline
calibrate` measures them, only its probe's spread. What is assumed of them for intervals would
refuse what wins: attention in raw operations, 2 x 8 heads of 512 x 64, gains 2.9x on two Zen 5
cores, where the estimates differ by less than the assumed error.

OWN was measured: for 868 shapes of an A100 and an L40S, measured ratios of 4- and 8-bit weights to
bf16 differ from this model's by a mean |ln| of 0.26 and 0.24, where the errors e of the two kinds
alone would add up to 0.34. On those shapes of the A100, margins from 0.2 to 0.3 lost least of the
time that always knowing better would have won (2.2 % in place of 5.7 % without).
"""

from collections import Counter
from math import sqrt

from ridgeline.cost_model.estimate import kernel_seconds, kind_of, measured_error
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import Work

OWN = 0.76
LAUNCH = 0.25
"""The floor of a launch is a figure of the target; assumed, for kernels that do more on the way."""


def doubt(before: Work, after: Work, target: Target, *, resident_bytes: float = 0.0) -> float:
    """Seconds by which t(before) - t(after) may be wrong; arguments as `estimate` takes them."""
    busy: Counter[str] = Counter()
    errors: dict[str, float] = {}
    fixed = 0.0
    for work, sign in ((before, -1.0), (after, 1.0)):
        for kernel, count in Counter(work.kernels).items():
            spent, floor, _ = kernel_seconds(kernel, target, resident_bytes)
            kind = kind_of(kernel)
            if target.kind != "cpu":  # a group of kernels has a floor of its own, measured with it
                spent, floor = spent + floor, 0.0
            busy[kind] += sign * count * spent
            fixed += sign * count * floor
            error = measured_error(kernel, target, resident_bytes)
            errors[kind] = max(errors.get(kind, 0.0), error)
    kinds = sum((OWN * errors[kind] * net) ** 2 for kind, net in busy.items())
    return sqrt(kinds + (LAUNCH * fixed) ** 2)
