"""Levels linear in their parameters: fitting, feedback, descent, and what they are better than."""

import itertools

import pytest
import torch

from ridgeline.ir.quantized_linear import powers
from ridgeline.passes.quantization import Codec, QuantizationError, descend, gptq, quantize
from ridgeline.passes.quantization.descent import _State, factors_of
from ridgeline.passes.quantization.fit import fit
from ridgeline.passes.quantization.levels import Levels, basis, to_powers

CODECS = [
    Codec(2, 64, "binary"),
    Codec(3, 64, "binary", centred=False),
    Codec(3, 64, "binary", centred=False, terms=2),
    Codec(4, 64, "binary", act_order=True),
    Codec(3, 64, "binary", row_scale=True),
    Codec(3, 1, "binary", group_rows=96, row_scale=True, terms=3),
    Codec(3, 8, "binary", group_rows=20, row_scale=True),
    Codec(4, 64, "minimum"),
    Codec(4, 64, "symmetric"),
    Codec(5, 64, "shift", terms=1),
    Codec(8, 64, "shift", terms=2),
]


@pytest.fixture(scope="module")
def layer():
    """Weight [96,200] with a few outliers of 20 sigma, inputs with loud channels."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(200, 200, generator=generator) / 8 + torch.eye(200)
    x = torch.randn(1500, 200, generator=generator) @ mix
    x[:, ::40] *= 6
    weight = torch.randn(96, 200, generator=generator) / 10
    weight[::16, 3] = 2.0
    return weight, 2 / 1500 * x.T @ x


def loss(held, weight, hessian):
    error = weight.double() - held.dequantize(torch.float64)
    whole = ((weight.double() @ hessian.double()) * weight.double()).sum()
    return (((error @ hessian.double()) * error).sum() / whole).item()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_weight_comes_back_as_the_codec_asked_for(layer, codec):
    weight, hessian = layer
    held = descend(weight, codec, hessian)
    assert held.codec == codec
    assert held.average_bits == pytest.approx(codec.average_bits(200, 96))
    assert loss(held, weight, hessian) < 0.1


@pytest.mark.parametrize("terms", [0, 1, 3])
@pytest.mark.parametrize("group_rows", [1, 7])
def test_descent_never_makes_it_worse(layer, terms, group_rows):
    weight, hessian = layer
    codec = Codec(3, 64, "binary", group_rows=group_rows, terms=terms)
    state = _State(weight, codec, factors_of(hessian), None)

    def measured():
        error = weight - state.values
        return ((error.double() @ state.metric.double()) * error.double()).sum().item()

    state.feed_back()
    found = [measured()]
    for _ in range(3):
        state.refit()
        found.append(measured())
        state.recode()
        found.append(measured())
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found))
    assert found[-1] < 0.97 * found[0]


def test_feedback_and_weighting_are_worth_it(layer):
    weight, hessian = layer
    codec = Codec(3, 64, "binary")
    known = loss(descend(weight, codec, hessian), weight, hessian)
    blind = loss(descend(weight, codec, torch.eye(200)), weight, hessian)
    assert known < 0.5 * blind


def test_scale_and_minimum_beat_gptq_of_as_many_bits(layer):
    weight, hessian = layer
    ours = loss(descend(weight, Codec(4, 64, "minimum"), hessian), weight, hessian)
    assert ours < loss(gptq(weight, Codec(4, 64, "minimum"), hessian), weight, hessian)


def test_powers_of_two_are_the_nearest_sums():
    alpha = torch.cat([torch.rand(500), -torch.rand(50), torch.tensor([0.0, 1.0, 1e-9, 3e4])])
    errors = []
    for terms in (1, 2, 3):
        found = powers(to_powers(alpha, terms))
        wrong = (found - alpha).abs() / alpha.abs().clamp_min(1e-30)
        errors.append(wrong.max().item())
        assert found[alpha == 0].eq(0).all()
    assert errors[0] <= 1 / 3 + 1e-6
    assert errors[1] < 0.12
    assert errors[2] < 0.04


def test_the_nearest_level_is_the_nearest():
    levels = torch.randn(6, 8)
    target = torch.randn(6, 33) * 2
    codes, values = Levels(levels).nearest(target)
    distance = (target.unsqueeze(2) - levels.unsqueeze(1)).abs()
    torch.testing.assert_close((values - target).abs(), distance.amin(2))
    assert torch.equal(levels.gather(1, codes), values)


@pytest.mark.parametrize("codec", [c for c in CODECS if c.scheme != "binary"], ids=str)
def test_a_group_on_its_own_grid_is_held_exactly(codec):
    """Levels that the codec can hold, with scales that storage holds: found again by fitting."""
    table = basis(codec)
    params = torch.tensor([[0.25, -1.0]])[:, : table.shape[1]].expand(4, -1)
    codes = torch.randint(0, 2**codec.bits, (4, 1, 64))
    codes[:, :, 0], codes[:, :, 1] = 0, 2**codec.bits - 1
    members = (params @ table.T).gather(1, codes.flatten(1)).view(4, 1, 64)
    found = fit(members, torch.eye(64), codec, torch.float16, torch.ones(4, 1))
    _, values = Levels(found @ table.T).nearest(members.flatten(1))
    torch.testing.assert_close(values, members.flatten(1), rtol=2e-3, atol=2e-3)


def test_binary_codes_without_data_are_refused(layer):
    with pytest.raises(QuantizationError, match="pass calibration data"):
        quantize(layer[0], Codec(3, 64, "binary"))


@pytest.mark.parametrize(
    ("weight", "hessian", "reason"),
    [
        (torch.full((4, 64), torch.nan), torch.eye(64), "NaN"),
        (torch.randn(4, 64), torch.eye(32), "needs a Hessian"),
        (torch.randn(4, 64), torch.full((64, 64), torch.inf), "NaN or infinity"),
        (torch.randn(4, 64), torch.zeros(64, 64), "no positive diagonal"),
    ],
)
def test_bad_input_is_named(weight, hessian, reason):
    with pytest.raises(QuantizationError, match=reason):
        descend(weight, Codec(3, 64, "binary"), hessian)


def test_zero_rows_and_columns_and_extreme_sizes_survive():
    weight = torch.randn(8, 64)
    weight[2], weight[:, 5] = 0.0, 0.0
    weight[3] *= 1e-6
    weight[4] *= 1e4
    hessian = torch.eye(64)
    hessian[7, 7] = 0.0  # a channel that calibration never excited
    for codec in (Codec(3, 64, "binary", centred=False), Codec(4, 64, "minimum")):
        held = descend(weight, codec, hessian).dequantize()
        assert held.isfinite().all()
        rows = (held - weight).norm(dim=1) / weight.norm(dim=1).clamp_min(1e-30)
        assert rows[[0, 1, 3, 4, 5, 6, 7]].max() < 0.4
        assert held[2].abs().max() <= 1e-6
