"""What runs where: kernels on the machine at hand, references elsewhere, and the notes about it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.codegen import lower as lowering
from ridgeline.codegen.inductor import NoCompiler
from ridgeline.cost_model import load_target


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


X = torch.randn(2, 8, 128, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [NoCompiler("no g++"), RuntimeError("CppCompileError: ...")])
def test_what_inductor_cannot_compile_runs_op_by_op_and_says_so(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(lowering, "compile_graph", fails)
    model = _Attention().eval()
    fast = ridgeline.optimize(model, (X,), target="cpu")
    torch.testing.assert_close(fast(X), model(X))
    assert [k.op for k in fast.plan.kernels] == ["ridgeline::attention"]
    assert any(str(error) in note for note in fast.plan.notes)


def test_an_absent_machine_is_named():
    model = _Attention().eval()
    fast = ridgeline.optimize(model, (X,), target="a100")
    torch.testing.assert_close(fast(X), model(X))
    assert any("a100 is not in this machine" in note for note in fast.plan.notes)


def test_a_gpu_in_this_machine_and_a_model_that_is_not_on_it(monkeypatch):
    monkeypatch.setattr(lowering, "_device_present", lambda target: True)
    model = _Attention().eval()
    fast = ridgeline.optimize(model, (X,), target="a100")
    torch.testing.assert_close(fast(X), model(X))
    assert any("the model is not on it" in note for note in fast.plan.notes)


@pytest.mark.parametrize("device", ["meta"])
def test_a_model_elsewhere_and_a_cpu_target(device):
    module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    said = lowering._elsewhere(load_target("cpu"), module, (torch.empty(2, device=device),))
    assert "the model is on meta" in said
    assert lowering._elsewhere(load_target("cpu"), module, (torch.empty(2),)) == ""
