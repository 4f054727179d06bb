"""The copy that `optimize` returns, and the caller's model: who sees a change of what."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import ridgeline
from ridgeline.passes.drop_in import DropInError, OptimizedModule


def _optimized(model: nn.Module) -> OptimizedModule:
    return ridgeline.optimize(model, target="cpu", lowering="eager")


@torch.no_grad()
def test_hooks_of_the_model_run_once():
    model, seen = nn.Linear(8, 8).eval(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(1))
    model.register_forward_hook(lambda module, args, out: out * 2)
    fast, x = _optimized(model), torch.randn(2, 8)
    for _ in range(2):
        assert torch.equal(fast(x), F.linear(x, model.weight, model.bias) * 2)
    torch.vmap(fast)(x[None])  # the original code
    assert len(seen) == 3


@torch.no_grad()
def test_hooks_inside_the_model_run_in_every_call():
    model, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), []
    fast, x = _optimized(model), torch.randn(2, 8)
    fast(x)
    hook = fast[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert len([fast(x) for _ in range(3)]) == len(seen)
    assert "a hook" in next(iter(fast.fallbacks.values()))
    hook.remove()
    fast[1].register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(fast(x), model(x) + 1)


@torch.no_grad()
def test_hooks_of_all_modules_are_seen():
    fast, x = _optimized(model := nn.Sequential(nn.Linear(8, 8)).eval()), torch.randn(2, 8)
    fast(x)
    double = lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert torch.equal(fast(x), F.linear(x, model[0].weight, model[0].bias) * 2)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:The tensor attribute", "ignore:.*weight_norm")
@pytest.mark.parametrize("pruned", [False, True])
def test_weights_that_torch_computes_in_every_call_are_captured(pruned: bool):
    layer = nn.Linear(8, 8)
    if pruned:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    model = nn.Sequential(layer if pruned else nn.utils.weight_norm(layer)).eval()
    fast, x = _optimized(model), torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert fast.captures == 1, fast.fallbacks


class _Tied(nn.Module):
    """One buffer in two places, and one that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.zeros(4)
        self.a, self.b = nn.Identity(), nn.Identity()
        self.a.register_buffer("count", shared)
        self.b.register_buffer("count", shared)
        self.register_buffer("table", torch.zeros(2, 4))
        self.register_buffer("row", self.table[1])

    def forward(self, x: Tensor) -> Tensor:
        self.a.count.add_(1)
        self.table.add_(2)
        return x + self.b.count + self.row


@torch.no_grad()
def test_memory_that_buffers_share_stays_shared():
    model, x = _Tied().eval(), torch.randn(4)
    fast, eager = _optimized(model), copy.deepcopy(model)
    for _ in range(3):
        assert torch.equal(fast(x), eager(x))
    assert not model.a.count.any()
    assert not model.table.any()


class _Listed(nn.Module):
    """Its parts are also in a plain list, behind a method and behind a partial."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.parts = [self.linear, {"norm": (self.norm,)}]
        self.again = functools.partial(F.linear, weight=self.linear.weight)
        self.call = self.norm.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.parts[1]["norm"][0](self.parts[0](x))) + self.again(x)


def test_modules_in_plain_containers_are_the_copys_own():
    model, x = _Listed().train(), torch.randn(16, 8)
    fast, eager = _optimized(model), copy.deepcopy(model)
    torch.testing.assert_close(fast(x), eager(x))
    assert fast.parts[1]["norm"][0] is fast.norm
    assert fast.call.__self__ is fast.norm
    assert model.norm.num_batches_tracked == 0
    assert fast.norm.num_batches_tracked == 2
    fast.eval()
    eager.eval()
    assert model.norm.training
    torch.testing.assert_close(fast(x), eager(x))


@torch.no_grad()
@pytest.mark.parametrize("bind", [types.MethodType, functools.partial])
def test_a_forward_set_on_the_object_is_captured(bind):
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    own = lambda self, x: F.linear(x, self.weight) * 3  # noqa: E731
    model.forward = bind(own, model)
    fast = _optimized(model)
    assert torch.equal(fast(x), model(x))
    assert fast.captures == 1, fast.fallbacks
    fast.weight = nn.Parameter(torch.zeros(8, 8))
    assert not fast(x).any()
    assert model(x).any()


def test_a_forward_that_may_hold_the_model_is_refused():
    model = nn.Linear(8, 8)
    inner = model.forward
    model.forward = lambda x: inner(x) * 2
    with pytest.raises(DropInError, match=r"define forward in the class.*types\.MethodType"):
        _optimized(model)


@torch.no_grad()
def test_a_converted_copy_leaves_the_model_as_it_is():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    model[1].weight = model[0].weight
    fast = _optimized(model)
    fast(x)
    fast.to("cpu")
    assert fast[0].weight is model[0].weight  # nothing to convert: still shared
    fast.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fast[0].weight is fast[1].weight
    assert fast(x.bfloat16()).dtype == torch.bfloat16
