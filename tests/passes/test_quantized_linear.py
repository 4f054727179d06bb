"""Which layers become `quantized_linear`, at what measured error, and why the others don't."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes import optimize
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.quantized_linear import QUANTIZED


def _mlp(features: int = 128, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, 96, bias=bias), nn.ReLU(), nn.Linear(96, 64, bias=bias)
    ).eval()


def _applied(fast) -> list:
    return [d for d in fast.plan.applied if d.rewrite == "quantized_linear"]


def _refused(fast) -> list:
    return [d for d in fast.plan.refused if d.rewrite == "quantized_linear"]


def _error(fast: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return ((fast(x) - model(x)).norm() / model(x).norm()).item()


def _optimized(model: nn.Module, x: Tensor, **options):
    with torch.no_grad():
        return optimize(
            model, (x,), target="a100", objective="memory", lowering="eager", passes=(QUANTIZED,),
            **options,
        )  # fmt: skip


def _on_the_q4_1_grid(linear: nn.Linear) -> None:
    """Weights that 4-bit codes with an fp16 scale and minimum per 32 inputs hold exactly."""
    out, inside = linear.weight.shape
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (out, inside // 32, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15  # the grid's ends occur, as in any real checkpoint
    scale = (torch.rand(out, inside // 32, 1, generator=generator) * 0.01 + 0.001).half().float()
    minimum = -(torch.rand(out, inside // 32, 1, generator=generator) * 0.1).half().float()
    with torch.no_grad():
        linear.weight.copy_((codes * scale + minimum).view(out, inside))


def test_nothing_is_approximated_unasked():
    model, x = _mlp(), torch.randn(4, 128)
    fast = _optimized(model, x)
    assert _applied(fast) == []
    assert {d.reason for d in _refused(fast)} == {"approximate, and tolerance is 0"}
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_weights_on_the_grid_are_held_without_loss():
    model, x = _mlp(), torch.randn(4, 128)
    for layer in (model[0], model[2]):
        _on_the_q4_1_grid(layer)
    fast = _optimized(model, x, tolerance=1e-4)
    assert [d.variant for d in _applied(fast)] == ["4-bit minimum g32"] * 2
    assert [d.certificate.relative_error for d in _applied(fast)] == [0.0, 0.0]
    assert _error(fast, model, torch.randn(9, 128)) < 2e-6


class _Residual(nn.Module):
    """Layers on the Q4_1 grid, more of them than the caches hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(576, 576, bias=False) for _ in range(40))
        for layer in self.layers:
            _on_the_q4_1_grid(layer)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return x


@torch.no_grad()
def test_the_tolerance_is_not_spent_on_next_to_nothing():
    """Narrower forms of a few layers would win a thousandth for all of it; bf16 products do pay,
    though beside what the layers took before they win little."""
    target = dataclasses.replace(load_target("cpu"), bandwidth_bytes_per_s=30e9)
    args = (torch.randn(1, 576),)
    fast = optimize(_Residual(), args, target=target, tolerance=0.008, lowering="eager")
    assert {d.variant for d in _applied(fast)} == {"4-bit minimum g32, bf16 products"}
    assert len(_applied(fast)) == 40


@torch.no_grad()
def test_values_that_overflow_on_the_way_leave_a_plan():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))).eval()
    for layer in model:
        layer.weight.fill_(1e20)
    fast = optimize(model, (torch.ones(1, 256),), target="cpu", tolerance=0.02, lowering="eager")
    assert any("infinite or NaN" in d.reason for d in _refused(fast))


@pytest.mark.parametrize("tolerance", [0.2, 0.02, 0.005, 1e-6])
def test_the_tolerance_holds_as_measured(tolerance):
    model, x = _mlp(), torch.randn(64, 128)
    fast = _optimized(model, x, tolerance=tolerance)
    assert fast.plan.measured["forward"] <= tolerance
    assert _error(fast, model, x) <= tolerance
    assert len({d.at for d in _applied(fast) + _refused(fast)}) == 2
    assert all(d.refused_by in ("budget", "certificate") for d in _refused(fast))
    if tolerance == 0.2:
        assert all(d.variant.startswith("4-bit") for d in _applied(fast))
        assert len(_applied(fast)) == 2
    if tolerance == 1e-6:
        assert _applied(fast) == []


