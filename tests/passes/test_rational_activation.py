"""Activations refitted to rational functions: under the tolerance, on data, never unasked."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import estimate, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.linear_rational import LINEAR_RATIONAL
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.normalize import normalize
from ridgeline.passes import PASSES
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import propose
from ridgeline.passes.rational_activation import RATIONAL_ACTIVATION
from ridgeline.passes.weights import WeightStore

ACTIVATIONS = {
    "gelu": (nn.GELU(), 4e-3),
    "gelu_tanh": (nn.GELU("tanh"), 4e-3),
    "silu": (nn.SiLU(), 1e-3),
    "relu": (nn.ReLU(), 3e-2),
    "tanh": (nn.Tanh(), 1e-3),
    "sigmoid": (nn.Sigmoid(), 1e-4),
}


class Between(nn.Module):
    """An activation between two layers."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(24, 40), act, nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def proposed(model: nn.Module, x: Tensor, tolerance: float = 0.1, target: str = "cpu"):
    program = capture(model, [x]).program
    module = normalize(program.module)
    observed = Observation(module, program)
    setting = Setting(load_target(target), program.training, tolerance, observed, WeightStore())
    return module, *propose((RATIONAL_ACTIVATION,), module, setting)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@torch.no_grad()
def test_the_stated_error_is_what_the_site_shows(name):
    act, bound = ACTIVATIONS[name]
    model, x = Between(act).eval(), 3 * torch.randn(64, 24)
    module, (candidate,), refusals = proposed(model, x)
    assert refusals == []
    assert isinstance(candidate, Candidate)
    hidden = model.first(x)
    largest = hidden.abs().max().item()
    assert largest <= candidate.call.fitted.reach <= 1.25 * largest + 0.5
    rewritten = apply(module, [candidate])
    (call,) = rewritten.graph.find_nodes(op="call_function", target=GROUP_RATIONAL.overload)
    operands = [getattr(rewritten, str(n.target)) for n in call.args[1:]]
    exact = act(hidden.double())
    error = (GROUP_RATIONAL.overload(hidden, *operands) - exact).norm() / exact.norm()
    assert error.item() == pytest.approx(candidate.error, rel=0.3, abs=1e-6)
    assert candidate.error < bound
    torch.testing.assert_close(rewritten(x)[0], model(x), rtol=0, atol=0.1)
    assert "eighths of the domain" in candidate.preconditions[1]


@torch.no_grad()
@pytest.mark.parametrize(("name", "pays"), [("tanh", True), ("gelu_tanh", True), ("relu", False)])
def test_a_cpu_gains_where_the_activation_is_costly_and_a_gpu_never(name, pays):
    """By torch's tanh, several times; ReLU moves the same bytes and computes nothing."""
    _, (candidate,), _ = proposed(Between(ACTIVATIONS[name][0]).eval(), torch.randn(4096, 24))
    a100 = load_target("a100")
    cpu = dataclasses.replace(
        a100,
        **{"name": "desk", "kind": "cpu", "arch": "x86_64", "peaks": {"float32": 2e11}},
        **{"bandwidth_bytes_per_s": 4e10, "threads": 2, "launch_s": 1e-6},
    )
    before, after = (estimate(w, cpu).seconds for w in (candidate.before, candidate.after))
    assert (before > 1.5 * after) == pays
    on_gpu = proposed(Between(ACTIVATIONS[name][0]).eval(), torch.randn(64, 24), target="a100")
    candidate, *pairs = on_gpu[1]
    assert len(pairs) == 2, "with the layer before it, and with the one after it"
    before, after = (estimate(w, a100).seconds for w in (candidate.before, candidate.after))
    assert before <= after


@torch.no_grad()
def test_a_written_out_silu_is_one_site():
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    _, (candidate,), _ = proposed(Written().eval(), torch.randn(4, 8))
    assert candidate.variant.startswith("silu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tolerance": 0.0}, "tolerance is 0"),
        ({"train": True}, "is being trained"),
        ({"scale": float("inf")}, "no domain is known"),
    ],
)
def test_refusals(change, reason):
    model = Between(nn.GELU()).train(change.get("train", False))
    with torch.set_grad_enabled(change.get("train", False)):
        x = torch.randn(4, 24) * change.get("scale", 1.0)
        _, candidates, refusals = proposed(model, x, change.get("tolerance", 0.1))
    assert candidates == []
    (refusal,) = refusals
    assert reason in refusal.reject.reason


