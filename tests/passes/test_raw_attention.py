"""What attention in raw operations is held to cost, beside torch's kernel of it."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ridgeline.cost_model import Attention, Work, estimate, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore


class Raw(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v


def candidate(length: int, target: str) -> Candidate:
    return candidate_of([torch.randn(2, 4, length, 16) for _ in range(3)], target)


def candidate_of(operands: list[Tensor], target: str) -> Candidate:
    program = capture(Raw().eval(), operands).program
    module = normalize(program.module)
    setting = Setting(load_target(target), False, 0.0, None, WeightStore())
    (found,), refusals = propose((FLASH_ATTENTION,), module, setting)
    assert refusals == []
    return found


@torch.no_grad()
@pytest.mark.parametrize("length", [33, 145, 700])
def test_on_a_cpu_it_is_no_cheaper_than_torchs_kernel(length):
    cpu, found = load_target("cpu"), candidate(length, "cpu")
    (own,) = found.after.kernels
    assert isinstance(own, Attention)
    fused = Work((dataclasses.replace(own, library="torch"),))
    assert estimate(found.before, cpu).seconds >= estimate(fused, cpu).seconds


@torch.no_grad()
def test_on_a_gpu_it_is_its_operations():
    assert not any(isinstance(k, Attention) for k in candidate(145, "a100").before.kernels)


@torch.no_grad()
@pytest.mark.parametrize("target", ["h100", "b200"])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(8, 128, 16384), (2, 80, 8192)])
def test_keys_that_the_kernel_does_not_split_are_walked_by_few_cores(target, heads, queries, keys):
    """As many blocks as heads on 132 cores or more: what FlashAttention-3 takes is no measure."""
    lengths = (queries, keys, keys)
    operands = [torch.randn(1, heads, n, 128, dtype=torch.bfloat16) for n in lengths]
    found, gpu = candidate_of(operands, target), load_target(target)
    (own,) = found.after.kernels
    assert isinstance(own, Attention)
    assert own.library == "ridgeline"
    ours = estimate(found.after, gpu).seconds
    assert ours > estimate(found.before, gpu).seconds
    # A core's share of the products, at the rate of one core.
    walked = own.flops / heads / (gpu.peaks["bfloat16"] / gpu.cores)
    assert ours > walked
    theirs = estimate(Work((dataclasses.replace(own, library="torch"),)), gpu).seconds
    assert ours > 3 * theirs
