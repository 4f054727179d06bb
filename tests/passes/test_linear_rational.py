"""Linear layers and rational functions side by side: one kernel where it pays, else the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import load_target, work_of
from ridgeline.ir.capture import capture
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.linear_rational import LINEAR_RATIONAL
from ridgeline.ir.normalize import normalize
from ridgeline.nn import GroupRational
from ridgeline.passes import PASSES
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, equivalence
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.linear_rational import LINEAR_RATIONAL_PASS
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore
from tests.passes.test_group_rational import kat, kernel_horner, safe_pade

BRAIN = torch.bfloat16


class Feed(nn.Module):
    """KAT's feed-forward layer: rational, linear, rational, linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.act1, self.act2 = GroupRational(width, 8), GroupRational(hidden, 8, "silu")
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act2(self.fc1(self.act1(x))))


def compiled(model: nn.Module, x: Tensor, target: str) -> Compiler:
    compiler = Compiler(target, tolerance=0.0, objective="latency", passes=PASSES, ignore=())
    with torch.no_grad():
        compiler.rewrite(capture(model.eval(), [x], {}).program)
    return compiler


def proposed(model: nn.Module, *inputs: Tensor, target: str = "h100", training: bool = False):
    program = capture(model, inputs).program
    module = normalize(program.module)
    setting = Setting(load_target(target), training, 0.0, lambda n: n, WeightStore())
    return module, *propose((LINEAR_RATIONAL_PASS,), module, setting)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


CASES = {
    "narrow": ((192, 768, 192), 1576, BRAIN),
    "wide": ((768, 3072, 768), 1576, BRAIN),
    "few_results": ((192, 64, 16), 12608, BRAIN),
    "float32": ((192, 768, 192), 1576, torch.float32),
}


@pytest.mark.parametrize("target", ["a100", "h100"])
@pytest.mark.parametrize("name", CASES)
def test_where_it_pays(name, target, golden):
    """A narrow layer's results cost as much to pass through memory as to compute; a layer of few
    results takes the function of its input where the gain exceeds the doubt (fc2 on both, fc1 on
    the H100); elsewhere the libraries' product is the better one, or not surely the worse."""
    sizes, tokens, dtype = CASES[name]
    plan = compiled(Feed(*sizes).to(dtype), torch.randn(tokens, sizes[0]).to(dtype), target).plan
    lines = [d for d in (*plan.applied, *plan.refused) if d.rewrite == "linear_rational"]
    text = "".join(
        f"{d.at}, {d.variant}: {d.before.seconds * 1e6:.1f} µs, {d.after.seconds * 1e6:.1f} µs;"
        f" {d.reason or 'applied'}\n"
        for d in lines
    )
    golden(f"linear_rational_{name}_{target}", text)


def test_a_gpu_that_is_not_here_gets_its_kernel():
    x, model = torch.randn(1576, 192, dtype=BRAIN), Feed(192, 768, 192).to(BRAIN).eval()
    with torch.no_grad():
        fast = ridgeline.optimize(model, (x,), target="h100", strict=True)
        (line,) = [d for d in fast.plan.applied if d.rewrite == "linear_rational"]
        error = (fast(x).float() - model(x).float()).norm() / model(x).float().norm()
    assert line.certificate.relative_error <= EQUIVALENCE_LIMIT
    (kernel,) = [k for k in fast.plan.kernels if k.op == LINEAR_RATIONAL.qualified]
    assert kernel.audit["stack_bytes"] == 0
    assert "HGMMA" in kernel.audit["matrix"]
    assert "def linear_rational_forward" in kernel.source()
    assert error < 1e-2


def test_nothing_is_promised_for_a_gpu_that_no_kernel_is_built_for():
    plan = compiled(Feed(192, 768, 192).to(BRAIN), torch.randn(64, 192, dtype=BRAIN), "v100").plan
    assert not plan.applied
    assert any("no kernel of linear_rational is built for v100" in d.reason for d in plan.refused)


class Spelled(nn.Module):
    """A law of `test_group_rational` between two layers; the layers' channels are its own."""

    def __init__(self, law, bias: bool = True) -> None:
        super().__init__()
        self.law = law
        self.first, self.last = nn.Linear(12, 24, bias=bias), nn.Linear(24, 6, bias=bias)
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.law(self.first(x), self.a, self.b))


