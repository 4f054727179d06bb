"""Capture: what a captured call computes is what the model computes, for every call it accepts."""

import itertools
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir.capture import Captured, CaptureError, capture, flatten


class _Function(nn.Module):
    """A function of the module and its arguments, as a module."""

    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def _model(function: Any, **members: Any) -> nn.Module:
    return _Function(function, **members).eval()


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    call = flatten(args, kwargs)
    assert captured.guards.accept(call.flat)
    return captured.finish(call, captured.program.module(*call.flat))


def _same(got: Any, expected: Any) -> None:
    """Equal in type, structure, dtype and every bit."""
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        _same(list(got.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            _same(a, b)
    else:
        assert got == expected


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


# -- arguments and results -------------------------------------------------------------------------


class _Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class _Result:
    y: Tensor


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
def test_results_are_the_models_own(name, dynamic):
    function, args, kwargs = CALLS[name]
    model = _model(function, w=nn.Parameter(_random(4, 4)))
    captured = capture(model, args, kwargs, dynamic=dynamic)
    _same(_run(captured, *args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("name", ["positional", "keywords in another order", "both", "nested"])
def test_a_graph_serves_other_values_and_sizes(name):
    function, args, kwargs = CALLS[name]
    model = _model(function)
    captured = capture(model, args, kwargs)

    def other(x: Any) -> Any:
        return _random(7, 4, seed=9) * x.sum() if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(other, (args, kwargs))
    _same(_run(captured, *args, **kwargs), model(*args, **kwargs))


def test_a_returned_size_follows_the_call():
    model = _model(lambda m, x: (x + 1, x.shape[0] * 2))
    captured = capture(model, (X,))
    assert _run(captured, _random(9, 4))[1] == 18


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
def test_sizes_zero_and_one(sizes):
    model, x = _mlp(), _random(*sizes, 4)
    captured = capture(model, (x,))
    _same(_run(captured, x), model(x))
    free = tuple(d for d, s in enumerate(sizes) if s > 1)
    assert captured.program.dynamic == ({} if not free else {"flat_0": free})
    for other in itertools.product((0, 1, 3, 7), (0, 1, 5, 9)):
        fits = all(o > 1 if s > 1 else o == s for o, s in zip(other, sizes, strict=True))
        x = _random(*other, 4)
        assert captured.guards.accept([x]) == fits
        if fits:
            _same(_run(captured, x), model(x))


def test_features_stay_fixed():
    captured = capture(_mlp(), (_random(3, 5, 4),))
    assert not captured.guards.accept([_random(3, 5, 6)])


def test_a_dimension_the_model_fixes_is_guarded():
    model = _model(lambda m, x: x.view(6, -1))
    x = _random(3, 4)
    captured = capture(model, (x,))
    for rows in (9, 15):
        y = _random(rows, 4)
        _same(_run(captured, y), model(y))
    assert not any(captured.guards.accept([_random(rows, 4)]) for rows in (1, 2, 4, 5, 7, 8))


def test_a_branch_on_a_size_is_guarded():
    model = _model(lambda m, x: x * 2 if x.shape[0] > 4 else x - 1)
    captured = capture(model, (X,))
    assert captured.guards.accept([_random(4, 4)])
    assert not captured.guards.accept([_random(5, 4)])


def test_dimensions_that_must_agree():
    model = _model(lambda m, x, y: x + y)
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


# -- weights, modes and state ----------------------------------------------------------------------


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.embed(ids))))


def test_tied_weights_and_a_module_used_twice():
    torch.manual_seed(0)
    model, ids = _Tied().eval(), torch.tensor([[1, 2, 6], [0, 0, 5]])
    module = capture(model, (ids,)).program.module
    _same(module(ids)[0], model(ids))
    weights = [n.target for n in module.graph.find_nodes(op="get_attr")]
    for name, held in module.named_parameters(remove_duplicate=False):
        assert held is model.get_parameter(name)
    assert {model.get_parameter(w).data_ptr() for w in weights} == {
        p.data_ptr() for p in model.parameters()
    }
    model.embed.weight.mul_(2)
    _same(module(ids)[0], model(ids))


def test_nodes_carry_the_path_of_their_module():
    model = nn.ModuleDict({"outer": nn.Sequential(nn.Linear(4, 4))})
    wrapped = _model(lambda m, x: m.parts["outer"](x), parts=model)
    module = capture(wrapped, (X,)).program.module
    (linear,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    paths = [path for path, _ in linear.meta["nn_module_stack"].values()]
    assert paths[-1] == "parts.outer.0"


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.hidden.add_(2)
        return x + self.count + self.hidden


def test_a_buffer_counts_on():
    model, other = _Counter().eval(), _Counter().eval()
    captured = capture(model, (X,))
    assert model.count.item() == 0  # capturing does not run a step
    for _ in range(3):
        _same(_run(captured, X), other(X))
    assert (model.count.item(), model.hidden.item()) == (3, 6)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_keeps_its_statistics(affine):
    torch.manual_seed(0)
    model, other = (nn.BatchNorm1d(4, affine=affine).train() for _ in range(2))
    captured = capture(model, (_random(3, 4),))
    assert model.num_batches_tracked == 0
    for rows in (3, 5, 8):
        x = _random(rows, 4, seed=rows)
        _same(_run(captured, x), other(x))
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        _same(ours, theirs)


def test_an_argument_changed_in_place():
    def change(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x * 2

    model = _model(change)
    kept = X.clone()
    captured = capture(model, (kept, Y))
    assert torch.equal(kept, X)  # capturing does not run a step
    ours, theirs = X.clone(), X.clone()
    _same(_run(captured, ours, Y), model(theirs, Y))
    assert torch.equal(ours, theirs)


def test_a_returned_input_is_the_callers_own_tensor():
    model = _model(lambda m, x: x)
    captured = capture(model, (X,))
    assert _run(captured, X) is X


def test_a_returned_view_shares_the_callers_memory():
    model, x = _model(lambda m, x: x.t()), X.clone()
    out = _run(capture(model, (x,)), x)
    x[0, 1] = 9
    assert out[1, 0] == 9


def test_submodules_keep_their_modes():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).eval()
    model[1].train()
    out = _run(capture(model, (torch.ones(64, 8),)), torch.ones(64, 8))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert [m.training for m in model.modules()] == [False, False, True]


def test_dropout_draws_anew_and_as_eager_does():
    model, x = nn.Dropout(0.5).train(), torch.ones(64, 8)
    captured = capture(model, (x,))
    torch.manual_seed(3)
    first, second = _run(captured, x), _run(captured, x)
    torch.manual_seed(3)
    _same((first, second), (model(x), model(x)))
    assert not torch.equal(first, second)


def test_random_state_is_left_alone():
    model = nn.Dropout(0.5).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    capture(model, (torch.ones(64, 8),))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_phase_and_gradients(train, grad):
    torch.manual_seed(0)
    model = _mlp().train(train)
    with torch.set_grad_enabled(grad):
        captured = capture(model, (X,))
        out = _run(captured, X)
        expected = model(X)
    assert captured.program.training == (train and grad)
    assert captured.program.phase == ("training" if train and grad else "forward")
    if train and grad:
        both = [torch.autograd.grad(y, list(model.parameters()), Y[:, :2]) for y in (out, expected)]
        _same(*both)


def test_gradients_reach_an_input_in_eval_mode():
    model, x = _mlp(), X.clone().requires_grad_()
    with torch.enable_grad():
        captured = capture(model, (x,))
        (ours,) = torch.autograd.grad(_run(captured, x).sum(), x)
        (theirs,) = torch.autograd.grad(model(x).sum(), x)
    assert captured.program.training
    _same(ours, theirs)


def test_capture_leaves_the_model_and_grad_mode_as_they_were():
    model = _mlp()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.enable_grad():
        capture(model, (X,))
        assert torch.is_grad_enabled()
    assert before == {name: set(vars(m)) for name, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


# -- what cannot be captured -----------------------------------------------------------------------


def _if_positive(m: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def _item(m: nn.Module, x: Tensor) -> Tensor:
    return x[: int(x.abs().max().item())]


def _tolist(m: nn.Module, x: Tensor) -> Tensor:
    return torch.ones(4)[x.long().tolist()[0]]


def _while(m: nn.Module, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2
    return x


@pytest.mark.parametrize("function", [_if_positive, _item, _while, _tolist])
def test_control_flow_on_values_names_the_line_and_the_way_out(function):
    with pytest.raises(CaptureError) as caught:
        capture(_model(function), (X,))
    text = str(caught.value)
    assert text.startswith("cannot capture _Function: ")
    assert f"{__file__}:" in text
    assert "use torch.where instead of `if`" in text


def test_the_way_out_works():
    model = _model(lambda m, x: torch.where(x.sum() > 0, x * 2, x))
    captured = capture(model, (X,))
    for x in (X, -X):
        _same(_run(captured, x), model(x))


def test_an_error_of_the_model_itself_keeps_its_words():
    def wrong(m: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("the model wants an even length")

    with pytest.raises(CaptureError, match="the model wants an even length") as caught:
        capture(_model(wrong), (X,))
    assert isinstance(caught.value.__cause__, Exception)
    assert 'raise ValueError("the model wants an even length")' in str(caught.value)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda m, x: _Result(x + 1), "_Result"),
        (lambda m, x: {"a": [{x.sum()}]}, "set"),
        (lambda m, x: (y for y in [x]), "generator"),
    ],
)
def test_results_that_hide_their_tensors_are_named(function, kind):
    # Taken as a plain value such a result would hold the tensors of tracing.
    with pytest.raises(CaptureError, match=f"returns a {kind},.*register_pytree_node"):
        capture(_model(function), (X,))


def test_a_returned_comparison_of_sizes_follows_the_call():
    model = _model(lambda m, x: (x + 1, x.shape[0] > 4))
    captured = capture(model, (X,))
    assert [_run(captured, _random(n, 4))[1] for n in (3, 9)] == [False, True]


def _autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.t()


def _no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x * m.w
    return x * m.w * scale


def _cond(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x + 1, (x,))


@pytest.mark.parametrize(
    ("function", "region", "grad"),
    [
        (_autocast, "wrap_with_autocast", False),
        (_no_grad, "wrap_with_set_grad_enabled", True),
        (_cond, "cond", False),
    ],
)
def test_regions_with_rules_of_their_own_are_named(function, region, grad):
    model = _model(function, w=nn.Parameter(torch.ones(4))).train(grad)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(CaptureError, match=f"under {region};.*outside of the model"),
    ):
        capture(model, (X,))


def test_no_grad_inside_is_nothing_where_no_gradient_flows():
    model = _model(_no_grad, w=nn.Parameter(torch.ones(4)))
    _same(_run(capture(model, (X,)), X), model(X))


def test_random_state_of_the_models_own_is_named():
    def draw(m: nn.Module, x: Tensor) -> Tensor:
        return x + torch.randn(4, generator=torch.Generator().manual_seed(1))

    with pytest.raises(CaptureError, match="uses a Generator, which no graph can carry"):
        capture(_model(draw), (X,))


def test_an_error_in_torch_does_not_blame_ridgelines_own_lines():
    def change(m: nn.Module, x: Tensor) -> Tensor:
        m.w.data.add_(1)
        return x * m.w

    with pytest.raises(CaptureError) as caught:
        capture(_model(change, w=nn.Parameter(torch.ones(4))), (X,))
    assert "capture.py" not in str(caught.value)


def test_filling_a_container_of_the_caller_is_named():
    def fill(m: nn.Module, x: Tensor, found: list[Tensor]) -> Tensor:
        found.append(x * 2)
        return x + 1

    with pytest.raises(CaptureError, match=r"puts something into a container.*return it"):
        capture(_model(fill), (X, []))


def _with_buffer(function: Any) -> nn.Module:
    model = _model(function)
    model.register_buffer("seen", torch.zeros(4))
    return model


def test_a_buffer_assigned_anew_is_named():
    def count(m: nn.Module, x: Tensor) -> Tensor:
        m.seen = m.seen + 1
        return x + m.seen

    with pytest.raises(CaptureError, match=r"buffer 'seen'.*write self\.seen\.copy_"):
        capture(_with_buffer(count), (X,))


def test_a_buffer_assigned_before_it_is_read_carries_nothing():
    def fresh(m: nn.Module, x: Tensor) -> Tensor:
        m.seen = x.sum(0)
        return x + m.seen

    model = _with_buffer(fresh)
    captured = capture(model, (X,))
    for x in (X, Y):
        _same(_run(captured, x), model(x))
