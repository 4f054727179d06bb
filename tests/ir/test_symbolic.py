"""An expression for a tensor agrees with the tensor at every index, or there is none."""

import pytest
import sympy
import torch
from torch.export import Dim

from ridgeline.ir.symbolic import element, index_symbol

N = 6


def _i(x):
    return torch.arange(x.shape[0])


KNOWN = {
    "arange": lambda x: _i(x),
    "arange from": lambda x: torch.arange(2, x.shape[0] + 2),
    "affine": lambda x: 3 * _i(x)[:, None] - _i(x)[None, :] + 1,
    "less": lambda x: _i(x)[None, :] < _i(x)[:, None],
    "product of conditions": lambda x: (_i(x) > 1) * (_i(x) < 4),
    "one less a condition": lambda x: 1 - (_i(x) > 1).long(),
    "condition compared with zero": lambda x: (_i(x) > 1) == 0,
    "integer condition compared with one": lambda x: (_i(x) > 1).int() != 1,
    "condition as bits": lambda x: (_i(x) > 1).to(torch.uint8),
    "and": lambda x: (_i(x) > 1) & (_i(x) < 4),
    "or": lambda x: (_i(x) > 4) | (_i(x) < 2),
    "not": lambda x: ~(_i(x) > 4),
    "tril": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(-1),
    "triu": lambda x: x.new_ones(x.shape[0], 5, dtype=torch.bool).triu(2),
    "full": lambda x: torch.full((x.shape[0],), True),
    "ones as bool": lambda x: torch.full((x.shape[0],), 1, dtype=torch.bool),
    "transposed": lambda x: (_i(x)[None, :] - 2 * _i(x)[:, None]).transpose(0, 1),
    "sliced": lambda x: _i(x)[1::2],
    "gathered": lambda x: torch.arange(40)[_i(x) + 3],
    "cumulated": lambda x: torch.ones(x.shape[0], dtype=torch.long).cumsum(0),
    "expanded": lambda x: _i(x)[:1].expand(4),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("symbolic", [False, True])
def test_expression_agrees_with_the_tensor(normal_form, name, symbolic):
    x = torch.randn(N)
    dynamic = ({0: Dim.DYNAMIC},) if symbolic else None
    graph = normal_form(KNOWN[name], x, dynamic=dynamic).graph
    known = element(graph.output_node().args[0][0])
    assert known is not None
    expected = KNOWN[name](x)
    sizes = {s: N for s in known.free_symbols if not str(s).startswith("i")}
    for index in torch.cartesian_prod(*(torch.arange(s) for s in expected.shape)).view(
        -1, expected.dim()
    ):
        at = {index_symbol(d): int(i) for d, i in enumerate(index)}
        value = known.subs(sizes).subs(at)
        value = {sympy.true: 1, sympy.false: 0}.get(value, value)
        assert value == int(expected[tuple(index)]), (name, index)


UNKNOWN = {
    "values": lambda x: x,
    "read from the end": lambda x: torch.arange(40)[_i(x) - 3],
    "bits of integers": lambda x: _i(x) & 3,
    "flipped bits": lambda x: ~_i(x),
    "flipped bits of a condition": lambda x: ~(_i(x) > 1).long(),
    "bytes wrap": lambda x: _i(x).to(torch.uint8) + 250,
    "rounded": lambda x: (_i(x) * 0.4).long(),
    "sum of conditions": lambda x: (_i(x) > 1).long() + (_i(x) > 2).long(),
    "with a factor": lambda x: torch.add(_i(x), _i(x), alpha=2),
    "remainder": lambda x: _i(x) % 2,
}


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_what_is_not_certain_has_no_expression(normal_form, name):
    graph = normal_form(UNKNOWN[name], torch.randn(N)).graph
    assert element(graph.output_node().args[0][0]) is None
