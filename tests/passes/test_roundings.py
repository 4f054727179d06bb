"""Roundings that a model asks for, numbers that only look like others, and values no kernel takes:
whatever is rewritten, the optimised model computes what the model computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline

FLOAT8 = torch.float8_e4m3fn


def rms(x: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(mean + 1e-6) * weight


def silu_through_half(x, y, w):
    return F.silu(x.to(torch.float16).float()) * y


def silu_through_float8(x, y, w):
    return y * 30 + F.silu(x.to(FLOAT8).float()) * y


def mean_through_half(x, y, w):
    return rms(x, x.pow(2).mean(-1, keepdim=True).to(torch.float16).float(), w)


def norm_in_float8(x, y, w):
    return rms(x, x.pow(2).mean(-1, keepdim=True), w).to(FLOAT8).float()


def norm_of_float8(x, y, w):
    x = x.to(FLOAT8).float()
    return rms(x, x.pow(2).mean(-1, keepdim=True), w)


def attention_through_float8(x, y, w):
    return torch.softmax(x @ y.mT * 0.25, -1).to(FLOAT8).float() @ y


def logistic_with_alpha(x, y, w):
    return x / torch.add(torch.exp(-x), 1, alpha=3) * y


def gelu_with_alpha(x, y, w):
    return 0.5 * x * torch.add(torch.erf(x * 2**-0.5), 1, alpha=2) * y


def _turned(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 32:], x[..., :32]), -1)


def rotary_with_alpha(x, y, w):
    x = x[None, ..., :64]
    return torch.add(x * y[None, :1, :, :64], _turned(x) * w[:64], alpha=0.5)


def rotary_joined_over_heads(x, y, w):
    a, rest = x[None, ..., :64], x[None, ..., 64:128]
    turned = a * y[None, :1, :, :64] + _turned(a) * w[:64]
    return torch.cat((turned, rest), 1)


def scale_cut_to_an_integer(x, y, w):
    return torch.softmax(x @ y.mT * torch.full((), 1.7, dtype=torch.int64), -1) @ y


def mask_of_no_dimensions(x, y, w):
    return torch.softmax(x @ y.mT * 0.25 + w[0], -1) @ y


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    "function",
    [
        *(silu_through_half, silu_through_float8, mean_through_half, norm_in_float8),
        *(norm_of_float8, attention_through_float8, logistic_with_alpha, gelu_with_alpha),
        *(rotary_with_alpha, rotary_joined_over_heads, scale_cut_to_an_integer),
        mask_of_no_dimensions,
    ],
)
def test_equal_at_every_magnitude(as_module, function, factor):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 128, 256, generator=generator) for _ in range(2))
    w = torch.randn(256, generator=generator)
    fast = ridgeline.optimize(as_module(function), (x, y, w), target="a100", lowering="eager")
    got, expected = fast(x * factor, y, w), function(x * factor, y, w)
    assert fast.captures == 1
    assert not any("report" in d.reason for d in fast.plan.refused), fast.plan.refused
    assert torch.equal(got.isfinite(), expected.isfinite())
    scale = expected.nan_to_num(0, 0, 0).abs().max()
    assert (got - expected).nan_to_num().abs().max() <= 1e-5 * scale


@torch.no_grad()
def test_a_weight_that_is_not_finite_costs_one_layer():
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(2))).eval()
    model[1].weight[0, 0] = torch.inf
    fast = ridgeline.optimize(
        model, (torch.randn(4, 256),), target="a100", tolerance=0.5, objective="memory"
    )
    reasons = [d.reason for d in fast.plan.refused if d.rewrite == "quantized_linear"]
    assert reasons == ["1 of the 65536 weights are infinite or NaN"]
    assert len(fast.plan.applied) == 1
