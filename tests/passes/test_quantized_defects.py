"""Defects that a review of quantised models found, each with its reproducer."""

import copy

import pytest
import torch
from torch import nn

import ridgeline
from ridgeline.codegen.kernel import folded
from ridgeline.passes.quantization import Codec, QuantizedLinear

X = torch.randn(6, 1, 40, 64, generator=torch.Generator().manual_seed(0))


def batches():
    return [x.clone() for x in X]


def coded(model, **options):
    given = {"bits": 3, "calibration": batches(), "distillation": False} | options
    return ridgeline.reparameterize(model, "shift_add_linear", **given)


class Named(nn.Module):
    """Two layers whose names differ by a dot."""

    def __init__(self):
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(64, 64)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(64, 64)})

    def forward(self, x):
        return self.a["b_c"](torch.relu(self.a_b["c"](x)))


def test_layers_whose_names_differ_by_a_dot_keep_their_codes():
    q = coded(Named().eval())
    fast = ridgeline.optimize(q, (X[0],), target="cpu")
    torch.testing.assert_close(fast(X[0]), q(X[0]), rtol=1e-4, atol=1e-4)
    assert any(k.op == "ridgeline::quantized_linear" for k in fast.plan.kernels)


def test_what_is_folded_has_a_name_that_a_module_takes():
    q = coded(Named().eval())
    module = torch.export.export(q, (X[0],), strict=False).module()
    nodes = [n for n in module.graph.find_nodes(op="get_attr") if "packed" in str(n.target)]
    with module.graph.inserting_before(module.graph.output_node()):
        names = [str(folded(module, n, "codes", lambda: torch.ones(3)).target) for n in nodes]
        again = [str(folded(module, n, "codes", lambda: torch.zeros(3)).target) for n in nodes]
    assert names == again
    assert len(set(names)) == 2
    assert not any("." in name for name in names)


def test_kernels_follow_the_codes_that_are_loaded():
    torch.manual_seed(1)
    first, second = (nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval() for _ in range(2))
    one, two = coded(first), coded(second)
    fast = ridgeline.optimize(one, (X[0],), target="cpu")
    torch.testing.assert_close(fast(X[0]), one(X[0]), rtol=1e-4, atol=1e-4)
    fast.load_state_dict(two.state_dict())
    torch.testing.assert_close(fast(X[0]), two(X[0]), rtol=1e-4, atol=1e-4)


def test_the_callers_model_and_data_stay_as_they_were():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(64, 64))
    model[1].eval()  # a mode of its own inside a model that trains
    state = copy.deepcopy(model.state_dict())
    data = batches()
    for options in ({"bits": 3, "distillation": True}, {"bits": None, "average_bits": 3.0}):
        coded(model, calibration=data, **options)
    ridgeline.optimize(model.eval(), (X[0],), target="cpu", tolerance=0.1, calibration=data)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not x.requires_grad and x.grad is None for x in data)
    assert all(torch.equal(x, y) for x, y in zip(data, X, strict=True))


def test_modes_of_submodules_are_put_back():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    model[1].eval()
    coded(model)
    assert model.training
    assert not model[1].training


def test_the_number_of_threads_is_put_back():
    import threading

    before, seen = torch.get_num_threads(), []
    coded(nn.Sequential(nn.Linear(64, 64)).eval())
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


class Experts(nn.Module):
    """Blocks of which the first batch does not reach one expert."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for layer in self.layers:
            layer["a"], layer["e"] = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, expert=False):
        for layer in self.layers:
            x = layer["a"](x)
            if expert:
                x = layer["e"](x)
        return x


def test_an_expert_that_a_later_batch_reaches_is_calibrated():
    data = [(X[0],), (X[1], True), (X[2], True)]
    q = coded(Experts().eval(), calibration=data)
    assert sum(isinstance(m, QuantizedLinear) for m in q.modules()) == 4


@pytest.mark.parametrize("codec", [Codec(3, 32, "minimum"), Codec(2, 64, "binary", centred=False)])
def test_what_is_saved_can_be_loaded(codec, tmp_path):
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    q = coded(model, bits=None, codec=codec)
    ridgeline.save_quantized(q, tmp_path)
    loaded = ridgeline.load_quantized(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(X[0]), q(X[0]))


def test_layers_that_share_a_weight_are_each_fitted_to_it():
    torch.manual_seed(2)
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    q = coded(nn.Sequential(first, nn.ReLU(), second).eval())
    for layer in (q[0], q[2]):
        error = (layer.quantized.dequantize() - first.weight).norm() / first.weight.norm()
        assert error < 0.25
    assert not torch.equal(q[0].packed, q[2].packed)


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    layer = nn.Linear(64, 64)
    q = coded(nn.Sequential(layer, nn.ReLU(), layer).eval(), distillation=True)
    assert isinstance(q[0], QuantizedLinear)
    assert q[0] is q[2]


def test_codes_and_scales_keep_their_dtypes():
    q = coded(nn.Sequential(nn.Linear(64, 64)).eval())
    before = q[0].quantized
    q.to(torch.bfloat16)
    assert q[0].bias.dtype == torch.bfloat16
    assert q[0].quantized.scale.dtype == before.scale.dtype
    assert torch.equal(q[0].quantized.dequantize(), before.dequantize())
