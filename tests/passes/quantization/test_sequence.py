"""Calibration in sequence: what each layer sees, chains of blocks, results that are taken up."""

import copy

import pytest
import torch
from torch import nn

from ridgeline.passes.quantization import Codec, QuantizationError, quantize
from ridgeline.passes.quantization.resume import Results
from ridgeline.passes.quantization.sequence import Chain, quantize_in_sequence

CODEC = Codec(3, 32, "binary", centred=False)


class Block(nn.Module):
    def __init__(self, tupled=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.gate, self.tupled = nn.Linear(32, 64), tupled

    def forward(self, x, scale=1.0):
        h = self.norm(x)
        y = x + self.down(torch.relu(self.up(h)) * self.gate(h)) * scale
        return (y,) if self.tupled else y


class Stack(nn.Module):
    """Blocks in a list that get keyword arguments, as transformers' decoders do."""

    def __init__(self, tupled=False, skipping=False):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layers = nn.ModuleList(Block(tupled) for _ in range(3))
        self.head, self.skipping = nn.Linear(32, 8), skipping

    def forward(self, x):
        x = self.embed(x)
        first = x
        for layer in self.layers:
            y = layer(x, scale=0.5)
            x = y[0] if isinstance(y, tuple) else y
            if self.skipping:
                x = x + first
        return self.head(x)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 40, 8, generator=generator) for _ in range(3)]


def names_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def run(model, **options):
    """Results, and the Hessian that each layer was quantised with."""
    seen = {}

    def quantizer(name, weight, hessian):
        seen[name] = hessian.clone()
        return quantize(weight, CODEC, hessian)

    working = copy.deepcopy(model)
    found = quantize_in_sequence(working, names_of(model), inputs(), quantizer, **options)
    return found, seen, working


def hessian_before(model, name, found):
    """H of layer `name` where all layers before it hold what was found for them."""
    changed = copy.deepcopy(model)
    order = list(found)  # of execution: gate runs before down, though it stands behind it
    rows = []
    for other in order[: order.index(name)]:
        changed.get_submodule(other).weight.data.copy_(found[other].dequantize())
    layer = changed.get_submodule(name)
    layer.register_forward_pre_hook(lambda m, a: rows.append(a[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for x in inputs():
            changed(x)
    x = torch.cat(rows).double()
    return 2 / len(x) * x.T @ x


@pytest.mark.parametrize(("tupled", "skipping"), [(False, False), (True, False), (False, True)])
def test_each_layer_is_calibrated_on_the_quantised_prefix(tupled, skipping):
    torch.manual_seed(1)
    model = Stack(tupled, skipping).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, seen, working = run(model)
    assert set(found) == set(seen) == set(names_of(model))
    for name in ("embed", "layers.0.down", "layers.1.up", "layers.2.down", "head"):
        expected = hessian_before(model, name, found).float()
        torch.testing.assert_close(seen[name], expected, rtol=2e-4, atol=2e-4)
    for name, weight in found.items():
        held = working.get_submodule(name).weight
        torch.testing.assert_close(held, weight.dequantize())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_chain_is_found_where_blocks_hand_on_one_tensor_and_only_there():
    for tupled, skipping, blocks in ((False, False, 3), (True, False, 3), (False, True, 0)):
        model = Stack(tupled, skipping).eval()
        assert len(Chain(model, names_of(model), inputs()).blocks) == blocks


def test_readers_of_one_input_share_a_hessian():
    _, seen, _ = run(Stack().eval())
    assert torch.equal(seen["layers.1.up"], seen["layers.1.gate"])


def test_an_interrupted_run_goes_on(tmp_path):
    torch.manual_seed(2)
    model = Stack().eval()
    whole, _, _ = run(model)
    kept = Results(tmp_path, "run 1")
    for name in names_of(model)[:5]:
        kept.add(name, whole[name])
    again = Results(tmp_path, "run 1")
    assert set(again.known) == set(names_of(model)[:5])
    found, seen, _ = run(model, known=again.known, done=again.add)
    assert not set(seen) & set(again.known)
    for name, weight in whole.items():
        assert torch.equal(found[name].packed, weight.packed), name
        assert torch.equal(found[name].scale, weight.scale)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(whole)
    assert not list(tmp_path.glob("*.part"))


def test_results_of_another_run_and_damaged_ones_are_refused(tmp_path):
    found, _, _ = run(Stack().eval())
    Results(tmp_path, "run 1").add("embed", found["embed"])
    with pytest.raises(QuantizationError, match="another model, codec or calibration"):
        Results(tmp_path, "run 2")
    (tmp_path / "embed.safetensors").write_bytes(b"cut short")
    with pytest.raises(QuantizationError, match="cannot be read"):
        Results(tmp_path, "run 1")
