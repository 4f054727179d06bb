"""Energy: unit energies times operations counted by hand, and what they say about codecs."""

import math

import pytest
import torch

from ridgeline.cost_model import (
    Attention,
    BinaryAttention,
    Collective,
    Gemm,
    Norm,
    Stream,
    Work,
    estimate,
    load_target,
)
from ridgeline.cost_model.energy import UNITS, joules, movement_joules, unit_joules
from ridgeline.cost_model.operations import operations

INT16, BF16 = torch.int16, torch.bfloat16
BINARY = {"weight_bits": 2, "group_size": 128, "scheme": "binary"}


def test_a_product_by_hand():
    gemm = Gemm(3, 5, 7)
    assert operations(gemm) == {("multiply", "float32"): 105, ("add", "float32"): 105}
    moved = 4 * (3 * 7 + 5 * 7 + 3 * 5)
    assert joules(gemm) == pytest.approx(105 * 4.6e-12 + moved * 111.1e-12)


def test_narrow_products_are_accumulated_in_the_wide_dtype():
    assert operations(Gemm(2, 2, 2, dtype=BF16)) == {
        ("multiply", "bfloat16"): 8, ("add", "float32"): 8,
    }  # fmt: skip
    assert ("add", "int32") in operations(Gemm(2, 2, 2, dtype=torch.int8))


def test_a_lookup_forms_no_product_of_weights():
    m, n, k = 2, 96, 256
    found = operations(Gemm(m, n, k, dtype=INT16, stored=torch.float32, **BINARY))
    assert found["lookup", "int16"] == m * n * 2 * k // 4
    assert found["add", "int16"] == m * 16 * k // 4
    assert found["multiply", "float32"] == m * k + m * n * (k // 32) * (1 + 2)
    assert not any(kind == "multiply" and dtype != "float32" for kind, dtype in found)
    powers = operations(Gemm(m, n, k, dtype=INT16, terms=3, **BINARY))
    assert powers["shift", "float32"] == m * n * 2 * (k // 32) * 3
    assert powers["multiply", "float32"] == m * k + m * n * (k // 32)


def test_a_shift_layer_in_fixed_point_shifts_instead_of_multiplying():
    shift = Gemm(1, 96, 256, dtype=INT16, weight_bits=8, group_size=256, scheme="shift", terms=2)
    found = operations(shift)
    assert found["shift", "int32"] == found["add", "int32"] == 96 * 256 * 2
    assert found["multiply", "float32"] == 256 + 96 * 8 + 96


def test_additions_pay_for_their_bytes():
    attention = BinaryAttention(1, 2, 16, 16, 8, 8, input_bytes=2048.0)
    moved = 2048 + 2 * 2 * 16 * 8 * 4
    arithmetic = attention.additions * 0.9e-12 + attention.divisions * 14.8e-12
    assert joules(attention) == pytest.approx(arithmetic + movement_joules(moved))
    softmax = Attention(1, 2, 1, 1024, 1024, 64, 64)
    linear = BinaryAttention(1, 2, 1024, 1024, 64, 64, input_bytes=softmax.bytes["input"] * 2)
    assert joules(linear) < joules(softmax)


@pytest.mark.parametrize("rows", [1, 4])
def test_energy_ranks_the_codecs_of_one_layer(rows):
    def of(**options):
        return joules(Gemm(rows, 1024, 1024, stored=torch.float32, **options))

    four_bits = of(weight_bits=4, group_size=128, scheme="symmetric", dtype=BF16)
    lookup = {q: of(**BINARY | {"weight_bits": q}, dtype=INT16) for q in (2, 3, 4)}
    assert lookup[2] < lookup[3] < lookup[4] < of(dtype=torch.float32)
    assert lookup[2] < four_bits
    assert lookup[2] < of(**BINARY, dtype=torch.float32)


def test_every_kernel_and_dtype_has_a_figure():
    dtypes = (torch.float64, torch.float32, BF16, torch.float16, torch.float8_e4m3fn, torch.int8)
    kernels = [Gemm(3, 5, 7, dtype=d) for d in dtypes]
    kernels += [Norm(3, 8), Stream(8, 8, 3), Attention(1, 2, 2, 3, 3, 8, 8)]
    for kernel in kernels:
        assert math.isfinite(joules(kernel))
        assert joules(kernel) > movement_joules(sum(kernel.bytes.values()))
    assert joules(Collective("all_reduce", 8, 2)) == 0
    assert all(value > 0 for value in UNITS.values())
    with pytest.raises(KeyError, match="no unit energy"):
        unit_joules("rotate", "int8")


def test_estimates_carry_the_energy_and_the_weights():
    kernels = (Gemm(1, 64, 128), Stream(8, 8, 3))
    cost = estimate(Work(kernels), load_target("a100"))
    assert cost.energy_joules == pytest.approx(sum(map(joules, kernels)))
    assert cost.weight_bytes == 64 * 128 * 4
