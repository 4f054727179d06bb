"""The CPU kernel of LayerNorm and the rational function after it, against the law in float64."""

import pytest
import torch

pytest.importorskip("tvm", reason="CPU kernels need TVM")

import ridgeline.codegen.tvm.norm_rational  # noqa: F401 - registers the kernel
from ridgeline.ir.group_rational import FORMS, RationalError
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL, reference

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def operands(shape, groups, m, n, dtype, form):
    torch.manual_seed(0)
    size = shape[-1]
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(size), torch.randn(size).to(dtype)
    a, b = torch.randn(groups[0], m + 1), 0.3 * torch.rand(groups[1], n)
    if form == "abs_coefficients":  # which has a pole where the argument is below 0
        weight, bias = 0.1 * weight, bias.abs() + 1
    return x, weight, bias, a, b


def error(x, weight, bias, a, b, form: str, eps: float = 1e-5) -> float:
    y = LAYER_NORM_RATIONAL.overload(x, weight, bias, a, b, eps=eps, form=form)
    wide = [None if t is None else t.double() for t in (x, weight, bias, a, b)]
    expected = reference(*wide, eps=eps, form=form)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("shape", "groups", "m", "n"),
    [
        ((3, 5, 48), (4, 1), 5, 4),
        ((7, 23), (1, 1), 5, 4),
        ((130, 768), (8, 8), 5, 4),
        ((2, 2, 3, 24), (1, 3), 3, 1),
        ((40,), (5, 5), 0, 2),
        ((9, 1), (1, 1), 1, 1),
    ],
)
def test_agrees_with_float64(shape, groups, m, n, dtype, form):
    given = operands(shape, groups, m, n, dtype, form)
    assert error(*given, form=form) <= ROUNDING[dtype]


def test_strides_absent_parameters_and_threads():
    x, weight, bias, a, b = operands((300, 2 * 256), (8, 8), 5, 4, torch.float32, "abs_terms")
    x, weight, bias = x[:, ::2], weight[:256], bias[:256]
    for w, c in ((weight, bias), (None, bias), (weight, None), (None, None)):
        assert error(x, w, c, a, b, "abs_terms") <= 1e-6
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(LAYER_NORM_RATIONAL.overload(x, weight, bias, a, b, eps=1e-5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_extreme_rows():
    """Equal elements, large and tiny ones; eps decides where the variance is 0."""
    x, weight, bias, a, b = operands((5, 48), (4, 4), 5, 4, torch.float32, "abs_terms")
    x[0] = 3.0
    x[1] *= 1e6
    x[2] *= 1e-20
    x[3] = 0
    assert error(x, weight, bias, a, b, "abs_terms") <= 1e-6


def test_what_the_kernel_does_not_take_runs_by_the_law():
    x, weight, bias, a, b = (t.double() for t in operands((3, 24), (2, 2), 5, 4, torch.float32, ""))
    found = LAYER_NORM_RATIONAL.overload(x, weight, bias, a, b, eps=1e-5)
    assert torch.equal(found, reference(x, weight, bias, a, b, eps=1e-5))
    assert LAYER_NORM_RATIONAL.overload(x[:0], weight, bias, a, b, eps=1e-5).shape == (0, 24)
    with pytest.raises(RationalError, match="G a divisor of C"):
        LAYER_NORM_RATIONAL.overload(x, weight, bias, a.repeat(4, 1)[:5], b[:1], eps=1e-5)
