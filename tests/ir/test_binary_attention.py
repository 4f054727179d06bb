"""Attention over binary codes: its law, its gradient, its refusals."""

import itertools

import pytest
import torch
from torch import Tensor

from ridgeline.ir.binary_attention import BINARY_ATTENTION, BinaryAttentionError

attend = BINARY_ATTENTION.overload


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def operands(dtype=torch.float64, sizes=(2, 3, 5, 7, 6, 4)) -> list[Tensor]:
    B, H, M, N, D, E = sizes
    shapes = ((B, H, M, D), (B, H, N, D), (B, H, N, E), (H, D), (H, D))
    return [torch.randn(s, dtype=dtype) for s in shapes[:3]] + [
        0.3 * torch.randn(s) for s in shapes[3:]
    ]


def literally(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor) -> Tensor:
    """The law, weight by weight."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h, m in itertools.product(*map(range, q.shape[:3])):
        weights = []
        for t in range(k.shape[2]):
            equal = (q[b, h, m] > tq[h]) == (k[b, h, t] > tk[h])
            weights.append(2.0 * equal.sum().item() + 1)
        out[b, h, m] = sum(w * v[b, h, t].double() for t, w in enumerate(weights)) / sum(weights)
    return out


def test_the_law():
    for sizes in ((2, 3, 5, 7, 6, 4), (1, 1, 1, 1, 1, 1), (1, 2, 3, 9, 1, 5)):
        given = operands(sizes=sizes)
        torch.testing.assert_close(attend(*given), literally(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_operands_against_float64(dtype):
    given = [x.to(dtype) for x in operands()[:3]] + operands()[3:]
    y = attend(*given)
    assert y.dtype == dtype
    assert y.transpose(1, 2).is_contiguous()
    error = (y.double() - literally(*given)).norm() / literally(*given).norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def test_extreme_operands():
    q, k, v, tq, tk = operands()
    q[0, 0, 0], k[0, 0, 0, 0], k[0, 0, 1, 0] = torch.nan, torch.inf, -torch.inf
    q[1, 1], tq[2] = tq[1].double(), torch.inf  # equal is not above
    y = attend(q, k, v, tq, tk)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, literally(q, k, v, tq, tk))
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    assert ((y >= low - 1e-9) & (y <= high + 1e-9)).all()  # weights are positive


def test_strides_do_not_matter():
    given = operands()
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given[:3]]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(attend(*turned, *given[3:]), attend(*given))


def test_a_result_does_not_depend_on_the_batch():
    q, k, v, tq, tk = operands(torch.float32)
    whole = attend(q, k, v, tq, tk)
    torch.testing.assert_close(attend(q[1:], k[1:], v[1:], tq, tk), whole[1:])


def test_gradient_of_the_value():
    q, k, v, tq, tk = operands()
    assert torch.autograd.gradcheck(lambda v: attend(q, k, v, tq, tk), v.requires_grad_())


def test_gradient_of_the_codes_is_that_of_a_clamp():
    q, k, v, tq, tk = operands()
    q, k = (2 * x for x in (q, k))
    q.requires_grad_()
    k.requires_grad_()

    def soft(x: Tensor, threshold: Tensor) -> Tensor:
        distance = x - threshold.double().unsqueeze(1)
        codes = torch.where(distance > 0, 1.0, -1.0).double()
        clamped = distance.clamp(-1, 1)
        return codes + clamped - clamped.detach()

    weights = q.shape[3] + 1 + soft(q, tq) @ soft(k, tk).transpose(2, 3)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k), grad)
    found = torch.autograd.grad(attend(q, k, v, tq, tk), (q, k), grad)
    torch.testing.assert_close(found, wanted)
    assert (found[0] == 0).any()
    assert (found[0] != 0).any()


def test_operands_that_do_not_fit_are_refused():
    q, k, v, tq, tk = operands()
    for wrong in (
        (q[0], k, v, tq, tk),
        (q, k[..., :3], v, tq, tk),
        (q, k, v[:, :, :3], tq, tk),
        (q, k, v, tq[:2], tk),
        (q, k[:, :, :0], v[:, :, :0], tq, tk),
        (q.long(), k, v, tq, tk),
    ):
        with pytest.raises(BinaryAttentionError, match="expects floating query"):
            attend(*wrong)


def test_as_an_operation_of_torch():
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype).requires_grad_() for x in operands()[:3]] + operands()[3:]
        torch.library.opcheck(attend, tuple(given), rtol=1e-2, atol=1e-2)
