"""Fitted rational functions come as near as stated, in every form of the operation."""

import pytest
import torch

from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL
from ridgeline.ir.rational_fit import FUNCTIONS, FitError, fit

ERRORS = {
    "identity": 0.0,
    "silu": 5e-7,
    "gelu": 1.3e-3,
    "relu": 1.3e-2,
    "tanh": 1.5e-6,
    "sigmoid": 2e-9,
}
"""The largest error over [-3, 3] with degrees 5 and 4."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stated_error_holds_between_the_nodes(name, form):
    fitted = fit(name)
    x = torch.linspace(-3, 3, 20001, dtype=torch.float64)[:, None]
    coefficients = (
        torch.tensor([c], dtype=torch.float64) for c in (fitted.numerator, fitted.denominator)
    )
    y = GROUP_RATIONAL.overload(x, *coefficients, form=form)
    worst = (y - FUNCTIONS[name](x)).abs().max().item()
    assert worst <= 1.02 * fitted.error + 1e-13
    assert worst <= ERRORS[name] + 1e-13


def test_the_identity_is_exact():
    numerator = torch.tensor(fit("identity").numerator, dtype=torch.float32)
    assert numerator.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert fit("identity").denominator == (0.0, 0.0, 0.0, 0.0)


def test_denominators_are_even_and_not_negative():
    for name in FUNCTIONS:
        b = fit(name, 7, 6, 8.0).denominator
        assert b[::2] == (0.0, 0.0, 0.0)
        assert min(b) >= 0


@pytest.mark.parametrize(("m", "n"), [(0, 0), (3, 0), (2, 1), (9, 8)])
def test_degrees(m, n):
    fitted = fit(torch.cos, m, n, 2.0)
    assert (len(fitted.numerator), len(fitted.denominator)) == (m + 1, n)
    assert fitted.error < (1e-6 if m == 9 else 1.5)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("swish",), "'swish'"),
        (("silu", -1), "-1"),
        (("silu", 5, 4, float("inf")), "inf"),
        ((lambda x: 1 / (x - x),), "finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, found):
    with pytest.raises(FitError, match=found):
        fit(*arguments)
