"""A group-wise rational function of LayerNorm, as one operation: what begins KAT's feed-forward.

Law, for x [..., C], with what `ridgeline.ir.layer_norm` and `ridgeline.ir.group_rational` define:

    y = round(P(z) / Q(z)),   z = (x - m) / sqrt(v + eps) * weight + bias

Everything is fp32 (fp64 where an operand is), and rounded once: z is not, where two operations
would round it to x's dtype. For inference: a training step keeps z for the rational function's
backward, so that nothing would be saved. Source: Yang and Wang, Kolmogorov-Arnold Transformer
(2024), section 4, whose block applies a rational to the output of its norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ridgeline.ir import group_rational, layer_norm
from ridgeline.ir.op import Op


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    numerator: Tensor,
    denominator: Tensor,
    *,
    eps: float,
    form: str = group_rational.FORMS[0],
) -> Tensor:
    """The law above in plain torch: x [..., C], weight and bias [C], numerator [1 or G, m+1],
    denominator [1 or G, n] -> [..., C], x.dtype. Raises RationalError for operands or a form that
    the rational function does not define."""
    group_rational.check_attributes(form, 0)
    group_rational.group_count(x, numerator, denominator)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = layer_norm.reference(wide, weight, bias, eps=eps)
    return group_rational.reference(z, numerator, denominator, form=form).to(x.dtype)


LAYER_NORM_RATIONAL = Op(
    schema=(
        "layer_norm_rational(Tensor x, Tensor? weight, Tensor? bias, Tensor numerator,"
        " Tensor denominator, *, float eps, str form='abs_terms') -> Tensor"
    ),
    reference=reference,
    fake=lambda x, weight, bias, numerator, denominator, *, eps, form="abs_terms": x.new_empty(
        x.shape
    ),
)

Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]
"""x, weight, bias, numerator, denominator of the law."""


def implement(key: str, kernel: Callable[[Operands, float, str], Tensor | None]) -> None:
    """Let `kernel` (operands, eps, form) compute the law for tensors of torch's dispatch key `key`;
    it is asked for what the law defines, and returns None where the reference is to run."""

    def run(*operands: Tensor | None, eps: float, form: str = group_rational.FORMS[0]):
        x, weight, bias, numerator, denominator = operands
        assert x is not None
        assert numerator is not None
        assert denominator is not None
        group_rational.check_attributes(form, 0)
        group_rational.group_count(x, numerator, denominator)
        return kernel((x, weight, bias, numerator, denominator), eps, form)

    LAYER_NORM_RATIONAL.implement(key, run)
