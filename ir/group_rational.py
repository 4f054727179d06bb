"""Group-wise rational function: the activation of Kolmogorov-Arnold transformers as one operation.

Law, for channel c of group g = c // (C / G), with z = |x| in form "abs_terms" and z = x otherwise:

    y = P(x) / Q(x),   P(x) = sum_{i=0..m} a[g,i] x^i
    "abs_terms":         Q(x) = 1 + sum_{i=1..n} |b[g,i]| |x|^i       (>= 1; KAT's and FlashKAT's
                                                                       GPU kernels)
    "abs_coefficients":  Q(x) = 1 + sum_{i=1..n} |b[g,i]| x^i         (can reach 0; the same
                                                                       projects' plain torch code)
    "abs_sum":           Q(x) = 1 + |sum_{i=1..n} b[g,i] x^i|         (>= 1; safe Padé units)

These are three different functions; none may stand for another. With u = dy / Q, w = -y u:

    dx   = P'(x) u + w Q'(x)
    da_i = sum x^i u,          db_i = sum w dQ/db_i                    over all elements of a group

sign(0), which Q' takes of x and of the sum, and dQ/db of b, is `sign0`: 0 as autograd has it, 1 as
KAT's kernels do, without which a denominator that starts at 0 never learns.

x [..., C] of any strides; a [1 or G, m+1], b [1 or G, n]: one row serves every group. Arithmetic
is fp32 (fp64 where an operand is), so |x|^max(m,n) must stay below 3.4e38: |x| < 4.9e7 for m = 5.
y has x's dtype. Saved for the backward: x, a, b. Every order of derivative is defined.
Source: Yang and Wang, Kolmogorov-Arnold Transformer (2024), section 4; Molina et al., Padé
Activation Units (2020); Raffel and Chen, FlashKAT (2025).
"""

from typing import Any

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.op import Op

FORMS = ("abs_terms", "abs_coefficients", "abs_sum")
"""The denominators of the law; the first is what the published models were trained with."""


class RationalError(RidgelineError, ValueError):
    """Operands or attributes that the law does not define."""


def group_count(x: Tensor, numerator: Tensor, denominator: Tensor) -> int:
    """G, the number of groups.

    Raises RationalError unless x is floating [..., C], the coefficients are floating
    [1 or G, m+1 >= 1] and [1 or G, n >= 0], and G divides C.
    """
    operands = (x, numerator, denominator)
    fits = x.dim() >= 1 and numerator.dim() == denominator.dim() == 2
    fits = fits and all(t.is_floating_point() for t in operands) and numerator.shape[1] >= 1
    if fits:
        rows = (numerator.shape[0], denominator.shape[0])
        groups = max(rows)
        if all(r in (1, groups) for r in rows) and x.shape[-1] % groups == 0:
            return groups
    found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in operands)
    raise RationalError(
        "group_rational expects floating x [..., C], numerator [1 or G, m+1] and denominator"
        f" [1 or G, n] with G a divisor of C; found {found}"
    )


def check_attributes(form: str, sign0: int) -> None:
    """Raises RationalError unless form is one of FORMS and sign0 is 0 or 1."""
    if form not in FORMS or sign0 not in (0, 1):
        raise RationalError(
            f"group_rational expects a form of {', '.join(FORMS)} and sign0 of 0 or 1;"
            f" found {form!r} and {sign0!r}"
        )


def _sign(x: Tensor, sign0: int) -> Tensor:
    """sign(x) with sign(0) = sign0; a constant to autograd, as sign is."""
    sign = torch.sign(x.detach())
    return torch.where(sign == 0, torch.full_like(sign, sign0), sign) if sign0 else sign


