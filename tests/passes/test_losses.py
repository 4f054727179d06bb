"""What did not fire in the joint choice says why, and what would let it."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import InfeasibleChoice, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Setting
from ridgeline.passes.decide import choose
from ridgeline.passes.merged_linear import MERGED_LINEAR
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import propose
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.weights import WeightStore


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


@torch.no_grad()
def test_a_device_without_room_for_a_copy_is_named():
    """It is no error that is too large: the copy has none."""
    target = load_target("h100")
    program = capture(Pair().eval(), (torch.randn(3, 64),)).program
    module, store = normalize(program.module), WeightStore()
    setting = Setting(target, False, 0.0, Observation(module, program), store)
    candidates, _ = propose((MERGED_LINEAR,), module, setting)
    small = dataclasses.replace(target, memory_bytes=20_000)
    (loss,) = choose(
        candidates, small, tolerance=0.0, objective="latency", sensitivity=1.0, weight_bytes=16_384
    ).refused
    assert (loss.by, loss.needed) == ("budget", "choose a device with more memory")
    assert loss.reason == "its 16384 bytes do not fit h100 beside the rest"


@torch.no_grad()
def test_the_tolerance_that_a_budget_refusal_names_is_enough():
    torch.manual_seed(0)
    model, x = nn.Linear(256, 256).eval(), torch.randn(4, 256)

    def planned(tolerance: float):
        options = {
            "target": "a100", "objective": "memory", "lowering": "eager", "passes": (QUANTIZED,)
        }  # fmt: skip
        return ridgeline.optimize(model, (x,), tolerance=tolerance, **options).plan

    refused = [d for d in planned(1e-3).refused if d.refused_by == "budget"]
    if not refused:
        pytest.fail("the tolerance of this test is no budget any more")
    (needed,) = {re.fullmatch(r"pass tolerance=([\d.e-]+)", d.needed)[1] for d in refused}
    assert [d.rewrite for d in planned(float(needed)).applied] == ["quantized_linear"]


def _offered(target, model, x, tolerance=0.5):
    """Candidates for quantising `model`, for `target`."""
    program = capture(model.eval(), (x,)).program
    module = normalize(program.module)
    setting = Setting(target, False, tolerance, Observation(module, program), WeightStore())
    return propose((QUANTIZED,), module, setting)[0]


def _chosen(candidates, target, **options):
    arguments = {"tolerance": 0.5, "objective": "latency", "sensitivity": 0.0, "weight_bytes": 0}
    return choose(candidates, target, **(arguments | options))


@torch.no_grad()
def test_a_gain_within_the_doubt_is_refused_with_both_sides_and_the_doubt():
    target = load_target("a100")
    model, x = nn.Linear(4096, 11008, bias=False).bfloat16(), torch.randn(2, 4096).bfloat16()
    candidates = _offered(target, model, x)
    assert _chosen(candidates, target).chosen
    for step in range(60):  # where memory is faster, bytes count for less
        faster = target.bandwidth_bytes_per_s * 1.05**step
        answer = _chosen(candidates, dataclasses.replace(target, bandwidth_bytes_per_s=faster))
        best = max(candidates, key=lambda c: answer.worth[c])
        if answer.worth[best] < answer.doubt[best]:
            break
    assert 0 < answer.worth[best] < answer.doubt[best]
    (loss,) = answer.refused
    assert loss.by == "cost"
    figures = r"[\d.]+ µs"
    assert re.fullmatch(
        rf"not surely better on a100: {figures} as it is, {figures} as 4-bit symmetric g128;"
        rf" the gain of {figures} is within the doubt of {figures} about the two",
        loss.reason,
    )


@torch.no_grad()
def test_a_form_that_wins_no_time_is_taken_where_only_it_fits():
    target = load_target("a100")
    model, x = nn.Linear(512, 512, bias=False).bfloat16(), torch.randn(512, 512).bfloat16()
    candidates = _offered(target, model, x)
    held = 512 * 512 * 2
    assert not _chosen(candidates, target, weight_bytes=held).chosen
    small = dataclasses.replace(target, memory_bytes=held // 2)
    (taken,) = _chosen(candidates, small, weight_bytes=held).chosen
    assert taken.memory_bytes <= -held // 2
    with pytest.raises(InfeasibleChoice):
        _chosen(candidates, small, weight_bytes=held, state_bytes=held)
