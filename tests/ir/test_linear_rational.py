"""A linear layer with a rational function beside it: the law, and what it does not define."""

import pytest
import torch
import torch.nn.functional as F

from ridgeline.ir import group_rational
from ridgeline.ir.group_rational import FORMS, RationalError
from ridgeline.ir.linear_rational import LINEAR_RATIONAL, SIDES


def operands(dtype: torch.dtype = torch.float32, side: str = "output", bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 5, 12), (8, 12)))
    b = torch.randn(8, generator=generator).to(dtype) if bias else None
    groups = 2 if side == "output" else 3
    coefficients = torch.randn(groups, 6, generator=generator), torch.rand(groups, 4)
    return x, weight, b, *coefficients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_layer_and_the_function(dtype, side, form, bias):
    x, weight, b, *c = operands(dtype, side, bias)
    if form == "abs_coefficients":  # which has a pole where its argument is below 0
        x, weight, b = x.abs(), weight.abs(), None if b is None else b.abs()
    found = LINEAR_RATIONAL.overload(x, weight, b, *c, form=form, side=side)
    x, weight, b = (None if t is None else t.double() for t in (x, weight, b))
    wide = [t.double() for t in c]
    if side == "input":
        z = group_rational.reference(x, *wide, form=form)
        expected = F.linear(z.to(dtype).double(), weight, b)
    else:
        expected = group_rational.reference(F.linear(x, weight, b), *wide, form=form)
    unit = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= unit * expected.norm()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.ones(8, 11)}, "expects x"),
        ({"bias": torch.ones(1)}, "expects x"),
        ({"side": "both"}, "found shapes"),
        ({"side": "input"}, "G a divisor of C"),
        ({"numerator": torch.ones(3, 6)}, "G a divisor of C"),
        ({"form": "plain"}, "expects a form"),
    ],
)
def test_what_the_law_does_not_define_is_refused(change, said):
    names = ("x", "weight", "bias", "numerator", "denominator")
    given = dict(zip(names, operands(), strict=True)) | {"side": "output", "form": FORMS[0]}
    if change == {"side": "input"}:
        given["numerator"], given["denominator"] = torch.ones(5, 6), torch.ones(5, 4)
    given |= change
    placed = [given.pop(name) for name in names]
    with pytest.raises(RationalError, match=said):
        LINEAR_RATIONAL.overload(*placed, **given)
