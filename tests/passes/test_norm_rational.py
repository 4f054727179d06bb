"""LayerNorm before a rational function: one operation where it pays, refused with the reason."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.normalize import normalize
from ridgeline.nn import GroupRational
from ridgeline.passes import PASSES
from ridgeline.passes.base import Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.norm_rational import NORM_RATIONAL
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore
from tests.passes.test_group_rational import kat, kernel_horner, kernel_powers, safe_pade


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


class Spelled(nn.Module):
    """A rational function in plain torch behind a LayerNorm."""

    def __init__(self, law, between=lambda y: y) -> None:
        super().__init__()
        self.norm, self.law, self.between = nn.LayerNorm(24), law, between
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.law(self.between(self.norm(x)), self.a, self.b)


@torch.no_grad()
@pytest.mark.parametrize("law", [kernel_horner, kernel_powers, safe_pade, kat])
def test_a_rational_function_in_plain_torch_is_fused_too(law):
    """In the very form that it has; `kat` has a pole where its argument is below 0."""
    torch.manual_seed(0)
    model, x = Spelled(law).eval(), torch.randn(256, 7, 24)
    if law is kat:
        nn.init.constant_(model.norm.weight, 0.1)
        nn.init.constant_(model.norm.bias, 1.0)
    fast, (line,) = lines(model, x)
    assert line.refused_by is None, line
    assert line.certificate.relative_error <= EQUIVALENCE_LIMIT
    assert [k.op for k in fast.plan.kernels] == [LAYER_NORM_RATIONAL.qualified]
    exact = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - exact).norm() <= 2e-6 * exact.norm()


@torch.no_grad()
def test_a_gpu_gains_where_torch_makes_no_loop_of_it():
    """Inductor makes one kernel of a LayerNorm and Horner's rule; KAT's products are calls."""
    x = torch.randn(256, 7, 24)
    for law, applied in ((kernel_horner, False), (kat, True)):
        compiler = Compiler("a100", tolerance=0.0, objective="latency", passes=PASSES, ignore=())
        compiler.rewrite(capture(Spelled(law).eval(), [x], {}).program)
        plan = compiler.plan
        assert any(d.rewrite == "norm_rational" for d in plan.applied) == applied
        told = [d.reason for d in plan.refused if d.rewrite == "norm_rational"]
        assert ["not better on a100" in reason for reason in told] == [True] * (not applied)


@torch.no_grad()
@pytest.mark.parametrize(
    ("between", "node"),
    [
        (torch.relu, "'relu'"),
        (lambda y: torch.dropout(y, 0.5, True), "'dropout'"),
        (lambda y: y.to(torch.bfloat16), "'to'"),
        (lambda y: y.flatten(0, 1).view(1, -1, 24), "'flatten'"),
    ],
)
@pytest.mark.parametrize("spelled", [False, True])
def test_what_stands_between_is_named(between, node, spelled):
    act = GroupRational(24, 4).eval()
    model = Spelled(kernel_horner if spelled else lambda y, a, b: act(y), between).eval()
    if spelled and node == "'to'":
        model = model.bfloat16()
        model.norm.float()
    program = capture(model, [torch.randn(2, 7, 24)]).program
    setting = Setting(load_target("cpu"), False, 0.0, lambda n: n, WeightStore())
    _, refusals = propose((NORM_RATIONAL,), normalize(program.module), setting)
    (refusal,) = refusals
    assert f"{node} at" in refusal.reject.reason
    assert "stands between 'layer_norm'" in refusal.reject.reason
    assert "follow each other" in refusal.reject.needed


@torch.no_grad()
def test_groups_that_are_normalised_apart_are_refused():
    class Apart(Spelled):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(x)
            top = sum(self.a[:, i, None] * z**i for i in range(6))
            return top / (1 + sum((self.b[:, i, None] * z ** (i + 1)).abs() for i in range(4)))

    model, x = Apart(None).eval(), torch.randn(7, 4, 24)
    fast, (line,) = lines(model, x)
    assert "with the groups apart" in line.reason
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
