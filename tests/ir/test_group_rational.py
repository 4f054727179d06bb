"""The rational function: its law in three forms, its derivatives, its refusals."""

import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from ridgeline.ir.group_rational import (
    FORMS,
    GROUP_RATIONAL,
    GROUP_RATIONAL_BACKWARD,
    RationalError,
    reference,
)

rational = GROUP_RATIONAL.overload


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def coefficients(groups: tuple[int, int], m: int, n: int, dtype=torch.float64):
    return (
        torch.randn(groups[0], m + 1, dtype=dtype),
        0.3 * torch.rand(groups[1], n, dtype=dtype) * torch.randn(groups[1], n).sign(),
    )


def literally(x: Tensor, a: Tensor, b: Tensor, form: str) -> Tensor:
    """The law element by element, as it is written."""
    groups = max(len(a), len(b))
    out = torch.empty(x.shape, dtype=torch.float64)
    for at in itertools.product(*map(range, x.shape)):
        v, g = x[at].double(), at[-1] // (x.shape[-1] // groups)
        ag, bg = a[g % len(a)].double(), b[g % len(b)].double()
        top = sum(c * v**i for i, c in enumerate(ag))
        if form == "abs_terms":
            bottom = 1 + sum(abs(c) * abs(v) ** i for i, c in enumerate(bg, 1))
        elif form == "abs_coefficients":
            bottom = 1 + sum(abs(c) * v**i for i, c in enumerate(bg, 1))
        else:
            bottom = 1 + abs(sum(c * v**i for i, c in enumerate(bg, 1)))
        out[at] = top / bottom
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [(4, 4), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize(("m", "n"), [(5, 4), (0, 3), (3, 0), (1, 6)])
def test_the_law(form, groups, m, n):
    x = torch.rand(3, 2, 12, dtype=torch.float64) * 2 - 0.5
    a, b = coefficients(groups, m, n)
    y = rational(x, a, b, form=form)
    torch.testing.assert_close(y, literally(x, a, b, form))


def test_the_forms_differ():
    x = torch.linspace(-3, 3, 24)
    a, b = coefficients((2, 2), 5, 4, torch.float32)
    results = [rational(x, a, b, form=form) for form in FORMS]
    for one, other in itertools.combinations(results, 2):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [(3, 3), (1, 3), (3, 1)])
def test_first_and_second_derivatives(form, groups):
    x = (torch.rand(2, 5, 6, dtype=torch.float64) + 0.2).requires_grad_()
    x = (x * torch.randn(2, 5, 6).sign()).detach().requires_grad_() if form != FORMS[1] else x
    a, b = (t.requires_grad_() for t in coefficients(groups, 3, 2))

    def run(*operands: Tensor) -> Tensor:
        return rational(*operands, form=form, sign0=0)

    assert torch.autograd.gradcheck(run, (x, a, b))
    assert torch.autograd.gradgradcheck(run, (x, a, b))


def test_a_third_derivative_follows_from_the_law():
    x = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    a, b = coefficients((1, 1), 3, 2)

    def third(function) -> Tensor:
        value = function(x, a, b, form="abs_sum")
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return value.detach()

    torch.testing.assert_close(third(rational), third(reference))