def _grouped(x: Tensor, groups: int, wide: torch.dtype) -> Tensor:
    """x as [elements / C, G, C / G]."""
    return x.to(wide).reshape(-1, groups, x.shape[-1] // groups)


def _polynomial(coefficients: Tensor, x: Tensor) -> Tensor:
    """sum_i coefficients[g,i] x^i by Horner's rule; 0 where there are none."""
    if not coefficients.shape[1]:
        return torch.zeros_like(x)
    total = coefficients[:, -1, None].expand_as(x)
    for i in range(coefficients.shape[1] - 2, -1, -1):
        total = total * x + coefficients[:, i, None]
    return total


def _derivative(coefficients: Tensor) -> Tensor:
    """Coefficients [G, k-1] of the derivative of the polynomial with coefficients [G, k]."""
    powers = torch.arange(coefficients.shape[1], device=coefficients.device)
    return (coefficients * powers.to(coefficients.dtype))[:, 1:]


def _denominator(x: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """(z, c, T) with T = sum_{i>=1} c_i z^i; c [G, 1 + n] starts with 0."""
    z = x.abs() if form == "abs_terms" else x
    c = b if form == "abs_sum" else b.abs()
    c = torch.cat((torch.zeros_like(c[:, :1]) if c.shape[1] else c.new_zeros(len(c), 1), c), 1)
    return z, c, _polynomial(c, z)


def _wide(*operands: Tensor) -> torch.dtype:
    doubles = any(t.dtype == torch.float64 for t in operands)
    return torch.float64 if doubles else torch.float32


def reference(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, form: str = FORMS[0], sign0: int = 1
) -> Tensor:
    """The law above in plain torch; returns y, contiguous, of x's shape and dtype."""
    check_attributes(form, sign0)
    wide, groups = _wide(x, numerator, denominator), group_count(x, numerator, denominator)
    grouped = _grouped(x, groups, wide)
    _, _, total = _denominator(grouped, denominator.to(wide), form)
    bottom = 1 + (total.abs() if form == "abs_sum" else total)
    y = _polynomial(numerator.to(wide), grouped) / bottom
    return y.to(x.dtype).reshape(x.shape)


def backward_reference(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = FORMS[0],
    sign0: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da, db) of the law, each of its operand's shape and dtype; grad has x's shape."""
    check_attributes(form, sign0)
    wide, groups = _wide(x, numerator, denominator), group_count(x, numerator, denominator)
    a, b = numerator.to(wide), denominator.to(wide)
    grouped, above = _grouped(x, groups, wide), _grouped(grad, groups, wide)
    z, c, total = _denominator(grouped, b, form)
    bottom = 1 + (total.abs() if form == "abs_sum" else total)
    u = above / bottom
    w = -(_polynomial(a, grouped) / bottom) * u
    if form == "abs_sum":  # the one sign that stands in both derivatives
        w = w * _sign(total, sign0)
    inner = w * _sign(grouped, sign0) if form == "abs_terms" else w
    dx = _polynomial(_derivative(a), grouped) * u + _polynomial(_derivative(c), z) * inner
    da = _moments(u, grouped, numerator.shape)
    db = _moments(w * z, z, denominator.shape)
    if form != "abs_sum":
        db = db * _sign(b, sign0)
    return (
        dx.to(x.dtype).reshape(x.shape),
        da.to(numerator.dtype),
        db.to(denominator.dtype),
    )


def _moments(weight: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """sum weight x^i for i < shape[1], over elements and, where shape[0] is 1, over groups."""
    dims = (0, 1, 2) if shape[0] == 1 else (0, 2)
    sums = []
    for i in range(shape[1]):
        weight = weight * x if i else weight
        sums.append(weight.sum(dims).reshape(shape[0]))
    return torch.stack(sums, 1) if sums else weight.new_zeros(shape)


def _fake(x, numerator, denominator, *, form=FORMS[0], sign0=1):
    check_attributes(form, sign0)
    group_count(x, numerator, denominator)
    return x.new_empty(x.shape)


def _fake_backward(grad, x, numerator, denominator, *, form=FORMS[0], sign0=1):
    return (
        x.new_empty(x.shape),
        numerator.new_empty(numerator.shape),
        denominator.new_empty(denominator.shape),
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.attributes = keyword_only_inputs


def _backward(ctx, grad):
    return GROUP_RATIONAL_BACKWARD.overload(grad, *ctx.saved_tensors, **ctx.attributes)


def _double_backward(ctx, *grads: Tensor | None) -> tuple[Any, ...]:
    """Derivatives of the explicit formulas by autograd: rare, so it runs in plain torch."""
    operands = ctx.saved_tensors
    wanted = [t for t, needed in zip(operands, ctx.needs_input_grad, strict=True) if needed]
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        values = backward_reference(*operands, **ctx.attributes)
        pairs = [
            (value, grad)
            for value, grad in zip(values, grads, strict=True)
            if grad is not None and value.requires_grad
        ]
        found = torch.autograd.grad(
            [value for value, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=further,
            allow_unused=True,
        )
    results = iter(found)
    return tuple(next(results) if needed else None for needed in ctx.needs_input_grad)


GROUP_RATIONAL_BACKWARD = Op(
    schema=(
        "group_rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, *,"
        ' str form="abs_terms", int sign0=1) -> (Tensor, Tensor, Tensor)'
    ),
    reference=backward_reference,
    fake=_fake_backward,
    setup_context=_setup_context,
    backward=_double_backward,
)

GROUP_RATIONAL = Op(
    schema=(
        "group_rational(Tensor x, Tensor numerator, Tensor denominator, *,"
        ' str form="abs_terms", int sign0=1) -> Tensor'
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
