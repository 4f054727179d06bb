"""Quantised layers that read one input become one product whose result is sliced."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.drop_in import OptimizedModule
from ridgeline.passes.quantization import Codec, round_to_nearest
from ridgeline.passes.weights import WeightStore


class _Attention(nn.Module):
    """Grouped heads; of the three projections one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(256, 256)
        self.key = nn.Linear(256, 128, bias=False)
        self.value = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, 4, 64).transpose(1, 2)
        k, v = (
            layer(x).view(batch, length, 2, 64).transpose(1, 2) for layer in (self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(256, 512, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


def _optimized(model: nn.Module, x: Tensor, **options: object) -> OptimizedModule:
    return ridgeline.optimize(model, (x,), target="cpu", tolerance=0.05, **options)


def _applied(fast: OptimizedModule) -> list[str]:
    return [d.variant for d in fast.plan.applied if d.rewrite == "quantized_linear"]


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("kind", [_Attention, _Gated])
@pytest.mark.parametrize("rows", [1, 7, 80])
def test_one_product_for_all(kind, lowering, rows):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, rows, 256)
    fast = _optimized(model, x, lowering=lowering)
    layers = 3 if kind is _Attention else 2
    assert [v.endswith(f"{layers} layers side by side") for v in _applied(fast)] == [True]
    assert [d for d in fast.plan.refused if d.rewrite == "quantized_linear"] == []
    error = (fast(x) - model(x)).norm() / model(x).norm()
    assert error <= 0.05
    assert error == pytest.approx(fast.plan.measured["forward"], rel=0.2)


@torch.no_grad()
def test_a_layer_to_be_left_alone_stays_out():
    model, x = _Attention().eval(), torch.randn(2, 7, 256)
    fast = _optimized(model, x, ignore=["key"])
    assert len(_applied(fast)) == 2
    found = {(d.at, d.reason) for d in fast.plan.refused if "ignore" in d.reason}
    assert found == {("key:linear_1", "listed in ignore=")}


@torch.no_grad()
def test_a_changed_weight_of_the_stack_is_seen():
    model, x = _Gated().eval(), torch.randn(2, 7, 256)
    fast = _optimized(model, x)
    fast(x)
    model.up.weight.mul_(-2)
    assert (fast(x) - model(x)).norm() <= 0.05 * model(x).norm()


@torch.no_grad()
def test_stacked_weights_are_held_once():
    store, codec = WeightStore(), Codec(bits=4, group_size=32, scheme="minimum")
    weights = {"a": torch.randn(64, 100), "b": torch.randn(96, 100)}
    for name, weight in weights.items():
        store.refined(name, weight, codec)
    whole = store.stacked(("a", "b"), codec)
    expected = torch.cat([store.refined(n, w, codec).dequantize() for n, w in weights.items()])
    assert torch.equal(whole.dequantize(), expected)
    for name, weight in weights.items():
        part = store.refined(name, weight, codec)
        for field in ("packed", "scale", "offset"):
            a, b = (getattr(q, field).untyped_storage().data_ptr() for q in (part, whole))
            assert a == b
    assert not torch.equal(expected[:64], round_to_nearest(weights["b"], codec).dequantize()[:64])
