"""The modules of `ridgeline.nn`."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ridgeline
from ridgeline.ir.group_rational import RationalError, reference
from ridgeline.nn import GroupRational


def test_a_new_activation_is_what_it_was_asked_to_be():
    x = 6 * torch.rand(4, 7, 48) - 3
    for init, function in {"silu": F.silu, "tanh": torch.tanh, F.mish: F.mish}.items():
        layer = GroupRational(48, init=init)
        assert (layer(x) - function(x)).abs().max() <= layer.initial_error + 5e-6


def test_it_trains():
    torch.manual_seed(0)
    layer = GroupRational(16, 4, "identity")
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(512, 16)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.mse_loss(layer(x), torch.sin(2 * x))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (layer.denominator != 0).all()  # sign0 = 1: what starts at 0 learns


@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
def test_parameters_and_their_copies(shared):
    layer = GroupRational(24, 3, "gelu", shared_numerator=shared[0], shared_denominator=shared[1])
    assert layer.numerator.shape == (1 if shared[0] else 3, 6)
    assert layer.denominator.shape == (1 if shared[1] else 3, 4)
    other = GroupRational(24, 3, shared_numerator=shared[0], shared_denominator=shared[1])
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 24)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(layer(x), reference(x, *layer.parameters()))


def test_it_stays_one_operation_when_optimized():
    layer = GroupRational(24, 3).eval()
    fast = ridgeline.optimize(layer, target="cpu")
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
    assert [k.op for k in fast.plan.kernels] == ["ridgeline::group_rational"]


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(RationalError, match="7 groups and 24 channels"):
        GroupRational(24, 7)
