"""Layers of one input become one: what is merged, what stays, and what happens to the weights."""

import pytest
import torch
from torch import Tensor, nn

import ridgeline

aten = torch.ops.aten


class Heads(nn.Module):
    """Query, key and value of one input, the key without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=n != 32) for n in (64, 32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x).relu(), self.v(x).view(*x.shape[:-1], 2, 8).transpose(-2, -3)


def _optimized(model: nn.Module, x: Tensor, **options):
    return ridgeline.optimize(model, (x,), target="h100", lowering="eager", **options)


def _merged(fast) -> list[str]:
    return [d.variant for d in fast.plan.applied if d.rewrite == "merged_linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_three_layers_become_one_and_results_keep_shape_and_value(dtype):
    torch.manual_seed(0)
    model, x = Heads().eval().to(dtype), torch.randn(3, 5, 64, dtype=dtype)
    fast = _optimized(model, x)
    assert _merged(fast) == ["3 layers of one input"]
    for got, expected in zip(fast(x), model(x), strict=True):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_conv1d_layers_are_merged_too():
    """Their weights are read transposed."""
    transformers = pytest.importorskip("transformers")

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (transformers.pytorch_utils.Conv1D(n, 64) for n in (48, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)[..., :32] + self.b(x)

    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(2, 3, 64)
    fast = _optimized(model, x)
    assert _merged(fast) == ["2 layers of one input"]
    torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_a_weight_changed_in_place_is_seen():
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(3, 5, 64)
    fast = _optimized(model, x)
    before = fast(x)[0]
    model.q.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x))
    assert not torch.equal(fast(x)[0], before)


@torch.no_grad()
def test_names_that_differ_by_a_dot_stay_apart():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList([nn.Linear(64, 8, bias=False)])
            self.f_0 = nn.Linear(64, 8, bias=False)
            self.g = nn.Linear(64, 8, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return self.f[0](x), self.g(x), self.f_0(y), self.g(y)

    torch.manual_seed(0)
    model, x, y = Twins().eval(), torch.randn(3, 64), torch.randn(3, 64)
    fast = ridgeline.optimize(model, (x, y), target="h100", lowering="eager")
    assert len(_merged(fast)) == 2
    torch.testing.assert_close(fast(x, y), model(x, y))


@torch.no_grad()
def test_prefill_and_decode_share_the_merged_weights():
    torch.manual_seed(0)
    model = Heads().eval()
    fast = _optimized(model, torch.randn(3, 5, 64))
    fast(torch.randn(7, 64))
    merged = [g[2] for g in fast._ridgeline.graphs.values()]
    assert len(merged) == 2
    assert len(fast._ridgeline.compile_program._weights._held) == 2  # weights, biases


class Mixed(nn.Module):
    """A weight that is computed in the call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(64, 32, bias=False), nn.Parameter(torch.randn(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + nn.functional.linear(x, self.w * 2)


@torch.no_grad()
def test_weights_that_are_no_constants_stay():
    model, x = Mixed().eval(), torch.randn(3, 64)
    fast = _optimized(model, x)
    assert _merged(fast) == []
    torch.testing.assert_close(fast(x), model(x))


def test_nothing_is_merged_while_training():
    model, x = Heads().train(), torch.randn(3, 5, 64)
    fast = _optimized(model, x)
    assert _merged(fast) == []
    sum(y.sum() for y in fast(x)).backward()
    assert model.q.weight.grad is not None


@torch.no_grad()
def test_a_second_copy_must_be_worth_its_memory():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.u = (nn.Linear(4096, 8192, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.g(x) * self.u(x)

    fast = ridgeline.optimize(Wide().eval(), (torch.randn(1, 4096),), target="l4", lowering="eager")
    (line,) = [d for d in fast.plan.refused if d.rewrite == "merged_linear"]
    assert line.refused_by == "cost"
    assert "bytes more" in line.reason