def test_ignored_layers_stay():
    model, x = _mlp(), torch.randn(4, 128)
    fast = _optimized(model, x, tolerance=0.2, ignore=["0"])
    assert [d.at.partition(":")[0] for d in _applied(fast)] == ["2"]
    (refused,) = _refused(fast)
    assert refused.reason == "listed in ignore="


def test_calibration_lowers_the_error():
    model = _mlp()
    mix = torch.randn(128, 128) / 11
    batches = [torch.randn(64, 128) @ mix for _ in range(4)]
    x = batches[0]
    without = _optimized(model, x, tolerance=0.5)
    gptq = _optimized(model, x, tolerance=0.5, calibration=batches)
    assert len(_applied(without)) == len(_applied(gptq)) == 2
    assert _error(gptq, model, x) < _error(without, model, x)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_no_group_divides(bias):
    model, x = _mlp(576 - 32 * bias, bias=bias), torch.randn(3, 5, 576 - 32 * bias)
    fast = _optimized(model, x, tolerance=0.3)
    assert len(_applied(fast)) == 2
    assert _error(fast, model, x) <= 0.3


class _Traps(nn.Module):
    """A weight made at run time, a small layer, a layer in float64, a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.scale = nn.Parameter(torch.rand(64))
        self.small = nn.Linear(64, 8)
        self.wide = nn.Linear(64, 64).double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + nn.functional.linear(x, self.embedding.weight[:64] * self.scale)
        x = self.wide(x.double()).float()
        return nn.functional.linear(x, self.embedding.weight), self.small(x)


@torch.no_grad()
def test_layers_that_are_left_alone():
    torch.manual_seed(0)
    model, ids = _Traps().eval(), torch.randint(0, 128, (2, 5))
    fast = _optimized(model, ids, tolerance=0.5)
    reasons = "\n".join(d.reason for d in _refused(fast))
    assert "computed at run time" in reasons
    assert "the weight is 8x64, too small to be worth it" in reasons
    assert "the weight is torch.float64" in reasons
    for got, expected in zip(fast(ids), model(ids), strict=True):
        assert (got - expected).norm() <= 0.5 * expected.norm()
    assert torch.equal(fast.embedding.weight, model.embedding.weight)


def test_training_keeps_the_weights():
    model, x = _mlp().train(), torch.randn(4, 128)
    fast = optimize(model, (x,), target="a100", tolerance=0.2, lowering="eager")
    assert _applied(fast) == []
    assert {d.reason for d in _refused(fast)} == {"the weight is being trained"}
    fast(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_four_bits_win_at_one_row_and_lose_at_many():
    torch.manual_seed(0)
    layer = nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16).eval()
    _on_the_q4_1_grid(layer)
    layer.bfloat16()
    decisions = {}
    for rows in (1, 256):  # above where it flips, and no more: bf16 products may be slow here
        with torch.no_grad():
            captured = capture(layer, (torch.randn(rows, 2048).bfloat16(),))
            compiler = Compiler("a100", tolerance=0.2, passes=(QUANTIZED,))
            graph = compiler.rewrite(captured.program).graph
        count = len(graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload))
        decisions[rows] = (count, [d.refused_by for d in compiler.plan.refused])
    assert decisions == {1: (1, []), 256: (0, ["cost"])}


def test_a_single_vector_is_left_alone():
    model, x = nn.Linear(512, 512).eval(), torch.randn(512)
    fast = optimize(model, (x,), target="cpu", tolerance=0.5, lowering="eager", passes=(QUANTIZED,))
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert [d.reason for d in fast.plan.refused] == ["the input is a single vector"]
