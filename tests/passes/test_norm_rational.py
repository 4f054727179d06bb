"""LayerNorm before a rational function: one operation where it pays, refused with the reason."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.nn import GroupRational


class Feed(nn.Module):
    """KAT's feed-forward layer after its norm."""

    def __init__(self, width: int = 192, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(width)
        self.act1, self.act2 = GroupRational(width, 8), GroupRational(2 * width, 8, "silu")
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act2(self.fc1(self.act1(self.norm(x)))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 197, 192, generator=torch.Generator().manual_seed(0))


def lines(model: nn.Module, x: Tensor, **options) -> tuple[nn.Module, list]:
    fast = ridgeline.optimize(model, (x,), target="cpu", strict=True, **options)
    decisions = [*fast.plan.applied, *fast.plan.refused]
    return fast, [d for d in decisions if d.rewrite == "norm_rational"]


@torch.no_grad()
def test_the_norm_and_the_rational_become_one_kernel(x):
    torch.manual_seed(0)
    model = Feed().eval()
    nn.init.normal_(model.act1.denominator)
    fast, (line,) = lines(model, x)
    assert line.refused_by is None, line
    assert any(k.op == LAYER_NORM_RATIONAL.qualified for k in fast.plan.kernels)
    exact = copy.deepcopy(model).double()(x.double())
    errors = [float((m(x) - exact).norm() / exact.norm()) for m in (fast, model)]
    assert errors[0] <= 2 * errors[1] + 1e-7


@torch.no_grad()
def test_a_gpu_that_is_not_here_gets_its_kernel(x):
    fast = ridgeline.optimize(Feed().eval(), (x,), target="a100", strict=True)
    (line,) = [d for d in fast.plan.applied if d.rewrite == "norm_rational"]
    assert line.before.seconds > line.after.seconds
    (kernel,) = [k for k in fast.plan.kernels if k.op == LAYER_NORM_RATIONAL.qualified]
    assert kernel.audit["stack_bytes"] == 0


def test_training_is_left_alone(x):
    fast = ridgeline.optimize(Feed().train(), target="cpu", strict=True)
    fast(x[:1, :9]).sum().backward()
    (line,) = [d for d in fast.plan.refused if d.rewrite == "norm_rational"]
    assert "the backward of the rational function reads" in line.reason


class Read(Feed):
    """The normalised rows are read by something else too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.act1(y)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Read(), "is also read by"),
        (Feed(norm=nn.LayerNorm((197, 192))), "kernels take one fixed dimension"),
        (Feed().double(), "the kernels take"),
    ],
)
def test_near_misses_are_refused_with_the_reason(model, reason, x):
    x = x.to(next(model.parameters()).dtype)
    fast, (line,) = lines(model.eval(), x)
    assert line.refused_by is not None
    assert reason in line.reason
    torch.testing.assert_close(fast(x), model(x))
