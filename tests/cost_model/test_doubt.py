"""The doubt about a difference: what both sides share cancels, what each has of its own adds up."""

import math

import pytest
import torch

from ridgeline.cost_model import (
    Attention,
    Collective,
    Gemm,
    Norm,
    Stream,
    Work,
    doubt,
    estimate,
    load_target,
)
from ridgeline.cost_model.doubt import OWN
from ridgeline.cost_model.estimate import kernel_seconds, kind_of, measured_error

A100 = load_target("a100")
PLAIN = Gemm(16, 4096, 4096, dtype=torch.bfloat16)
CODED = Gemm(16, 4096, 4096, dtype=torch.bfloat16, weight_bits=4, group_size=128)


def test_the_same_work_is_known_not_to_differ():
    assert doubt(Work((PLAIN,)), Work((PLAIN,)), A100) == 0.0
    everything = Work((PLAIN, CODED, Stream(1e6, 1e6), Norm(64, 4096)))
    assert doubt(everything, everything, A100) < 1e-15


def test_kinds_add_as_root_of_the_sum_of_squares():
    (busy, fixed, _), (other, floor, _) = (kernel_seconds(k, A100) for k in (PLAIN, CODED))
    errors = [measured_error(k, A100) for k in (PLAIN, CODED)]
    expected = OWN * math.hypot(errors[0] * (busy + fixed), errors[1] * (other + floor))
    assert doubt(Work((PLAIN,)), Work((CODED,)), A100) == pytest.approx(expected)


def test_one_kind_on_both_sides_is_doubted_by_its_difference_alone():
    three = Work((Gemm(16, 1024, 4096, dtype=torch.bfloat16),) * 4)
    gain = estimate(three, A100).seconds - estimate(Work((PLAIN,)), A100).seconds
    assert 0 < doubt(three, Work((PLAIN,)), A100) < gain


def test_what_stands_on_both_sides_adds_nothing():
    beside = Work((Norm(64, 4096), Attention(8, 32, 8, 1, 4096, 128, 128)))
    alone = doubt(Work((PLAIN,)), Work((CODED,)), A100)
    both = doubt(Work((PLAIN,)) + beside, Work((CODED,)) + beside, A100)
    assert both == pytest.approx(alone)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (PLAIN, "gemm bfloat16"),
        (CODED, "quantized gemm bfloat16"),
        (Attention(1, 8, 8, 1, 64, 64, 64), "decode attention float32"),
        (Attention(1, 8, 8, 2, 64, 64, 64), "prefill attention float32"),
        (Norm(1, 64), "norm"),
        (Stream(1, 1, access="gather"), "gather"),
        (Collective("all_reduce", 8, 2), "collective"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds(kernel, kind):
    assert kind_of(kernel) == kind


def test_what_bounds_adds_up_to_the_seconds():
    cost = estimate(Work((PLAIN, CODED, Norm(64, 4096))), A100)
    assert sum(cost.spent.values()) == pytest.approx(cost.seconds)
    assert max(cost.spent, key=cost.spent.__getitem__) == cost.bound
