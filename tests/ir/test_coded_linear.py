"""`quantized_linear` of binary and shift codes: its law, written out a second time in float64."""

import pytest
import torch

from ridgeline.ir.quantized_linear import (
    FIXED_POINT_BLOCK,
    FIXED_POINT_TOP,
    QUANTIZED_LINEAR,
    dequantize,
    fixed_point,
    pack_codes,
    powers,
    shift_values,
    unpack_codes,
)


def codes(bits, rows=5, columns=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 65])
def test_storage_is_a_string_of_bits(bits, columns):
    stored = codes(bits, 3, columns)
    packed = pack_codes(stored, bits)
    assert packed.shape == (3, -(-columns * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, columns), stored)
    string = "".join(f"{octet:08b}"[::-1] for octet in packed[1].tolist())
    for j in range(columns):
        assert int(string[j * bits : (j + 1) * bits][::-1], 2) == stored[1, j]


def test_powers_of_two_keep_zeros_and_signs():
    terms = torch.tensor([[64, 0, 0], [-65, 63, 0], [66, -64, 62], [0, 0, 0]], dtype=torch.int8)
    assert powers(terms).tolist() == [1.0, -1.5, 3.25, 0.0]


@pytest.mark.parametrize(("bits", "terms"), [(4, 1), (5, 1), (8, 2), (4, 2)])
def test_every_shift_code_means_its_terms(bits, terms):
    width = bits // terms
    every = torch.arange(2**bits, dtype=torch.uint8)
    for code, value in zip(every.tolist(), shift_values(every, bits, terms).tolist(), strict=True):
        expected = 0.0
        for t in range(terms):
            field = code >> t * width & 2**width - 1
            shift, sign = field & 2 ** (width - 1) - 1, field >> (width - 1)
            if shift != 2 ** (width - 1) - 1:
                expected += (-1) ** sign * 2.0**-shift
        assert value == expected


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_rows", [1, 2, 5])
@pytest.mark.parametrize("offset", [False, True])
def test_binary_codes_are_their_law(bits, group_rows, offset):
    generator = torch.Generator().manual_seed(1)
    stored, size = codes(bits), 32
    groups = (-(-5 // group_rows), 3)
    scale = torch.rand(*groups, bits, generator=generator)
    least = torch.randn(groups, generator=generator) if offset else None
    found = dequantize(
        pack_codes(stored, bits),
        scale,
        least,
        bits=bits,
        group_size=size,
        in_features=70,
        codec="binary",
        group_rows=group_rows,
    )
    for n in range(5):
        for k in range(70):
            r, g = n // group_rows, k // size
            value = sum(
                scale[r, g, i].item() * (1 if stored[n, k] >> i & 1 else -1) for i in range(bits)
            )
            value += least[r, g].item() if offset else 0.0
            assert found[n, k].item() == pytest.approx(value, abs=1e-6)


def test_fixed_point_is_exact_in_sixteen_bits():
    x = torch.randn(3, 5 * FIXED_POINT_BLOCK + 9, generator=torch.Generator().manual_seed(2))
    x[0, :FIXED_POINT_BLOCK] = 0
    x[1, 3] = 1e4
    rounded = fixed_point(x)
    assert rounded.shape == x.shape
    assert torch.equal(rounded[0, :FIXED_POINT_BLOCK], torch.zeros(FIXED_POINT_BLOCK))
    for row in range(3):
        for start in range(0, x.shape[1], FIXED_POINT_BLOCK):
            block = x[row, start : start + FIXED_POINT_BLOCK].double()
            error = (rounded[row, start : start + FIXED_POINT_BLOCK].double() - block).abs().max()
            assert error <= block.abs().max() / FIXED_POINT_TOP * 0.5001
    assert 4 * FIXED_POINT_TOP < 2**15


@pytest.mark.parametrize("rows", [1, 64])
def test_row_scale_permutation_bias_and_gradient(rows):
    generator = torch.Generator().manual_seed(3)
    bits, stored = 3, codes(3)
    scale, least = torch.rand(5, 3, bits, generator=generator), torch.rand(5, 3)
    bias, factor = torch.randn(5, generator=generator), torch.rand(5, generator=generator)
    order = torch.randperm(70, generator=generator).to(torch.int16)
    x = torch.randn(rows, 70, generator=generator, requires_grad=True)
    settings = {"bits": bits, "group_size": 32, "codec": "binary"}
    y = QUANTIZED_LINEAR.overload(
        x, pack_codes(stored, bits), scale, least, bias, factor, order, **settings
    )
    plain = dequantize(pack_codes(stored, bits), scale, least, in_features=70, **settings)
    weight = torch.zeros(5, 70, dtype=torch.float64)
    weight[:, order.long()] = plain.double() * factor.double().unsqueeze(1)
    expected = x.detach().double() @ weight.T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(rows, 5, generator=generator)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)
