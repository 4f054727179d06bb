"""Shift layers: their rounding, the codes they freeze to, their gradient."""

import pytest
import torch
from torch import nn

from ridgeline.passes.quantization import QuantizationError
from ridgeline.passes.shift_add_vit import ShiftAddError, ShiftLinear
from ridgeline.passes.shift_add_vit.shift_linear import nearest_powers


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_nearest_powers_are_nearest():
    zero = 7
    levels = torch.tensor([0.0] + [s * 2.0**-e for e in range(zero) for s in (1, -1)])
    ratio = torch.cat((3 * torch.randn(4000), torch.logspace(-6, 1, 500), torch.zeros(1)))
    value, field = nearest_powers(ratio, zero)
    best = (ratio.unsqueeze(1) - levels).abs().amin(1)
    torch.testing.assert_close((ratio - value).abs(), best)
    assert torch.equal(field == zero, value == 0)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("k", "group"), [(64, None), (37, None), (100, 32), (1, None)])
def test_frozen_weights_are_bit_exact(terms, k, group):
    weight = torch.randn(9, k) * torch.logspace(-12, 12, 9).unsqueeze(1)  # fp16 holds not all
    weight[3] = 0
    layer = ShiftLinear(weight, torch.randn(9), terms=terms, group_size=group).eval()
    frozen = layer.frozen()
    assert torch.equal(frozen.quantized.dequantize(), layer.rounded.detach())
    assert (layer.rounded[3] == 0).all()
    with torch.no_grad():
        x = torch.randn(2, 5, k)
        y = layer(x)
        torch.testing.assert_close(frozen(x), y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


def test_error_is_that_of_the_law():
    weight = torch.randn(256, 256)
    for terms, error in ((1, 0.195), (2, 0.041)):
        rounded = ShiftLinear(weight, terms=terms).rounded
        assert (rounded - weight).norm() / weight.norm() < error


def test_rounding_twice_changes_nothing():
    once = ShiftLinear(torch.randn(20, 64)).rounded.detach()
    torch.testing.assert_close(ShiftLinear(once).rounded.detach(), once)


def test_the_gradient_goes_straight_to_the_latent_weight():
    layer = ShiftLinear.of(nn.Linear(40, 7))
    x = torch.randn(3, 40)
    grad = torch.randn(3, 7)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, grad.T @ x)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_it_learns():
    target = nn.Linear(32, 16)
    layer = ShiftLinear.of(nn.Linear(32, 16))
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    x = torch.randn(256, 32)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_bad_weights_and_options_are_refused():
    broken = ShiftLinear(torch.randn(3, 4))
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ShiftAddError, match="1 of the 12 latent weights"):
        broken.frozen()
    with pytest.raises(ShiftAddError, match="terms"):
        ShiftLinear(torch.randn(3, 4), terms=3)
    with pytest.raises(QuantizationError, match="group_size"):
        ShiftLinear(torch.randn(3, 4), group_size=3)
