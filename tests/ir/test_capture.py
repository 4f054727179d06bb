"""Capture: what a captured call computes is what the model computes, for every call it accepts."""

import itertools
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir.call import flatten
from ridgeline.ir.capture import CaptureError, capture


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


# -- arguments and results -------------------------------------------------------------------------


class _Pair(NamedTuple):
    left: Tensor
    right: Tensor


class _Mode(Enum):
    SUM = "sum"
    MEAN = "mean"


X, Y = _random(3, 4), _random(3, 4, seed=1)
CALLS = {
    "positional": (lambda m, x, y: x - y, (X, Y), {}),
    "keywords in another order": (lambda m, *, y, x: x - y, (), {"x": X, "y": Y}),
    "both": (lambda m, x, *, y: x - y, (X,), {"y": Y}),
    "none": (lambda m, x, mask=None: x if mask is None else x * mask, (X, None), {}),
    "default left out": (lambda m, x, scale=2.0: x * scale, (X,), {}),
    "no tensor at all": (lambda m, n: torch.arange(n) * 2, (5,), {}),
    "nested": (
        lambda m, d, pair: d["a"][0] - d["b"]["c"] + pair[1],
        ({"a": [X], "b": {"c": Y}}, (X, Y)),
        {},
    ),
    "empty containers": (lambda m, x, a, b, c: x * (1 + len(a) + len(b)), (X, [], {}, ()), {}),
    "named tuple": (lambda m, p: p.left - p.right, (_Pair(X, Y),), {}),
    "string and enum": (
        lambda m, x, how, mode: getattr(x, how)() + getattr(x, mode.value)(),
        (X, "exp", _Mode.MEAN),
        {},
    ),
    "dtype": (lambda m, x, dtype: x.to(dtype), (X, torch.float64), {}),
    "one tensor twice": (lambda m, x, y: x - 2 * y, (X, X), {}),
    "integers": (lambda m, x: x // 2 + x % 3, (torch.arange(12).view(3, 4),), {}),
    "booleans": (lambda m, x, y: x & ~y, (X > 0, Y > 0), {}),
    "complex": (lambda m, x: torch.view_as_real(x * x), (torch.complex(X, Y),), {}),
    "float16": (lambda m, x: x * 2, (X.half(),), {}),
    "scalar tensor": (lambda m, x, s: x * s, (X, torch.tensor(3.0)), {}),
    "strided": (lambda m, x: x + 1, (_random(8, 6)[::2, 1::3],), {}),
    "expanded": (lambda m, x: x + 1, (_random(1, 4).expand(3, 4),), {}),
    "returns an input": (lambda m, x: x, (X,), {}),
    "returns a view": (lambda m, x: x.t(), (X,), {}),
    "returns one tensor twice": (lambda m, x: (x + 1,) * 2, (X,), {}),
    "returns a parameter": (lambda m, x: (m.w, x @ m.w), (X,), {}),
    "returns None and numbers": (lambda m, x: (x + 1, None, 7, "text", 0.5), (X,), {}),
    "returns a dict": (lambda m, x: {"b": x + 1, "a": [x, None]}, (X,), {}),
    "returns a named tuple": (lambda m, x: _Pair(x + 1, x - 1), (X,), {}),
    "returns a size": (lambda m, x: (x + 1, x.shape[0], x.shape[0] * 2), (X,), {}),
    "returns no tensor": (lambda m, x: None, (X,), {}),
    "returns a constant": (lambda m, x: torch.ones(2), (X,), {}),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_models_own(module_of, run, same, name, dynamic):
    function, args, kwargs = CALLS[name]
    model = module_of(function, w=nn.Parameter(_random(4, 4)))
    captured = capture(model, args, kwargs, dynamic=dynamic)
    same(run(captured, *args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("name", ["positional", "keywords in another order", "both", "nested"])
def test_a_graph_serves_other_values_and_sizes(module_of, run, same, name):
    function, args, kwargs = CALLS[name]
    model = module_of(function)
    captured = capture(model, args, kwargs)

    def other(x: Any) -> Any:
        return _random(7, 4, seed=9) * x.sum() if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(other, (args, kwargs))
    same(run(captured, *args, **kwargs), model(*args, **kwargs))


def test_a_returned_size_follows_the_call(module_of, run):
    model = module_of(lambda m, x: (x + 1, x.shape[0] * 2))
    captured = capture(model, (X,))
    assert run(captured, _random(9, 4))[1] == 18


# -- what a call's signature tells apart -----------------------------------------------------------

APART = {
    "dtype": ((X,), (X.double(),)),
    "rank": ((X,), (X[0],)),
    "size one": ((X,), (X[:1],)),
    "size zero": ((X,), (X[:0],)),
    "zero and one": ((X[:1],), (X[:0],)),
    "gradient": ((X,), (X.clone().requires_grad_(),)),
    "int": ((X, 1), (X, 2)),
    "bool and int": ((X, True), (X, 1)),
    "int and float": ((X, 1), (X, 1.0)),
    "none and tensor": ((X, None), (X, Y)),
    "list and tuple": (([X],), ((X,),)),
    "keys": (({"a": X},), ({"b": X},)),
    "text": ((X, "1"), (X, 1)),
    "which argument": ((X, None), (None, X)),
}


@pytest.mark.parametrize("name", APART)
def test_calls_that_need_graphs_of_their_own(name):
    a, b = APART[name]
    assert flatten(a, {}).key != flatten(b, {}).key
    assert flatten(a, {}).key == flatten(a, {}).key


def test_calls_that_differ_in_larger_sizes_share_a_signature():
    assert flatten((X,), {}).key == flatten((_random(9, 4),), {}).key


def test_positional_and_keyword_are_apart():
    assert flatten((X,), {}).key != flatten((), {"x": X}).key


@dataclass
class _Options:
    scale: float


@pytest.mark.parametrize("value", [_Options(2.0), {1, 2}, object(), lambda x: x, range(3)])
def test_opaque_arguments_are_named(value):
    kind = type(value).__name__
    with pytest.raises(CaptureError, match=rf"an argument is a {kind}.*pass tensors"):
        flatten((X, value), {})


# -- sizes -----------------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("sizes", [(3, 5), (3, 1), (1, 5), (1, 1), (0, 5), (3, 0)], ids=str)
def test_sizes_zero_and_one(run, same, sizes):
    model, x = _mlp(), _random(*sizes, 4)
    captured = capture(model, (x,))
    same(run(captured, x), model(x))
    free = tuple(d for d, s in enumerate(sizes) if s > 1)
    assert captured.program.dynamic == ({} if not free else {"flat_0": free})
    for other in itertools.product((0, 1, 3, 7), (0, 1, 5, 9)):
        fits = all(o > 1 if s > 1 else o == s for o, s in zip(other, sizes, strict=True))
        x = _random(*other, 4)
        assert captured.guards.accept([x]) == fits
        if fits:
            same(run(captured, x), model(x))


def test_features_stay_fixed():
    captured = capture(_mlp(), (_random(3, 5, 4),))
    assert not captured.guards.accept([_random(3, 5, 6)])


def test_a_dimension_the_model_fixes_is_guarded(module_of, run, same):
    model = module_of(lambda m, x: x.view(6, -1))
    x = _random(3, 4)
    captured = capture(model, (x,))
    for rows in (9, 15):
        y = _random(rows, 4)
        same(run(captured, y), model(y))
    assert not any(captured.guards.accept([_random(rows, 4)]) for rows in (1, 2, 4, 5, 7, 8))


def test_a_branch_on_a_size_is_guarded(module_of):
    model = module_of(lambda m, x: x * 2 if x.shape[0] > 4 else x - 1)
    captured = capture(model, (X,))
    assert captured.guards.accept([_random(4, 4)])
    assert not captured.guards.accept([_random(5, 4)])


def test_dimensions_that_must_agree(module_of):
    model = module_of(lambda m, x, y: x + y)
    captured = capture(model, (X, Y))
    assert captured.guards.accept([_random(5, 4), _random(5, 4)])
    assert not captured.guards.accept([_random(5, 4), _random(6, 4)])


def test_nothing_is_free_when_asked():
    captured = capture(_mlp(), (X,), dynamic=False)
    assert captured.program.dynamic == {}
    assert captured.guards.accept([X])
    assert not captured.guards.accept([_random(5, 4)])


def test_fixed_sizes_are_tried_where_free_ones_fail(monkeypatch):
    export, shapes = torch.export.export, []

    def fails_once(*args, dynamic_shapes, **kwargs):
        shapes.append(dynamic_shapes)
        if dynamic_shapes is not None:
            raise RuntimeError("no free dimension here")
        return export(*args, dynamic_shapes=dynamic_shapes, **kwargs)

    monkeypatch.setattr(torch.export, "export", fails_once)
    captured = capture(_mlp(), (X,))
    assert captured.program.dynamic == {}
    assert [s is None for s in shapes] == [False, True]