LINEAR = torch.ops.aten.linear.default


@torch.no_grad()
def test_with_the_layer_on_either_side_it_is_one_kernel():
    model, x = Between(nn.SiLU()).eval(), 3 * torch.randn(64, 24)
    module, candidates, refusals = proposed(model, x, target="a100")
    assert refusals == []
    alone, *pairs = candidates
    assert {c.site.outs for c in pairs} == {
        alone.site.outs,
        (module.graph.output_node().args[0][0],),
    }
    for pair in pairs:
        assert set(alone.site.nodes) < set(pair.site.nodes)
        assert pair.error == alone.error
        assert "in one kernel with" in pair.variant
        rewritten = apply(module, [pair])
        (call,) = rewritten.graph.find_nodes(op="call_function", target=LINEAR_RATIONAL.overload)
        assert len(rewritten.graph.find_nodes(op="call_function", target=LINEAR)) == 1
        assert call.kwargs["side"] == ("output" if pair.site.outs == alone.site.outs else "input")
        got, alike = rewritten(x)[0], apply(module, [alone])(x)[0]
        torch.testing.assert_close(got, alike, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_a_norm_before_it_it_is_one_kernel():
    model = nn.Sequential(nn.LayerNorm(40), nn.GELU("tanh")).eval()
    x = torch.randn(64, 40)
    module, (alone, pair), refusals = proposed(model, x)
    assert refusals == []
    rewritten = apply(module, [pair])
    assert rewritten.graph.find_nodes(op="call_function", target=LAYER_NORM_RATIONAL.overload)
    torch.testing.assert_close(rewritten(x), apply(module, [alone])(x), rtol=1e-5, atol=1e-5)
    cpu = dataclasses.replace(load_target("cpu"), refined={})
    assert estimate(pair.before, cpu).seconds > estimate(alone.before, cpu).seconds


@torch.no_grad()
def test_why_it_is_a_kernel_of_its_own_is_told():
    class Read(Between):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x)
            return self.last(self.act(hidden)), hidden

    _, (alone, pair), _ = proposed(Read(nn.GELU()).eval(), torch.randn(64, 24), target="a100")
    assert "'linear'" in alone.preconditions[-1]
    assert "is also read by" in alone.preconditions[-1]
    assert pair.site.outs != alone.site.outs
    _, (alone,), _ = proposed(Between(nn.GELU()).eval(), torch.randn(64, 24))
    assert all("no CPU kernel" in reason for reason in alone.preconditions[2:])
    assert len(alone.preconditions) == 4


def test_the_pair_is_chosen_with_all_else_and_the_model_stays_within_its_tolerance():
    """On an A100 the activation alone gains nothing, and the wide layer before it is the
    library's; the narrow one after it takes the function into its kernel."""
    model = Between(nn.GELU())
    model.first, model.last = nn.Linear(64, 4096), nn.Linear(4096, 64)
    model, x = model.eval(), torch.randn(2048, 64)
    with torch.no_grad():
        fast = ridgeline.optimize(
            model,
            (x,),
            target="a100",
            tolerance=0.05,
            passes=(*PASSES, RATIONAL_ACTIVATION),
            lowering="eager",
        )
        error = (fast(x) - model(x)).norm() / model(x).norm()
    (line,) = [d for d in fast.plan.applied if d.rewrite == "rational_activation"]
    assert line.at == "last:linear_1"
    assert 0 < error <= 0.05
    assert not [d for d in fast.plan.refused if d.rewrite == "rational_activation"]


def test_it_is_never_applied_unasked_and_its_reason_is_told():
    assert RATIONAL_ACTIVATION not in PASSES
    model, x = Between(nn.GELU()).eval(), torch.randn(64, 24)
    options = {"target": "cpu", "passes": (RATIONAL_ACTIVATION,), "lowering": "eager"}
    with torch.no_grad():
        for tolerance in (1e-7, 0.05):
            fast = ridgeline.optimize(model, (x,), tolerance=tolerance, **options)
            error = (fast(x) - model(x)).norm() / model(x).norm()
            assert error <= tolerance
            (line,) = [*fast.plan.applied, *fast.plan.refused]
            assert line.rewrite == "rational_activation"
            assert line.refused_by != "pattern"
