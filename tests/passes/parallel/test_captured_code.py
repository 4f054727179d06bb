"""Lines of a captured graph are equal where the code is, and only there."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ridgeline.ir.capture import capture
from ridgeline.passes.parallel.captured_code import code_of
from ridgeline.passes.parallel.layouts import COLUMN, ROW, VOCABULARY, Part

SPLITS = {
    "q.weight": Part(COLUMN),
    "o.weight": Part(ROW),
    "table.weight": Part(VOCABULARY),
}


class OfOneRank(nn.Module):
    """A rank's part of a table, and of a layer with heads of 4 channels."""

    def __init__(
        self, heads: int, start: int, scale: float, slope: float, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.table, self.start = Table(start), start
        self.q, self.o = nn.Linear(8, 4 * heads, bias=False), nn.Linear(4 * heads, 8, bias=False)
        self.scale, self.slopes = scale, torch.tensor([slope, 0.2])
        self.names = names

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        heads = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        weights = (heads @ heads.transpose(-1, -2) * self.scale).softmax(-1)
        whole = weights[:, :1].expand(-1, heads.shape[1], -1, -1) @ heads
        by_name = {name: x * ord(name) for name in self.names}
        x = by_name["a"] - by_name["b"].exp()
        return x + self.o(whole.transpose(1, 2).flatten(2)) + self.slopes.sum()


class Table(nn.Module):
    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.weight = start, nn.Parameter(torch.randn(5, 8))

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self.start
        return nn.functional.embedding(rows.clamp(0, 4), self.weight)


@functools.cache
def captured(
    heads: int = 2,
    start: int = 0,
    scale: float = 0.5,
    slope: float = 0.1,
    names: tuple[str, ...] = ("a", "b"),
) -> fx.Graph:
    part = OfOneRank(heads, start, scale, slope, names).eval()
    with torch.no_grad():
        return capture(part, (torch.arange(6).view(2, 3),)).program.module.graph


def lines(equal: bool, **options: Any) -> list[str]:
    return [text for text, _ in code_of(captured(**options), SPLITS, equal)]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("other", [{"scale": 0.25}, {"slope": 0.3}])
def test_another_constant_is_another_line(other: dict[str, float], equal: bool) -> None:
    mine, theirs = lines(equal), lines(equal, **other)
    first = next(line for line in theirs if line not in mine)
    assert first.startswith("aten.mul" if "scale" in other else "slopes")


@pytest.mark.parametrize("equal", [True, False])
def test_the_order_of_what_does_not_depend_on_each_other_is_not_compared(equal: bool) -> None:
    mine, theirs = lines(equal), lines(equal, names=("b", "a"))
    assert mine != theirs
    assert sorted(mine) == sorted(theirs)


@pytest.mark.parametrize("equal", [True, False])
def test_where_a_part_of_the_vocabulary_begins_is_not_compared(equal: bool) -> None:
    assert lines(equal) == lines(equal, start=5)


def test_numbers_of_heads_are_compared_only_where_they_are_equal() -> None:
    assert lines(False, heads=1) == lines(False, heads=2)
    assert lines(True, heads=1) != lines(True, heads=2)
