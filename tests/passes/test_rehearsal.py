"""Measuring runs the program several times and leaves no trace of that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.norms import NORMS
from ridgeline.passes.quantized_linear import QUANTIZED


class _RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(256, 256), _RMSNorm(256)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.linear(x)) * self.calls


@torch.no_grad()
@pytest.mark.parametrize("ahead", [True, False])
def test_buffers_are_updated_once_for_each_call(ahead):
    model, x = _Counts().eval(), torch.randn(4, 64, 256)
    eager = copy.deepcopy(model)
    args = (x,) if ahead else None
    fast = ridgeline.optimize(model, args, target="a100", tolerance=0.05, objective="memory")
    for _ in range(3):
        got, expected = fast(x), eager(x)
        assert (got - expected).norm() <= 0.05 * expected.norm()
        assert torch.equal(fast.calls, eager.calls)
    assert QUANTIZED.name in {d.rewrite for d in fast.plan.applied}


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = _RMSNorm(256)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(x), 0.5, self.training)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_random_numbers_are_those_of_eager_and_no_reason_to_give_back(lowering):
    model, x = _Noisy().train(), torch.randn(8, 128, 256)
    fast = ridgeline.optimize(model, target="cpu", lowering=lowering)
    for _ in range(2):
        torch.manual_seed(5)
        got = fast(x)
        torch.manual_seed(5)
        torch.testing.assert_close(got, model(x))
    assert {d.rewrite for d in fast.plan.applied} == {NORMS.name}


def test_batch_statistics_move_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LayerNorm(16)).train()
    x, eager = torch.randn(64, 16), copy.deepcopy(model)
    fast = ridgeline.optimize(model, target="a100", lowering="eager")
    torch.testing.assert_close(fast(x), eager(x))
    assert fast[1].num_batches_tracked == 1
    torch.testing.assert_close(fast[1].running_mean, eager[1].running_mean)