@pytest.mark.parametrize("form", FORMS)
def test_sign_at_zero(form):
    """sign0 = 0 is autograd's rule; sign0 = 1 is the limit from the right."""
    x = torch.tensor([0.0, 1.0, -2.0, 0.0], dtype=torch.float64)
    a, zero = torch.randn(2, 4, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    grad = torch.randn(4, dtype=torch.float64)

    def gradients(function, b: Tensor, **attributes: int) -> tuple[Tensor, ...]:
        operands = [t.clone().requires_grad_() for t in (x, a, b)]
        return torch.autograd.grad(function(*operands, form=form, **attributes), operands, grad)

    for b in (zero, torch.tensor([[0.0, -0.2], [0.3, 0.0]], dtype=torch.float64)):
        for own, auto in zip(gradients(rational, b, sign0=0), gradients(reference, b), strict=True):
            torch.testing.assert_close(own, auto)
    _, _, d_zero = gradients(rational, zero, sign0=0)
    assert torch.count_nonzero(d_zero) == 0
    _, _, learns = gradients(rational, zero, sign0=1)
    assert torch.count_nonzero(learns) == learns.numel()
    tiny = torch.full_like(zero, 1e-12)
    _, _, limit = gradients(rational, tiny, sign0=1)
    if form != "abs_sum":  # there the sum's sign also depends on x
        torch.testing.assert_close(learns, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_single_precision(dtype):
    x = torch.randn(64, 48).to(dtype)
    a, b = coefficients((8, 8), 5, 4, torch.float32)
    y = rational(x, a, b)
    expected = rational(x.double(), a.double(), b.double())
    unit = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < max(unit / 2, 3e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e3, 1e6])
def test_huge_and_tiny_arguments(scale):
    x = torch.tensor([1.0, 0.5, -1.0, -2.0]) * scale
    a, b = coefficients((2, 2), 5, 4, torch.float32)
    grads = GROUP_RATIONAL_BACKWARD.overload(torch.ones(4), x, a, b)
    wide = [t.double() for t in (x, a, b)]
    expected = GROUP_RATIONAL_BACKWARD.overload(torch.ones(4).double(), *wide)
    pairs = [(rational(x, a, b), rational(*wide)), *zip(grads, expected, strict=True)]
    for got, want in pairs:
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-37)


def test_strided_operands_and_empty_ones():
    a, b = coefficients((2, 2), 5, 4)
    x = torch.randn(6, 4, 10, dtype=torch.float64)
    for view in (x.transpose(0, 1), x.transpose(1, 2)[..., ::2], x[::2, :, 1:9], x[:0]):
        torch.testing.assert_close(rational(view, a, b), rational(view.clone(), a, b))
        grad = torch.randn(view.shape, dtype=torch.float64)
        strided = GROUP_RATIONAL_BACKWARD.overload(grad, view, a, b)
        packed = GROUP_RATIONAL_BACKWARD.overload(grad.clone(), view.contiguous(), a, b)
        torch.testing.assert_close(strided, packed)


def test_only_the_operands_are_saved():
    saved = []
    x = torch.randn(4, 8, requires_grad=True)
    a, b = (t.requires_grad_() for t in coefficients((2, 2), 5, 4, torch.float32))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        rational(x, a, b)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, a, b)}


def test_the_compiled_graph_holds_both_operations():
    names = []

    def backend(module, inputs):
        names.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return make_boxed_func(module.forward)

    a, b = (t.requires_grad_() for t in coefficients((2, 1), 5, 4, torch.float32))
    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(
        lambda x, a, b: rational(x, a, b, form="abs_sum"),
        backend=aot_autograd(fw_compiler=backend, bw_compiler=backend),
    )
    compiled(x, a, b).sum().backward()
    assert "ridgeline.group_rational.default" in names
    assert "ridgeline.group_rational_backward.default" in names


@pytest.mark.parametrize(
    ("shapes", "attributes"),
    [
        (((3, 10), (4, 6), (4, 4)), {}),
        (((3, 12), (2, 6), (4, 4)), {}),
        (((3, 12), (6,), (4, 4)), {}),
        (((3, 12), (4, 0), (4, 4)), {}),
        (((3, 12), (4, 6), (4, 4)), {"form": "kernel"}),
        (((3, 12), (4, 6), (4, 4)), {"sign0": 2}),
    ],
)
def test_what_the_law_does_not_define_is_refused(shapes, attributes):
    with pytest.raises(RationalError, match=r"group_rational expects .* found"):
        rational(*(torch.zeros(s) for s in shapes), **attributes)
