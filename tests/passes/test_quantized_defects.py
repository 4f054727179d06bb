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


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2 + 1


def hooked():
    layer = nn.Linear(64, 64)
    layer.register_forward_hook(lambda m, args, y: y + 1)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Twice(64, 64), "a forward of its own"),
        (hooked(), "hooks"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), "parametrization"),
    ],
)
def test_what_is_no_plain_linear_layer_stays(layer, reason):
    q = coded(nn.Sequential(nn.Linear(64, 64), layer).eval())
    assert type(q[1]) is type(layer)
    assert any(reason in line.reason for line in q.report if line.path == "1")


def test_attention_that_reads_a_weight_itself_keeps_it():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    q = coded(model)
    assert isinstance(q.linear1, QuantizedLinear)
    assert not isinstance(q.self_attn.out_proj, QuantizedLinear)
    with torch.no_grad():
        assert (q(X[0]) - model(X[0])).norm() < 0.3 * model(X[0]).norm()
    fast = ridgeline.optimize(model, (X[0],), target="cpu", tolerance=0.02, calibration=batches())
    assert (fast(X[0]) - model(X[0])).norm() <= 0.02 * model(X[0]).norm()


class Collected(nn.Module):
    """A head that reads what every block gives."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(192, 64)

    def forward(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return self.head(torch.cat(found, -1))


def test_blocks_whose_outputs_others_read_are_no_chain():
    from ridgeline.passes.quantization.sequence import Chain

    model = Collected().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert Chain(model, names, batches()).blocks == []


def test_a_layer_that_runs_twice_is_calibrated_on_both_inputs():
    from ridgeline.passes.quantization import collect_hessians

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    model = Loop().eval()
    found = collect_hessians(model, ["a"], batches())["a"]
    with torch.no_grad():
        rows = torch.cat([torch.cat([x, torch.tanh(model.a(x))]) for x in X]).flatten(0, -2)
    torch.testing.assert_close(found, 2 / len(rows) * rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_parameters_of_the_new_model_are_its_own():
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64), nn.LayerNorm(64)).eval()
    before = copy.deepcopy(model.state_dict())
    q = coded(model, calibration=[torch.randint(0, 96, (1, 40))])
    q.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_caller_without_gradients_gets_the_same():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with torch.no_grad():
        q = coded(model, distillation=True)
        coded(model, bits=None, average_bits=3.0)
    assert isinstance(q[0], QuantizedLinear)


class Strange(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.kind = nn.Linear(64, 64), kind

    def forward(self, x):
        y = self.a(x)
        return {"dict": {"y": y}, "none": (None, y), "whole": (y > 0).long()}[self.kind]


def test_outputs_of_any_form_are_measured_or_refused():
    for kind in ("dict", "none"):
        coded(Strange(kind).eval(), distillation=True)
    with pytest.raises(ridgeline.RidgelineError, match="without a floating-point tensor"):
        coded(Strange("whole").eval(), distillation=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 3.0}, "bits is 3.0"),
        ({"bits": None, "average_bits": "3"}, "pass a number"),
        ({"ignore": "*.0"}, "list of patterns"),
        ({"ignore": ["nope"]}, "no module of the model matches"),
        ({"calibration": [torch.randn(2, 3)]}, "fails on the first calibration batch"),
        ({"calibration": [1, 2]}, "batch 0 is int"),
        ({"calibration": b"bytes"}, "calibration is bytes"),
    ],
)
def test_more_bad_options_are_named(options, reason):
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64))).eval()
    with pytest.raises(ridgeline.RidgelineError, match=reason):
        coded(model, **options)


def test_ignore_takes_what_stands_inside_a_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)).eval()
    q = coded(model, ignore=["0"])
    assert isinstance(q[0][0], nn.Linear)
    assert isinstance(q[1], QuantizedLinear)
