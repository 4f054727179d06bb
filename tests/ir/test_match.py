"""Patterns are plain functions; sites, near misses, several outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.match import find, trace

aten = torch.ops.aten


def normed_residual(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + r
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * w, h


@pytest.fixture(scope="module")
def pattern():
    x, w = torch.empty(2, 3, 8), torch.empty(8)
    return trace(normed_residual, aten.rsqrt.default, x=x, r=x, w=w, eps=0.123)


def test_two_outputs_and_a_literal(normal_form, pattern):
    def block(x, r, w):
        h = r + x
        y = w * (torch.rsqrt(1e-5 + (h**2).mean(-1, True)) * h)
        return F.silu(y) + h

    x = torch.randn(2, 3, 8)
    graph = normal_form(block, x, x.clone(), torch.randn(8)).graph
    (site,), misses = find(pattern, graph)
    assert misses == []
    assert site.literals == {"eps": 1e-5}
    assert [o.target for o in site.outs] == [aten.mul.Tensor, aten.add.Tensor]


def test_interior_value_read_elsewhere_is_a_near_miss(normal_form, pattern):
    def block(x, r, w):
        h = x + r
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return h * inverse * w, inverse

    x = torch.randn(2, 3, 8)
    graph = normal_form(block, x, x.clone(), torch.randn(8)).graph
    sites, [(anchor, miss)] = find(pattern, graph)
    assert sites == []
    assert anchor.target is aten.rsqrt.default
    assert "also read by the model's return value" in miss.reason


def test_wrong_axis_is_a_near_miss(normal_form, pattern):
    def block(x, r, w):
        h = x + r
        return h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + 1e-5) * w, h

    x = torch.randn(2, 3, 8)
    graph = normal_form(block, x, x.clone(), torch.randn(8)).graph
    sites, misses = find(pattern, graph)
    assert sites == []
    assert len(misses) == 1


def test_casts_inside_are_seen_through(normal_form, pattern):
    def block(x, r, w):
        h = x + r
        wide = h.float()
        return (h * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5).bfloat16()) * w, h

    x = torch.randn(2, 3, 8).bfloat16()
    graph = normal_form(block, x, x.clone(), torch.randn(8).bfloat16()).graph
    (site,), _ = find(pattern, graph)
    assert sum(n.target is aten.to.dtype for n in site.nodes) == 2


def test_examples_must_name_the_parameters():
    with pytest.raises(TypeError, match="name its parameters in order"):
        trace(normed_residual, aten.rsqrt.default, x=torch.empty(1))
