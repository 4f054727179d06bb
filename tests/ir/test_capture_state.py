"""Capture: weights, modes and state are the model's own, and what cannot be captured is named."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir.capture import CaptureError, capture


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


X, Y = _random(3, 4), _random(3, 4, seed=1)


@dataclass
class _Result:
    y: Tensor


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()


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


def test_tied_weights_and_a_module_used_twice(same):
    torch.manual_seed(0)
    model, ids = _Tied().eval(), torch.tensor([[1, 2, 6], [0, 0, 5]])
    module = capture(model, (ids,)).program.module
    same(module(ids)[0], model(ids))
    weights = [n.target for n in module.graph.find_nodes(op="get_attr")]
    for name, held in module.named_parameters(remove_duplicate=False):
        assert held is model.get_parameter(name)
    assert {model.get_parameter(w).data_ptr() for w in weights} == {
        p.data_ptr() for p in model.parameters()
    }
    model.embed.weight.mul_(2)
    same(module(ids)[0], model(ids))


def test_nodes_carry_the_path_of_their_module(module_of):
    model = nn.ModuleDict({"outer": nn.Sequential(nn.Linear(4, 4))})
    wrapped = module_of(lambda m, x: m.parts["outer"](x), parts=model)
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


def test_a_buffer_counts_on(run, same):
    model, other = _Counter().eval(), _Counter().eval()
    captured = capture(model, (X,))
    assert model.count.item() == 0  # capturing does not run a step
    for _ in range(3):
        same(run(captured, X), other(X))
    assert (model.count.item(), model.hidden.item()) == (3, 6)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_keeps_its_statistics(run, same, affine):
    torch.manual_seed(0)
    model, other = (nn.BatchNorm1d(4, affine=affine).train() for _ in range(2))
    captured = capture(model, (_random(3, 4),))
    assert model.num_batches_tracked == 0
    for rows in (3, 5, 8):
        x = _random(rows, 4, seed=rows)
        same(run(captured, x), other(x))
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        same(ours, theirs)


def test_an_argument_changed_in_place(module_of, run, same):
    def change(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x * 2

    model = module_of(change)
    kept = X.clone()
    captured = capture(model, (kept, Y))
    assert torch.equal(kept, X)  # capturing does not run a step
    ours, theirs = X.clone(), X.clone()
    same(run(captured, ours, Y), model(theirs, Y))
    assert torch.equal(ours, theirs)


def test_a_returned_input_is_the_callers_own_tensor(module_of, run):
    model = module_of(lambda m, x: x)
    captured = capture(model, (X,))
    assert run(captured, X) is X


def test_a_returned_view_shares_the_callers_memory(module_of, run):
    model, x = module_of(lambda m, x: x.t()), X.clone()
    out = run(capture(model, (x,)), x)
    x[0, 1] = 9
    assert out[1, 0] == 9


def test_submodules_keep_their_modes(run):
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).eval()
    model[1].train()
    out = run(capture(model, (torch.ones(64, 8),)), torch.ones(64, 8))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert [m.training for m in model.modules()] == [False, False, True]


def test_dropout_draws_anew_and_as_eager_does(run, same):
    model, x = nn.Dropout(0.5).train(), torch.ones(64, 8)
    captured = capture(model, (x,))
    torch.manual_seed(3)
    first, second = run(captured, x), run(captured, x)
    torch.manual_seed(3)
    same((first, second), (model(x), model(x)))
    assert not torch.equal(first, second)


def test_random_state_is_left_alone():
    model = nn.Dropout(0.5).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    capture(model, (torch.ones(64, 8),))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_phase_and_gradients(run, same, train, grad):
    torch.manual_seed(0)
    model = _mlp().train(train)
    with torch.set_grad_enabled(grad):
        captured = capture(model, (X,))
        out = run(captured, X)
        expected = model(X)
    assert captured.program.training == (train and grad)
    assert captured.program.phase == ("training" if train and grad else "forward")
    if train and grad:
        both = [torch.autograd.grad(y, list(model.parameters()), Y[:, :2]) for y in (out, expected)]
        same(*both)


def test_gradients_reach_an_input_in_eval_mode(run, same):
    model, x = _mlp(), X.clone().requires_grad_()
    with torch.enable_grad():
        captured = capture(model, (x,))
        (ours,) = torch.autograd.grad(run(captured, x).sum(), x)
        (theirs,) = torch.autograd.grad(model(x).sum(), x)
    assert captured.program.training
    same(ours, theirs)


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
def test_control_flow_on_values_names_the_line_and_the_way_out(module_of, function):
    with pytest.raises(CaptureError) as caught:
        capture(module_of(function), (X,))
    text = str(caught.value)
    assert text.startswith("cannot capture _Function: ")
    assert f"{__file__}:" in text
    assert "use torch.where instead of `if`" in text


def test_the_way_out_works(module_of, run, same):
    model = module_of(lambda m, x: torch.where(x.sum() > 0, x * 2, x))
    captured = capture(model, (X,))
    for x in (X, -X):
        same(run(captured, x), model(x))


def test_an_error_of_the_model_itself_keeps_its_words(module_of):
    def wrong(m: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("the model wants an even length")

    with pytest.raises(CaptureError, match="the model wants an even length") as caught:
        capture(module_of(wrong), (X,))
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
def test_results_that_hide_their_tensors_are_named(module_of, function, kind):
    # Taken as a plain value such a result would hold the tensors of tracing.
    with pytest.raises(CaptureError, match=f"returns a {kind},.*register_pytree_node"):
        capture(module_of(function), (X,))


def test_a_returned_comparison_of_sizes_follows_the_call(module_of, run):
    model = module_of(lambda m, x: (x + 1, x.shape[0] > 4))
    captured = capture(model, (X,))
    assert [run(captured, _random(n, 4))[1] for n in (3, 9)] == [False, True]


def _no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x * m.w
    return x * m.w * scale


def _cond(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x + 1, (x,))


@pytest.mark.parametrize(
    ("function", "region", "grad"),
    [
        (_no_grad, "wrap_with_set_grad_enabled", True),
        (_cond, "cond", False),
    ],
)
def test_regions_with_rules_of_their_own_are_named(module_of, function, region, grad):
    model = module_of(function, w=nn.Parameter(torch.ones(4))).train(grad)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(CaptureError, match=f"under {region};.*outside of the model"),
    ):
        capture(model, (X,))


def test_no_grad_inside_is_nothing_where_no_gradient_flows(module_of, run, same):
    model = module_of(_no_grad, w=nn.Parameter(torch.ones(4)))
    same(run(capture(model, (X,)), X), model(X))


def test_random_state_of_the_models_own_is_named(module_of):
    def draw(m: nn.Module, x: Tensor) -> Tensor:
        return x + torch.randn(4, generator=torch.Generator().manual_seed(1))

    with pytest.raises(CaptureError, match="use tensors only, and torch's own random state"):
        capture(module_of(draw), (X,))


def test_an_error_in_torch_does_not_blame_ridgelines_own_lines(module_of):
    def change(m: nn.Module, x: Tensor) -> Tensor:
        m.w.data.add_(1)
        return x * m.w

    with pytest.raises(CaptureError) as caught:
        capture(module_of(change, w=nn.Parameter(torch.ones(4))), (X,))
    assert "capture.py" not in str(caught.value)


def test_filling_a_container_of_the_caller_is_named(module_of):
    def fill(m: nn.Module, x: Tensor, found: list[Tensor]) -> Tensor:
        found.append(x * 2)
        return x + 1

    with pytest.raises(CaptureError, match=r"puts something into a container.*return it"):
        capture(module_of(fill), (X, []))


def _with_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("seen", torch.zeros(4))
    return model


def test_a_buffer_assigned_anew_is_named(module_of):
    def count(m: nn.Module, x: Tensor) -> Tensor:
        m.seen = m.seen + 1
        return x + m.seen

    with pytest.raises(CaptureError, match=r"buffer 'seen'.*write self\.seen\.copy_"):
        capture(_with_buffer(module_of(count)), (X,))


def test_a_buffer_assigned_before_it_is_read_carries_nothing(module_of, run, same):
    def fresh(m: nn.Module, x: Tensor) -> Tensor:
        m.seen = x.sum(0)
        return x + m.seen

    model = _with_buffer(module_of(fresh))
    captured = capture(model, (X,))
    for x in (X, Y):
        same(run(captured, x), model(x))
