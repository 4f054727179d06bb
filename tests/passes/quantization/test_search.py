"""Without data: bit-exact recovery of quantised checkpoints, edges of fp16, and the error order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.passes.quantization import (
    Codec,
    QuantizationError,
    calibration_free,
    quantize,
    round_to_nearest,
)

SCHEMES = ["symmetric", "zero_point", "minimum"]
seeds = st.integers(0, 2**32 - 1)


def blocks(codes, scale, minimum):
    """A dequantised checkpoint [rows, count*32]: fp16 scale and minimum, arithmetic in fp32."""
    return (scale.float().unsqueeze(-1) * codes.float() + minimum.float().unsqueeze(-1)).flatten(1)


def half_scales(generator, shape, low, high):
    """Positive fp16 values 2**low .. 2**high, subnormals included."""
    exponent = torch.empty(shape).uniform_(low, high, generator=generator)
    return exponent.exp2().half()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, low=st.integers(-24, 10), rows=st.integers(1, 4), count=st.integers(1, 5))
def test_q4_1_comes_back_bit_for_bit(seed, low, rows, count):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, count, 32), generator=generator)
    codes[..., 3], codes[..., 20] = 0, 15
    scale = half_scales(generator, (rows, count), low, low + 2)
    # A constant block is stored with d = 0.
    scale[torch.rand(rows, count, generator=generator) < 0.2] = 0
    steps = torch.empty(rows, count).uniform_(-40, 40, generator=generator)
    minimum = (steps * 2.0**low).half()
    weight = blocks(codes, scale, minimum)
    for recover in (round_to_nearest, quantize):
        held = recover(weight, Codec(4, 32, "minimum"))
        assert torch.equal(held.dequantize(), weight)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, low=st.integers(-24, 10), rows=st.integers(1, 4), count=st.integers(1, 5))
def test_q8_0_comes_back_bit_for_bit(seed, low, rows, count):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, count, 32), generator=generator)
    peak = torch.where(torch.rand(rows, count, generator=generator) < 0.5, 127, -127)
    codes[..., 7] = peak
    scale = half_scales(generator, (rows, count), low, low + 2)
    weight = blocks(codes, scale, torch.zeros(rows, count))
    held = quantize(weight, Codec(8, 32, "symmetric"))
    assert torch.equal(held.dequantize(), weight)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), count=st.integers(1, 5))
def test_q4_0_comes_back_bit_for_bit(seed, rows, count):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, count, 32), generator=generator)
    codes[..., 7] = -8
    scale = half_scales(generator, (rows, count), -12, 0)
    sign = torch.where(torch.rand(rows, count, generator=generator) < 0.5, 1, -1)
    weight = blocks(codes, scale * sign, torch.zeros(rows, count))
    held = quantize(weight, Codec(4, 32, "symmetric"))
    assert torch.equal(held.dequantize(), weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 31, 64, 65, 200])
def test_every_weight_is_within_its_step(scheme, bits, columns):
    torch.manual_seed(columns)
    weight = torch.randn(6, columns)
    held = round_to_nearest(weight, Codec(bits, 64, scheme))
    scale = held.scale.float().abs().repeat_interleave(64, 1)[:, :columns]
    error = (held.dequantize() - weight).abs()
    # One step where the smaller side of a signed range is clamped, half a step elsewhere; the
    # rounding of the scale to fp16 adds 2**-11 of the largest weight.
    steps = 0.5 if scheme == "minimum" else 1.0
    assert bool((error <= steps * scale * (1 + 2**-10) + 2**-10 * weight.abs().max()).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("factor", [1e-8, 1e-5, 1e6])
def test_scales_out_of_half_range_are_kept_in_single(scheme, factor):
    torch.manual_seed(0)
    weight = torch.randn(4, 96)
    held = quantize(weight * factor, Codec(4, 32, scheme))
    assert held.scale.dtype == torch.float32
    error = (held.dequantize() / factor - weight).norm() / weight.norm()
    assert error < 0.11


def test_a_group_far_from_zero_keeps_its_minimum_in_single():
    torch.manual_seed(0)
    weight = 1 + 1e-4 * torch.rand(4, 64)
    held = round_to_nearest(weight, Codec(4, 32, "minimum"))
    assert held.offset.dtype == torch.float32
    assert (held.dequantize() - weight).abs().max() < 1e-4 / 15


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_groups_stay_zero(scheme):
    weight = torch.zeros(3, 96)
    weight[1, 32:64] = torch.linspace(-1, 1, 32)
    held = quantize(weight, Codec(4, 32, scheme))
    assert held.dequantize()[weight == 0].abs().sum() == 0
    assert bool(held.dequantize().isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**121])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = torch.zeros(3, 40)
    weight[1, 5] = bad
    with pytest.raises(QuantizationError, match=r"1 of 120 weights .* first at \[1,5\]"):
        quantize(weight, Codec())


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_what_is_not_a_weight_is_refused(weight):
    with pytest.raises(QuantizationError, match="expected a floating-point weight"):
        quantize(weight, Codec())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_search_is_never_worse_than_rounding(scheme, group_size):
    torch.manual_seed(group_size)
    # Heavy tails, and a short last group.
    weight = torch.randn(16, 208) / torch.rand(16, 208).clamp_min(0.05)
    codec = Codec(4, group_size, scheme)

    def per_group(held):
        """The measure that the search states: weighted by w² where zero is a level."""
        error = (held.dequantize() - weight).double()
        if scheme != "minimum":
            error *= weight
        padded = torch.nn.functional.pad(error.square(), (0, -208 % group_size))
        return padded.view(16, -1, group_size).sum(-1)

    before, after = (
        per_group(round_to_nearest(weight, codec)),
        per_group(calibration_free(weight, codec)),
    )
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lower_precision_weights_are_read_as_they_are(scheme):
    torch.manual_seed(0)
    weight = torch.randn(8, 128).bfloat16()
    codec = Codec(4, 64, scheme)
    low, full = quantize(weight, codec), quantize(weight.float(), codec)
    assert torch.equal(low.packed, full.packed)
    assert torch.equal(low.scale, full.scale)
