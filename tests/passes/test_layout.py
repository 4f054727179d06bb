"""A rewritten value lies in memory as what it replaces wherever somebody can tell."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ridgeline

HEADS = (2, 512, 8, 64)


def fused_attention_viewed(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).view(2, 512, 512)


def fused_attention_returned(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_in_raw_operations_viewed(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.softmax(q @ k.transpose(2, 3) / 8, -1) @ v
    return out.view(16, 512, 64)


def gated_transposed_viewed(gate, up, _):
    gate, up = gate.flatten(0, 1).mT, up.flatten(0, 1).mT
    return (F.silu(gate) * up).mT.view(-1)


def gated_transposed_returned(gate, up, _):
    gate, up = gate.flatten(0, 1).mT, up.flatten(0, 1).mT
    return F.silu(gate) * up


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    turned = torch.cat((-x[..., 32:], x[..., :32]), -1)
    return x * angle.cos() + turned * angle.sin()


def rotary_viewed(q, k, _):
    angle = torch.arange(512.0)[None, None, :, None].expand(1, 1, 512, 64)
    q, k = q.reshape(2, 8, 512, 64), k.reshape(2, 8, 512, 64)
    return _rotated(q, angle).view(-1), _rotated(k, angle).view(2, 8, -1)


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize(
    "function",
    [
        *(fused_attention_viewed, fused_attention_returned, attention_in_raw_operations_viewed),
        *(gated_transposed_viewed, gated_transposed_returned, rotary_viewed),
    ],
)
def test_views_and_the_caller_find_the_same_strides(as_module, function, lowering):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(HEADS, generator=generator) for _ in range(3)]
    fast = ridgeline.optimize(as_module(function), target="cpu", lowering=lowering)
    got, expected = fast(*inputs), function(*inputs)
    assert fast.plan.applied, fast.fallbacks
    pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected, strict=True)
    for a, b in pairs:
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_memory_format_is_kept(as_module, lowering):
    def function(x):
        y = x.contiguous(memory_format=torch.channels_last)
        flat = y.permute(0, 2, 3, 1).view(-1, 6) * 2
        y += 1
        return flat, x * 2, y, x.to(torch.float32, memory_format=torch.channels_last)

    x = torch.randn(2, 6, 4, 4)
    fast = ridgeline.optimize(as_module(function), target="cpu", lowering=lowering)
    for got, expected in zip(fast(x), function(x), strict=True):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
