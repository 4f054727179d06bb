"""Equal views of one tensor are one view in normal form."""

import pytest
import torch
from torch import Tensor

aten = torch.ops.aten


def opened_twice(x: Tensor, c: Tensor) -> Tensor:
    return x * c.unsqueeze(1) + (x * c.unsqueeze(1)).cos()


def opened_differently(x: Tensor, c: Tensor) -> Tensor:
    return x * c.unsqueeze(1) + x * c.unsqueeze(0)


def returned(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x * c.unsqueeze(1), c.unsqueeze(1), c.unsqueeze(1)


def copied(x: Tensor, c: Tensor) -> Tensor:
    return x * c.t().reshape(4, 1, 4) + x * c.t().reshape(4, 1, 4)


def written_between(x: Tensor, c: Tensor) -> Tensor:
    d = c.clone()
    before = x * d.unsqueeze(1)
    d[..., 0].mul_(7.0)
    return before + (x * d.unsqueeze(1)).sin()


def written_through_one(x: Tensor, c: Tensor) -> Tensor:
    d = c.clone()
    first = d.unsqueeze(1)
    d.unsqueeze(1)[..., 1:].mul_(3.0)
    return x * first + x * d.unsqueeze(1)


@pytest.mark.parametrize(
    ("function", "operator", "views"),
    [
        (opened_twice, aten.unsqueeze.default, 1),
        (opened_differently, aten.unsqueeze.default, 2),
        (returned, aten.unsqueeze.default, 3),
        (copied, aten.reshape.default, 2),
        (written_between, aten.unsqueeze.default, 1),
        (written_through_one, aten.unsqueeze.default, 1),
    ],
)
def test_equal_views_are_one(normal_form, function, operator, views):
    x, c = torch.randn(4, 4, 4), torch.randn(4, 4)
    module = normal_form(function, x, c)
    assert len(module.graph.find_nodes(op="call_function", target=operator)) == views
    got, expected = module(x, c), function(x, c)
    for a, b in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(a, b)