def grouped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The groups are joined behind the function, by a view of its result."""
    z = x.unflatten(-1, (4, -1))
    top = sum(a[:, i, None] * z**i for i in range(6))
    bottom = sum(((b[:, i, None] * z ** (i + 1)).abs() for i in range(4)), start=1.0)
    return (top / bottom).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "law",
    [
        *(kernel_horner, safe_pade, grouped, kat),
        lambda x, a, b: GROUP_RATIONAL.overload(x, a, b, form="abs_sum"),
    ],
    ids=["horner", "safe-pade", "grouped", "kat", "operation"],
)
def test_both_sides_are_found_in_any_spelling_and_equal(law, bias):
    model, x = Spelled(law, bias).eval(), torch.randn(2, 5, 12)
    module, candidates, refusals = proposed(model, x)
    assert refusals == []
    assert [c.call.side for c in candidates] == ["output", "input"]
    for candidate in candidates:
        assert equivalence(candidate, {}).relative_error <= EQUIVALENCE_LIMIT
        rewritten = apply(module, [candidate])
        torch.testing.assert_close(rewritten(x)[0], model(x), rtol=1e-4, atol=1e-4)
        (call,) = rewritten.graph.find_nodes(op="call_function", target=LINEAR_RATIONAL.overload)
        assert work_of(call) == candidate.after
        # One layer is left, and nothing of the rational function.
        names = [str(n.target) for n in rewritten.graph.nodes]
        assert sum("linear.default" in n for n in names) == 1
        assert not any("div" in n or "matmul" in n or "group_rational" in n for n in names)


def test_of_two_that_share_a_layer_one_is_chosen():
    x = torch.randn(12608, 192, dtype=BRAIN)
    plan = compiled(Feed(192, 64, 16).to(BRAIN), x, "h100").plan
    applied = [d for d in plan.applied if d.rewrite == "linear_rational"]
    assert [d.at.partition(":")[0] for d in applied] == ["fc1", "fc2"]
    assert {d.variant for d in applied} == {"rational function of the layer's input"}


def test_training_and_cpus_are_told_why():
    model, x = Feed(24, 48, 24), torch.randn(5, 24)
    for options, reason in (
        ({"training": True}, "is being trained"),
        ({"target": "cpu"}, "there is no CPU kernel"),
    ):
        with torch.no_grad():
            _, candidates, refusals = proposed(model.eval(), x, **options)
        assert candidates == []
        assert [reason in r.reject.reason for r in refusals] == [True] * 3
        assert all(r.reject.needed for r in refusals)


def test_a_training_step_keeps_its_gradients():
    model, x = Feed(24, 48, 24).train(), torch.randn(5, 24)
    fast = ridgeline.optimize(model, target="h100", strict=True)
    found = torch.autograd.grad(fast(x).square().sum(), tuple(fast.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    assert not any(d.rewrite == "linear_rational" for d in fast.plan.applied)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def near(between) -> nn.Module:
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(24, 48), GroupRational(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            return between(self, x)

    return Near()


NEAR_MISSES = {
    "relu-between": (lambda m, x: m.act(m.linear(x).relu()), "'relu'", "stands between"),
    "cast-between": (lambda m, x: m.act(m.linear(x).double()), "'double'", "stands between"),
    "dropout-between": (
        lambda m, x: m.act(F.dropout(m.linear(x), 0.5, True)),
        *("'dropout'", "stands between"),
    ),
    "read-twice": (lambda m, x: m.act(y := m.linear(x)) + y, "'linear'", "is also read by"),
    "groups-apart": (
        lambda m, x: kernel_apart(m.linear(x.unflatten(0, (2, 4))), m.act),
        *("'linear'", "with the groups apart"),
    ),
}


def kernel_apart(z: Tensor, act: GroupRational) -> Tensor:
    """The rational function of z [..., G, C / G] in plain torch."""
    a, b = act.numerator, act.denominator.abs()
    top = sum(a[:, i, None] * z**i for i in range(a.shape[1]))
    return top / (1 + sum(b[:, i, None] * z.abs() ** (i + 1) for i in range(b.shape[1])))


@pytest.mark.parametrize("name", NEAR_MISSES)
@torch.no_grad()
def test_near_misses_name_what_blocks(name):
    between, node, reason = NEAR_MISSES[name]
    _, candidates, refusals = proposed(near(between).eval(), torch.randn(8, 24))
    assert candidates == []
    (refusal,) = refusals
    assert reason in refusal.reject.reason
    assert node in refusal.reject.reason
    assert refusal.reject.needed


@torch.no_grad()
def test_a_rational_read_by_two_layers_is_not_computed_in_each():
    def shared(m: nn.Module, x: Tensor) -> Tensor:
        y = m.act(x)
        return F.linear(y, m.linear.weight.t()) + F.linear(y, m.linear.weight.t().abs())

    _, candidates, refusals = proposed(near(shared).eval(), torch.randn(8, 48))
    assert candidates == []
    assert "is also read by" in refusals[0].reject.reason


@torch.no_grad()
def test_dtypes_that_the_kernel_does_not_take_are_refused():
    model = nn.Sequential(nn.Linear(24, 48), GroupRational(48, 4)).double().eval()
    _, candidates, (refusal,) = proposed(model, torch.randn(8, 24, dtype=torch.float64))
    assert candidates == []
    assert "the kernel takes one of" in refusal.reject.reason


class OneGroup(nn.Module):
    """A layer that reads the channels of one group at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(12, 24), GroupRational(24, 4, "silu")
        self.second = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(kernel_apart(self.first(x).unflatten(-1, (4, -1)), self.act))


@torch.no_grad()
def test_a_layer_of_one_groups_channels_is_no_neighbour():
    _, candidates, refusals = proposed(OneGroup().eval(), torch.randn(7, 12))
    assert [c.call.side for c in candidates] == ["output"]
    assert any("with the groups apart" in r.reject.reason for r in refusals)
