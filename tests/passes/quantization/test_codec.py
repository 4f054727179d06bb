"""Storage: what is asked for is checked, what is packed comes back, what is held is counted."""

import pytest
import torch

from ridgeline.ir.quantized_linear import pack_codes, unpack_codes
from ridgeline.passes.quantization import Codec, QuantizationError, QuantizedWeight
from ridgeline.passes.quantization import round_to_nearest as nearest


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 577])
def test_packing_is_a_bijection(bits, columns):
    codes = torch.randint(0, 2**bits, (7, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (7, -(-columns * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("bits", True),
        ("terms", 2),
        ("group_rows", 2),
        ("group_size", 48),
        ("group_size", -1),
        ("scheme", "affine"),
    ],
)
def test_a_codec_refuses_what_no_kernel_holds(field, value):
    with pytest.raises(QuantizationError, match=f"codec {field} is .*choose"):
        Codec(**{field: value})


@pytest.mark.parametrize("scheme", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 65, 576, 33])
def test_bytes_and_bits_are_those_of_the_tensors(scheme, bits, columns):
    torch.manual_seed(0)  # fp32 scales would take more
    codec = Codec(bits, 64, scheme)
    held = nearest(torch.randn(5, columns), codec)
    assert held.scheme == scheme
    assert held.codec == codec
    assert held.average_bits == pytest.approx(codec.average_bits(columns))
    assert held.nbytes == pytest.approx(5 * columns * codec.average_bits(columns) / 8)


def test_known_average_bits():
    assert Codec(4, 64, "symmetric").average_bits(576) == 4.25
    assert Codec(4, 32, "minimum").average_bits(576) == 5.0
    # four groups of 128 and one of 64
    assert Codec(4, 128, "symmetric").average_bits(576) == 4 + 16 * 5 / 576


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(3, 31, dtype=torch.uint8)}, "packed is"),
        ({"scale": torch.zeros(3, 1)}, "scale is"),
        ({"scale": torch.zeros(3, 2, dtype=torch.bfloat16)}, "scale is"),
        ({"offset": torch.zeros(3, 2, dtype=torch.int32)}, "offset is"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, message):
    parts = {
        "packed": torch.zeros(3, 32, dtype=torch.uint8),
        "scale": torch.ones(3, 2, dtype=torch.float16),
        "offset": None,
        "bits": 4,
        "group_size": 32,
        "in_features": 64,
    }
    QuantizedWeight(**parts)
    with pytest.raises(QuantizationError, match=message):
        QuantizedWeight(**(parts | change))


def test_dequantize_rounds_once():
    held = nearest(torch.randn(4, 96), Codec(4, 32, "minimum"))
    assert torch.equal(held.dequantize(torch.bfloat16), held.dequantize().bfloat16())
