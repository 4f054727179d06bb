"""Guards: a captured program takes a call's sizes exactly where it computes what the model does."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from ridgeline.ir.guards import ShapeGuards


def _guards(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> ShapeGuards:
    """The guards of a function of tensors of these shapes, every dimension over 1 free."""

    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    free = tuple({d: Dim.AUTO for d, s in enumerate(shape) if s > 1} for shape in shapes)
    inputs = tuple(torch.zeros(s) for s in shapes)
    exported = torch.export.export(Model(), inputs, dynamic_shapes={"args": free}, strict=False)
    return ShapeGuards.of(exported.graph_module)


def _accepted(guards: ShapeGuards, shapes: list[tuple[tuple[int, ...], ...]]) -> list:
    return [s for s in shapes if guards.accept([torch.zeros(x) for x in s])]


def _grid(dims: int, sizes: range = range(8)) -> list[tuple[tuple[int, ...], ...]]:
    return [(s,) for s in itertools.product(sizes, repeat=dims)]


def test_free_dimensions_take_every_size_over_one():
    guards = _guards(lambda x: x * 2, (3, 1, 4))
    expected = [s for s in _grid(3) if s[0][0] > 1 and s[0][1] == 1 and s[0][2] > 1]
    assert _accepted(guards, _grid(3)) == expected


def test_no_free_dimension_takes_its_shape_alone():
    guards = _guards(lambda x: x * 2, (1, 1))
    assert (guards.binds, guards.conditions) == ((), ())
    assert _accepted(guards, _grid(2)) == [((1, 1),)]


def test_sizes_that_agree():
    guards = _guards(lambda x, y: x @ y, (3, 4), (4, 5))
    calls = [((m, k), (j, n)) for m, k, j, n in itertools.product((2, 3, 6), repeat=4)]
    assert _accepted(guards, calls) == [c for c in calls if c[0][1] == c[1][0]]


def test_sizes_derived_from_others():
    guards = _guards(lambda x, y: x + y[1:], (3,), (4,))
    calls = [((n,), (m,)) for n, m in itertools.product(range(2, 7), repeat=2)]
    assert guards.derived
    assert _accepted(guards, calls) == [c for c in calls if c[1][0] == c[0][0] + 1]


@pytest.mark.parametrize("size", [4, 6])
def test_both_sides_of_a_branch(size):
    guards = _guards(lambda x: x * 2 if x.shape[0] > 4 else x, (size,))
    expected = [s for s in _grid(1) if s[0][0] > 1 and (s[0][0] > 4) == (size > 4)]
    assert _accepted(guards, _grid(1)) == expected


def test_a_branch_on_two_sizes():
    guards = _guards(lambda x: x.sum(0) if x.shape[0] > x.shape[1] else x.sum(1), (5, 3))
    expected = [s for s in _grid(2) if s[0][0] > s[0][1] > 1]
    assert _accepted(guards, _grid(2)) == expected


def test_divisibility():
    guards = _guards(lambda x: x.view(-1, 3).sum(1), (9,))
    calls = [((n,),) for n in range(2, 30)]
    assert {n for ((n,),) in _accepted(guards, calls)} == set(range(6, 30, 3))


def test_what_is_accepted_is_computed_rightly():
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat((x, y), 0)
        return z.sum(0) if max(x.shape[0], y.shape[0]) < 6 else z.mean(0) // x.shape[0]

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    inputs = torch.rand(3, 2), torch.rand(5, 2)
    free = ({0: Dim.AUTO}, {0: Dim.AUTO})
    exported = torch.export.export(Model(), inputs, dynamic_shapes=free, strict=False)
    guards, run = ShapeGuards.of(exported.graph_module), exported.module(check_guards=False)
    taken = 0
    for n, m in itertools.product(range(2, 9), repeat=2):
        x, y = torch.rand(n, 2), torch.rand(m, 2)
        if guards.accept([x, y]):
            taken += 1
            assert torch.equal(run(x, y), function(x, y))
    assert taken == 16


def test_inputs_that_are_no_tensors_are_passed_over():
    graph = fx.Graph()
    for name, value in (("n", 3), ("x", torch.zeros(2, 3))):
        graph.placeholder(name).meta["val"] = value
    graph.output(())
    guards = ShapeGuards.of(fx.GraphModule(nn.Module(), graph))
    assert guards.shapes == ((1, torch.Size((2, 3))),)
