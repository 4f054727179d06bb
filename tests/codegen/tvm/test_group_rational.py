"""The CPU kernels of the rational function against their law in float64."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="CPU kernels need TVM")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm import group_rational as kernels
from ridgeline.ir.group_rational import (
    FORMS,
    GROUP_RATIONAL,
    backward_reference,
    reference,
)

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def operands(shape, groups, m, n, dtype, form):
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:3] = 0
    a, b = torch.randn(groups[0], m + 1), 0.3 * torch.rand(groups[1], n)
    b *= torch.randn_like(b).sign() if form == "abs_sum" else 1
    if form == "abs_coefficients":  # which has a pole where x < 0
        x = x.abs()
    if n > 1:
        b[0, 1] = 0
    return torch.randn(shape).to(dtype), x, a, b


def check(grad, x, a, b, **attributes) -> None:
    wide = [t.double() for t in (grad, x, a, b)]
    y = kernels.group_rational(x, a, b, **attributes)
    assert y.dtype == x.dtype
    assert relative(y, reference(*wide[1:], **attributes)) <= ROUNDING[x.dtype]
    found = kernels.group_rational_backward(grad, x, a, b, **attributes)
    expected = backward_reference(*wide, **attributes)
    assert [f.dtype for f in found] == [x.dtype, a.dtype, b.dtype]
    assert relative(found[0], expected[0]) <= ROUNDING[x.dtype]
    eager = backward_reference(grad, x, a, b, **attributes)
    for own, theirs, law in zip(found[1:], eager[1:], expected[1:], strict=True):
        assert relative(own, law) <= max(3e-6, ROUNDING[own.dtype], relative(theirs, law))


@pytest.mark.parametrize("isa", ["generic", None])
@pytest.mark.parametrize(
    ("shape", "groups", "m", "n", "form", "dtype"),
    [
        ((5, 7, 48), (2, 2), 5, 4, "abs_terms", torch.float32),
        ((333, 104), (1, 8), 5, 4, "abs_terms", torch.bfloat16),
        ((9, 36), (3, 1), 3, 2, "abs_sum", torch.float16),
        ((61, 20), (4, 4), 2, 6, "abs_coefficients", torch.float32),
        ((40, 17), (1, 1), 7, 0, "abs_terms", torch.float32),
        ((30, 8), (8, 8), 0, 3, "abs_sum", torch.float32),
        # what LLVM forwards from small tables of coefficients it can use before it is made
        ((3, 8), (8, 1), 1, 9, "abs_sum", torch.float32),
        ((17, 8), (1, 4), 11, 6, "abs_terms", torch.float32),
        ((65, 192), (2, 2), 5, 4, "abs_terms", torch.float32),
    ],
)
def test_the_law_at_odd_shapes(shape, groups, m, n, form, dtype, isa, monkeypatch):
    if isa:
        monkeypatch.setenv("RIDGELINE_ISA", isa)
    check(*operands(shape, groups, m, n, dtype, form), form=form)


@pytest.mark.parametrize("form", FORMS)
def test_sign_at_zero(form):
    grad, x, a, b = operands((33, 24), (2, 2), 5, 4, torch.float32, form)
    b[1] = 0
    for sign0 in (0, 1):
        check(grad, x, a, b, form=form, sign0=sign0)


def test_strides_and_narrow_coefficients():
    grad, x, a, b = operands((6, 16, 48), (4, 4), 5, 4, torch.float32, "abs_terms")
    check(grad.transpose(0, 1), x.transpose(0, 1), a, b)
    check(grad.transpose(1, 2), x.transpose(1, 2), a, b)
    check(grad[..., :16], x[..., 16:32], a.t().contiguous().t(), b.bfloat16())
    check(torch.ones(()).expand(x.shape), x[:1].expand(x.shape), a, b)
    column = torch.randn(1, 40).t()  # contiguous to torch, its last stride 40
    check(column, column, a[:1], b[:1])
    one = torch.ones(()).expand(1, 1)
    check(one, torch.randn(1, 40)[:, :1].t(), a[:1], b[:1])


@pytest.mark.parametrize("scale", [1e-20, 1e6])
def test_tiny_and_huge_arguments(scale):
    _, x, a, b = operands((16, 32), (2, 2), 5, 4, torch.float32, "abs_terms")
    x = x.abs() * scale
    wide = [t.double() for t in (torch.ones_like(x), x, a, b)]
    found = kernels.group_rational_backward(torch.ones_like(x), x, a, b)
    for own, law in zip(found, backward_reference(*wide), strict=True):
        torch.testing.assert_close(own.double(), law, rtol=1e-3, atol=1e-37)


def test_sums_do_not_depend_on_threads():
    grad, x, a, b = operands((4096, 96), (2, 2), 5, 4, torch.float32, "abs_terms")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(kernels.group_rational_backward(grad, x, a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_past_the_caches_is_the_same_bit_for_bit(threads, monkeypatch):
    grad, x, a, b = operands((1031, 64), (2, 2), 5, 4, torch.float32, "abs_terms")

    def computed() -> list[Tensor]:
        return [
            kernels.group_rational(x, a, b),
            *kernels.group_rational_backward(grad, x, a, b),
        ]

    usual = computed()
    specified = []
    kernel = kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *spec: specified.append(spec) or kernel(*spec))
    monkeypatch.setattr(kernels, "STREAMED_BYTES", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        past = computed()
        narrow = operands((50, 24), (1, 1), 5, 4, torch.float32, "abs_terms")
        check(*narrow)
    finally:
        torch.set_num_threads(before)
    assert [spec[-1] for spec in specified] == [kernels._X86] * 2 + [False] * 2
    assert all(torch.equal(*pair) for pair in zip(past, usual, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_number_of_channels_that_fill_no_vector(dtype):
    for channels in range(1, 16):  # of nine, LLVM takes bf16 apart by what it does not have
        check(*operands((40, channels), (1, 1), 1, 1, dtype, "abs_terms"))
    check(*operands((65, 9), (3, 3), 5, 4, dtype, "abs_terms"))


def test_a_group_whose_terms_would_fill_the_stack():
    check(*operands((5, 16 * 19), (1, 1), 5, 4, torch.float32, "abs_terms"))
    given = operands((2, 1 << 19), (1, 1), 5, 4, torch.float32, "abs_terms")
    law = backward_reference(*(t.double() for t in given))
    for own, exact in zip(kernels.group_rational_backward(*given), law, strict=True):
        assert relative(own, exact) <= 1e-5  # a lane adds up thousands of visits


@pytest.mark.skipif(not kernels._X86, reason="streaming stores are an x86 instruction here")
def test_blocks_that_the_system_has_just_zeroed_stay_in_the_caches():
    bytes_of_results = [2**22, 2**23, 2**25 - 64, 2**25]
    streamed = [kernels._streamed(torch.empty(b // 4), (16,)) for b in bytes_of_results]
    assert streamed == [False, True, True, False]


def test_sums_are_more_accurate_than_eager_ones():
    own, eager = torch.zeros(2), torch.zeros(2)
    for _ in range(4):
        grad, x, a, b = operands((4096, 96), (2, 2), 5, 4, torch.float32, "abs_terms")
        law = backward_reference(*(t.double() for t in (grad, x, a, b)))
        for errors, function in (
            (own, kernels.group_rational_backward),
            (eager, backward_reference),
        ):
            found = function(grad, x, a, b)
            errors += torch.tensor([relative(found[i], law[i]) for i in (1, 2)])
    assert (own / 4 <= 1e-6).all()
    assert (own <= eager).all()


def test_autograd_runs_the_kernels(monkeypatch):
    ran = []
    kernel = kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *k: ran.append(k[0]) or kernel(*k))
    x = torch.randn(4, 32, requires_grad=True)
    a, b = torch.randn(2, 6, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    GROUP_RATIONAL.overload(x, a, b).sum().backward()
    assert ran == [False, True]
    wide = [t.detach().double() for t in (torch.ones(4, 32), x, a, b)]
    expected = backward_reference(*wide)
    for own, law in zip((x.grad, a.grad, b.grad), expected, strict=True):
        assert relative(own, law) <= 1e-6


def test_double_precision_runs_by_the_reference():
    x, a, b = torch.randn(3, 8), torch.randn(2, 3), torch.rand(2, 2)
    wide = [t.double() for t in (x, a, b)]
    assert torch.equal(kernels.group_rational(*wide), reference(*wide))


def test_empty_operands():
    a, b = torch.randn(2, 3), torch.rand(2, 2)
    x = torch.randn(0, 8)
    assert kernels.group_rational(x, a, b).shape == (0, 8)
    dx, da, db = kernels.group_rational_backward(x, x, a, b)
    assert dx.shape == (0, 8)
    assert (da == 0).all()
    assert (db == 0).all()


def test_the_source_can_be_read():
    text = kernels.source(768, groups=8, m=5, n=4, dtype=torch.float32, backward=True)
    assert "rl_hsum" in text
    with pytest.raises(UnsupportedProblem, match="float64"):
        kernels.source(768, groups=8, m=5, n=4, dtype=torch.float64)
