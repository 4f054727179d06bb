"""The modules of `ridgeline.nn`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ridgeline
from ridgeline.ir.group_rational import RationalError, reference
from ridgeline.nn import GroupRational, with_group_rational


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


class OnGpuOnly(nn.Module):
    """As the public classes: coefficients under their names, kernels that are not here."""

    def __init__(self, names: tuple[str, str], rows: tuple[int, int]) -> None:
        super().__init__()
        self.register_parameter(names[0], nn.Parameter(torch.randn(rows[0], 6)))
        self.register_parameter(names[1], nn.Parameter(torch.randn(rows[1], 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a GPU kernel")


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("weight_numerator", "weight_denominator"), (1, 8)),
        (("numerator_v", "denominator_v"), (1, 8)),
        (("numerator_v", "denominator_v"), (8, 8)),
    ],
)
def test_public_kat_layers_are_known_by_what_they_hold(names, rows):
    act = OnGpuOnly(names, rows)
    model = nn.Sequential(nn.Linear(16, 48), act, nn.Linear(48, 48), act).eval()
    made, x = with_group_rational(model), torch.randn(3, 16)
    assert made[1] is made[3]
    assert model[1] is act
    own = [p.detach() for p in act.parameters()]

    def law(x: torch.Tensor) -> torch.Tensor:
        return reference(x, *own, form="abs_terms")

    torch.testing.assert_close(made(x), law(model[2](law(model[0](x)))))
    assert made[1].sign0 == 1
    assert not made[1].training
    alone = with_group_rational(act)
    torch.testing.assert_close(alone(x), law(x))


def test_models_without_such_layers_are_refused():
    with pytest.raises(RationalError, match="found none in Linear"):
        with_group_rational(nn.Linear(3, 3))
    with pytest.raises(RationalError, match=r"found \[2, 6\] and \[8, 4\]"):
        with_group_rational(OnGpuOnly(("numerator_v", "denominator_v"), (2, 8)))
