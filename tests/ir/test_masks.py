"""A mask is proven from its builder for every size, or stays as it is."""

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from ridgeline.ir.masks import analyse

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def _square(x: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(x.shape[0])
    return i[:, None], i[None, :]


def causal(x):
    i, j = _square(x)
    return j <= i


def causal_from_the_other_side(x):
    i, j = _square(x)
    return i >= j


def strictly_below(x):
    i, j = _square(x)
    return j < i


def tril(x):
    return torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(2)


def negated_triu(x):
    return ~torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)


def through_views(x):
    i, j = _square(x)
    return (j <= i)[None, None].expand(3, 1, -1, -1).contiguous()


def added(x):
    return torch.where(causal(x), 0.0, -INF)


def added_lowest(x):
    return torch.where(causal(x), torch.zeros(()), LOWEST)


@pytest.mark.parametrize(
    ("build", "diagonal"),
    [
        (causal, 0),
        (causal_from_the_other_side, 0),
        (strictly_below, -1),
        (tril, 2),
        (negated_triu, 0),
        (through_views, 0),
        (added, 0),
        (added_lowest, 0),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_triangle_is_proven(normal_form, build, diagonal, symbolic):
    dynamic = (({0: Dim.DYNAMIC},),) if symbolic else None
    graph = normal_form(build, torch.randn(7), dynamic=dynamic and dynamic[0]).graph
    mask = analyse(graph.output_node().args[0][0])
    assert mask.rest is None
    assert mask.diagonal == diagonal


def everything(x):
    i, j = _square(x)
    return (i >= 0) & (j < x.shape[0])


def test_mask_that_keeps_everything_disappears(normal_form):
    graph = normal_form(everything, torch.randn(7), dynamic=({0: Dim.DYNAMIC},)).graph
    mask = analyse(graph.output_node().args[0][0])
    assert (mask.diagonal, mask.rest) == (None, None)


def window(x):
    i, j = _square(x)
    return (j <= i) & (j > i - 3)


def anticausal(x):
    i, j = _square(x)
    return j >= i


def scaled(x):
    i, j = _square(x)
    return 2 * j <= i


def small_penalty(x):
    return torch.where(causal(x), 0.0, -10.0)


def kept_entries_shifted(x):
    return torch.where(causal(x), 1.0, -INF)


def data_dependent(x):
    i, j = _square(x)
    return j <= i + (x > 0).long()[:, None]


def rows_without_a_key(x):
    i, j = _square(x)
    return torch.where(j < i, 0.0, LOWEST)


@pytest.mark.parametrize(
    "build",
    [
        anticausal,
        scaled,
        small_penalty,
        kept_entries_shifted,
        data_dependent,
        rows_without_a_key,
    ],
)
def test_what_is_no_triangle_stays(normal_form, build):
    graph = normal_form(build, torch.randn(7)).graph
    node = graph.output_node().args[0][0]
    mask = analyse(node)
    assert mask.diagonal is None
    assert mask.rest is node


def test_the_far_side_of_a_window_stays_as_mask(normal_form):
    graph = normal_form(window, torch.randn(7)).graph
    mask = analyse(graph.output_node().args[0][0])
    assert mask.diagonal == 0
    assert mask.rest is not None
    assert mask.rest.target is torch.ops.aten.gt.Tensor


def causal_and_padding(x, keep):
    return causal(x) & keep[:, None, None, :]


def test_padding_is_split_from_the_triangle(normal_form):
    keep = torch.ones(2, 7, dtype=torch.bool)
    graph = normal_form(causal_and_padding, torch.randn(7), keep).graph
    mask = analyse(graph.output_node().args[0][0])
    assert mask.diagonal == 0
    assert mask.rest is not None
    assert tuple(mask.rest.meta["val"].shape) == (2, 1, 1, 7)
