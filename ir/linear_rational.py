"""A linear layer and a group-wise rational function beside it, as one operation.

Law, for x [..., K], W [N,K], b [N] and the rational function P/Q of `ridgeline.ir.group_rational`,
with everything in fp32 (fp64 where an operand is):

    side "output":   y = round(P(t) / Q(t)),   t = x W' + b           coefficients of N channels
    side "input":    y = round(z W' + b),      z = round(P(x) / Q(x))  coefficients of K channels

At the output t is not rounded, where two operations would round it to x's dtype; at the input z is,
as the products take operands of that dtype. For inference: a training step keeps t, or z, for the
backward anyway. Source: Yang and Wang, Kolmogorov-Arnold Transformer (2024), section 4, whose
feed-forward layer is rational, linear, rational, linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir import group_rational
from ridgeline.ir.op import Op

SIDES = ("output", "input")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numerator: Tensor,
    denominator: Tensor,
    form: str,
    side: str,
) -> None:
    """Raises RationalError for operands and attributes that the law does not define."""
    group_rational.check_attributes(form, 0)
    shapes = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    shapes = shapes and (bias is None or tuple(bias.shape) == (weight.shape[0],))
    if side not in SIDES or not shapes:
        found = [None if t is None else list(t.shape) for t in (x, weight, bias)]
        raise group_rational.RationalError(
            f"linear_rational expects x [..., K], weight [N,K], bias [N] and a side of"
            f" {' or '.join(SIDES)}; found shapes {found} and {side!r}"
        )
    channels = x if side == "input" else weight.t()
    group_rational.group_count(channels, numerator, denominator)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = group_rational.FORMS[0],
    side: str = SIDES[0],
) -> Tensor:
    """The law above in plain torch -> [..., N], x.dtype. Raises RationalError."""
    check(x, weight, bias, numerator, denominator, form, side)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    wide_bias = None if bias is None else bias.to(wide)
    if side == "input":
        x = group_rational.reference(x, numerator, denominator, form=form)
    y = F.linear(x.to(wide), weight.to(wide), wide_bias)
    if side == "output":
        y = group_rational.reference(y, numerator, denominator, form=form)
    return y.to(x.dtype)


LINEAR_RATIONAL = Op(
    schema=(
        "linear_rational(Tensor x, Tensor weight, Tensor? bias, Tensor numerator,"
        " Tensor denominator, *, str form='abs_terms', str side='output') -> Tensor"
    ),
    reference=reference,
    fake=lambda x, weight, bias, numerator, denominator, *, form="abs_terms", side="output": (
        x.new_empty((*x.shape[:-1], weight.shape[0]))
    ),
)
