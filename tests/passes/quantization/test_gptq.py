"""With data: the Hessian's factor, the error order on correlated inputs, and what is refused."""

import pytest
import torch

from ridgeline.passes.quantization import (
    Codec,
    QuantizationError,
    gptq,
    quantize,
    round_to_nearest,
)
from ridgeline.passes.quantization.gptq import factorize

SCHEMES = ["symmetric", "zero_point", "minimum"]


@pytest.fixture(scope="module")
def layer():
    """Weight [96,200], correlated inputs with loud channels: H of 1500 rows, 500 held out."""
    generator = torch.Generator().manual_seed(3)
    columns = 200
    mix = 0.2 * torch.randn(columns, columns, generator=generator)
    mix += torch.diag(2 * torch.rand(columns, generator=generator))
    x = torch.randn(2000, columns, generator=generator) @ mix
    x[:, ::40] *= 6
    weight = torch.randn(96, columns, generator=generator)
    return weight, 2 / 1500 * x[:1500].T @ x[:1500], x[1500:]


def output_error(held, weight, x):
    return ((x @ (held.dequantize() - weight).T).norm() / (x @ weight.T).norm()).item()


def test_the_factor_inverts_the_damped_hessian(layer):
    _, hessian, _ = layer
    factor, inverse = (x.double() for x in factorize(hessian, 0.01))
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(200)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        inverse.T @ inverse @ damped, torch.eye(200).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_output_error_is_well_below_rounding(layer, scheme, group_size, act_order):
    weight, hessian, x = layer
    codec = Codec(4, group_size, scheme)
    floor = output_error(round_to_nearest(weight, codec), weight, x)
    held = gptq(weight, codec, hessian, act_order=act_order)
    assert held.codec == codec
    assert output_error(held, weight, x) <= 0.7 * floor


def test_a_diagonal_hessian_without_clipping_is_rounding(layer):
    weight, _, _ = layer
    codec = Codec(4, 64, "zero_point")
    held = gptq(weight, codec, torch.eye(200), clips=(1.0,))
    plain = round_to_nearest(weight, codec)
    assert torch.equal(held.packed, plain.packed)
    assert torch.equal(held.scale, plain.scale)


def test_act_order_leaves_the_columns_where_they_are(layer):
    """With a diagonal Hessian no error spreads: any order gives the same codes."""
    weight, _, _ = layer
    hessian = torch.diag(torch.linspace(1, 3, 200).flip(0))
    codec = Codec(4, 64, "zero_point")
    ordered = gptq(weight, codec, hessian, clips=(1.0,), act_order=True)
    plain = gptq(weight, codec, hessian, clips=(1.0,))
    assert torch.equal(ordered.packed, plain.packed)


def test_columns_that_calibration_never_saw_keep_their_weights(layer):
    weight, hessian, _ = layer
    hessian = hessian.clone()
    hessian[7], hessian[:, 7] = 0, 0
    held = gptq(weight, Codec(8, 64, "zero_point"), hessian)
    assert (held.dequantize()[:, 7] - weight[:, 7]).abs().max() < 0.05


def test_a_hessian_of_low_rank_is_carried_by_damping(layer):
    weight, _, x = layer
    few = x[:20]
    held = gptq(weight, Codec(), 2 / 20 * few.T @ few)
    assert output_error(held, weight, few) < output_error(
        round_to_nearest(weight, Codec()), weight, few
    )


def test_twice_the_same(layer):
    weight, hessian, _ = layer
    first, second = (gptq(weight, Codec(), hessian, act_order=True) for _ in range(2))
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.offset, second.offset)


def test_out_of_half_range(layer):
    weight, hessian, x = layer
    held = gptq(weight * 1e-8, Codec(), hessian)
    assert held.scale.dtype == torch.float32
    floor = output_error(round_to_nearest(weight, Codec()), weight, x)
    assert output_error(held, weight * 1e-8, x) <= 0.7 * floor


def test_quantize_takes_gptq_unless_rounding_is_exact(layer):
    weight, hessian, _ = layer
    assert torch.equal(
        quantize(weight, Codec(), hessian).packed, gptq(weight, Codec(), hessian).packed
    )
    on_grid = round_to_nearest(weight, Codec(4, 32, "minimum")).dequantize()
    held = quantize(on_grid, Codec(4, 32, "minimum"), hessian)
    assert torch.equal(held.dequantize(), on_grid)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(3), r"needs a Hessian \[200,200\], found \(3, 3\)"),
        (torch.full((200, 200), torch.nan), "NaN or infinity"),
        (torch.zeros(200, 200), "saw no input other than zero"),
        (torch.full((200, 200), 1e4).fill_diagonal_(1.0), "not positive definite even with"),
    ],
)
def test_a_hessian_that_cannot_be_one_is_refused(layer, hessian, message):
    with pytest.raises(QuantizationError, match=message):
        gptq(layer[0], Codec(), hessian)


def test_damping_must_be_positive(layer):
    with pytest.raises(QuantizationError, match="positive share"):
        gptq(layer[0], Codec(), layer[1], damp=0)
