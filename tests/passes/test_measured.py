"""Errors are measured on what a model gives back, and each layer keeps its own weights."""

import torch
from torch import Tensor, nn

import ridgeline


class _Alike(nn.Module):
    """Two layers whose names differ only in a dot and an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(1024, 1024)])
        self.fc_0 = nn.Linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_0(torch.relu(self.fc[0](x)))


def _true_error(fast: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
        return ((fast(x) - expected).norm() / expected.norm()).item()


def test_layers_of_like_names_keep_their_own_weights():
    torch.manual_seed(0)
    model, x = _Alike().eval(), torch.randn(1, 1024)
    fast = ridgeline.optimize(
        model, (x,), target="cpu", tolerance=0.5, objective="eflops", lowering="eager"
    )
    assert len(fast.plan.applied) == 2
    assert _true_error(fast, model, x) < 0.3


def test_large_inputs_do_not_hide_the_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(2048), nn.Linear(2048, 2048)).eval()
    x = 100 * torch.randn(1, 2048)
    fast = ridgeline.optimize(
        model, (x,), target="cpu", tolerance=0.5, objective="eflops", lowering="eager"
    )
    assert fast.plan.applied
    measured, true = fast.plan.measured["forward"], _true_error(fast, model, x)
    assert abs(measured - true) <= 0.05 * true
