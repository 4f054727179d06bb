"""Attention in raw operations: on a CPU a plan's lines and its totals count the same work; on a GPU
ridgeline's kernel is priced by its own grid."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import Attention, Stream, Work, estimate, load_target
from ridgeline.cost_model.work import Gemm
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore


class Raw(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        scores = (q @ k.mT / 4).masked_fill(~keep, float("-inf"))
        return scores.softmax(-1) @ v


class Twice(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT * 0.25).softmax(-1) @ v
        return (first @ k.mT * 0.25).softmax(-1) @ v


SIZES = [(8, 16), (33, 16), (145, 16), (145, 64), (256, 64)]


def candidate_of(operands: list[Tensor], target: str) -> Candidate:
    program = capture(Raw().eval(), operands).program
    module = normalize(program.module)
    setting = Setting(load_target(target), False, 0.0, None, WeightStore())
    (found,), refusals = propose((FLASH_ATTENTION,), module, setting)
    assert refusals == []
    return found


@torch.no_grad()
@pytest.mark.parametrize("model", [Raw, Masked, Twice])
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_a_plan_of_gains_predicts_a_gain(model, length, dim):
    operands = tuple(torch.randn(2, 4, length, dim) for _ in range(3))
    plan = ridgeline.optimize(model().eval(), operands, target="cpu", lowering="eager").plan
    (figures,) = plan.predicted.values()
    lines = [d for d in (*plan.applied, *plan.refused) if d.rewrite == "flash_attention"]
    assert len(lines) == (2 if model is Twice else 1)
    assert all(d.after.seconds < d.before.seconds for d in plan.applied)
    assert figures["after"]["seconds"] <= figures["before"]["seconds"]
    if model is not Masked:  # which makes its mask beside
        counted = sum(d.before.seconds for d in lines)
        assert counted == pytest.approx(figures["before"]["seconds"])


@torch.no_grad()
def test_where_it_pays_it_is_rewritten():
    operands = tuple(torch.randn(2, 4, 145, 16) for _ in range(3))
    plan = ridgeline.optimize(Raw().eval(), operands, target="cpu", lowering="eager").plan
    assert [d.rewrite for d in plan.applied] == ["flash_attention"]
    (figures,) = plan.predicted.values()
    assert figures["after"]["seconds"] < figures["before"]["seconds"]


def _softmax(rows: int, size: int, dtype: torch.dtype = torch.float32) -> float:
    moved = rows * size * dtype.itemsize
    stream = Stream(moved, moved, 5 * rows * size, dtype, "reduction", "softmax", rows)
    return estimate(Work((stream,)), load_target("cpu")).seconds


def test_a_softmax_costs_more_than_the_products_of_few_dimensions():
    product = estimate(Work((Gemm(145, 145, 16, 8),)), load_target("cpu")).seconds
    assert _softmax(8 * 145, 145) > 2 * product
    assert _softmax(1024, 33) == pytest.approx(
        _softmax(1024, 48), rel=1e-4
    )  # a row of 33 takes three vectors of 16
    assert _softmax(1024, 128, torch.bfloat16) > _softmax(1024, 128)


def test_a_batch_costs_what_its_columns_pad_and_each_of_its_matrices():
    cpu = load_target("cpu")

    def seconds(n: int, batch: int, dtype: torch.dtype = torch.float32) -> float:
        return estimate(Work((Gemm(64, n, 64, batch, dtype),)), cpu).seconds

    per_column = [seconds(n, 8) / n for n in (33, 48)]
    assert per_column[0] > 1.3 * per_column[1]
    assert seconds(64, 8) / 8 < seconds(64, 1) + 1e-6
    assert seconds(16, 8, torch.bfloat16) > seconds(16, 8)
    grown = [seconds(n, 8) for n in range(8, 200, 8)]
    assert all(a <= b for a, b in itertools.pairwise(grown))


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
