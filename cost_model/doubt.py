"""How far two estimates for one machine can be told apart: the interval of their difference.

    D = t(after) - t(before)
    doubt² = sum over kinds of kernel (OWN e_kind · (t after - t before)_kind)²
    a CPU's: the same of busy times, + (LAUNCH · (dispatch after - dispatch before))²

What is wrong about a machine (its bandwidth, its floor of a launch) is wrong on both sides, and so
is what is wrong about one kind of kernel: only the difference of what each kind takes counts. What
two kinds share of their error cancels too; OWN is the rest. A rewrite is worth its name where its
gain exceeds the doubt. e is a mean error that was measured: a GPU's by the interval of the kind's
law, a CPU's kinds have none until `ridgeline calibrate` measures them, only its probe's spread.
What is assumed of them for intervals would refuse what wins: attention in raw operations, 2 x 8
heads of 512 x 64, gains 2.9x on two Zen 5 cores, where the estimates differ by less than the
assumed error.

OWN was measured on ratios of 4- and 8-bit weights to bf16, of 1329 shapes of an A100 and an L40S
that were left out of the fit as machines and 330 that were left out as shapes: their mean |ln
(measured / predicted)| is 0.55 to 0.62 and 0.76 to 1.02 of what the errors of the two kinds add up
to. Intervals of machines that were not measured are wide on purpose, hence the smaller share. On
the A100 left out, margins of 0.5 to 0.76 lost 0.6 to 1.6 % of the time that always knowing better
would have won, none 5 to 7 %.
"""

from collections import Counter
from math import sqrt

from ridgeline.cost_model.estimate import kernel_seconds, kind_of, measured_error
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.work import Work

OWN = 0.76
LAUNCH = 0.25
"""What a CPU dispatches is a figure of the target; assumed, for kernels that do more on the way."""


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
