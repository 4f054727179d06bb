"""What is saved comes back bit for bit; what does not fit leaves the model as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ridgeline
from ridgeline.passes.quantization import Codec, QuantizedWeight, round_to_nearest
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.quantization.store import CONFIG, TENSORS, StoreError

SCHEMES = {
    "uniform": Codec(4, 32, "symmetric"),
    "zero points": Codec(8, 32),
    "minima": Codec(4, 64, "minimum"),
    "binary": Codec(3, 32, "binary"),
    "binary, powers of two": Codec(2, 32, "binary", terms=3, centred=False),
    "shift": Codec(8, 32, "shift", terms=2),
}


class Model(nn.Module):
    """Linear layers with and without a bias, a norm, a tied head, sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 70)
        self.block = nn.Sequential(nn.Linear(70, 37), nn.ReLU(), nn.Linear(37, 70, bias=False))
        self.norm = nn.LayerNorm(70)
        self.head = nn.Linear(70, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(x + self.block(x)))


def plain() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def drawn(n: int, k: int, codec: Codec) -> QuantizedWeight:
    """Random codes and scales, with row scales and a permutation."""
    if codec.codec == "uniform":
        return round_to_nearest(torch.randn(n, k), codec)
    shape = (n, codec.groups(k), *([codec.bits] if codec.scheme == "binary" else []))
    scale = torch.rand(shape).half()
    if codec.scheme == "binary" and codec.terms:
        scale = torch.randint(58, 66, (*shape, codec.terms), dtype=torch.int8)
    return QuantizedWeight(
        torch.randint(256, (n, -(-k * codec.bits // 8)), dtype=torch.uint8), scale,
        None if codec.centred else torch.randn(shape[:2]).half(), codec.bits, codec.group_size, k,
        codec.codec, terms=codec.terms if codec.scheme == "shift" else 1,
        row_scale=torch.rand(n).half(), permutation=torch.randperm(k).short(),
    )  # fmt: skip


def quantised(codec: Codec) -> Model:
    model = plain()
    first, last = model.block[0], model.block[2]
    model.block[0] = QuantizedLinear(drawn(37, 70, codec), first.bias, torch.int16)
    model.block[2] = QuantizedLinear(drawn(70, 37, codec), last.bias)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    return model.eval()


@pytest.mark.parametrize("against", ["whole", "original"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_saved_comes_back(tmp_path, name, against):
    model = quantised(SCHEMES[name])
    original = plain() if against == "original" else None
    folder = ridgeline.save_quantized(model, tmp_path / "a" / "b", original=original)
    back = ridgeline.load_quantized(plain(), folder)
    ids = torch.arange(11)
    assert torch.equal(back(ids), model(ids))
    for key, tensor in model.state_dict().items():
        other = back.state_dict()[key]
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
    assert back.head.weight is back.embedding.weight
    assert (back.block[0].multiply, back.block[2].multiply) == (torch.int16, None)
    assert back.block[0].settings == model.block[0].settings
    names = set(load_file(folder / TENSORS))
    assert ("embedding.weight" in names) == (original is None)
    assert {"norm.weight", "block.0.packed", "block.0.bias"} <= names
    assert "head.weight" not in names  # tied
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]


def test_bits_per_weight_are_those_of_the_artefact(tmp_path):
    model = quantised(SCHEMES["binary"])
    held = 0
    for layer, (n, k) in ((model.block[0], (37, 70)), (model.block[2], (70, 37))):
        held += n * -(-k * 3 // 8) + n * -(-k // 32) * 3 * 2 + 2 * n + 2 * k
        assert layer.quantized.nbytes > 0
    assert ridgeline.bits_per_weight(model) == 8 * held / (2 * 37 * 70)
    folder = ridgeline.save_quantized(model, tmp_path, calibrated_on="a text of mine")
    config = json.loads((folder / CONFIG).read_text())
    assert config["bits_per_weight"] == ridgeline.bits_per_weight(model)
    assert config["calibrated_on"] == "a text of mine"
    assert config["layers"]["block.0"]["codec"] == "binary"
    stored = load_file(folder / TENSORS)
    codes = [t for n, t in stored.items() if n.startswith("block.") and not n.endswith("bias")]
    assert sum(t.nbytes for t in codes) == held


def test_rows_of_one_stack_are_stored_apart(tmp_path):
    model, whole = plain(), drawn(37 + 37, 70, SCHEMES["uniform"])
    model.block = nn.ModuleList(QuantizedLinear(whole.rows(start, start + 37)) for start in (0, 37))
    ridgeline.save_quantized(model, tmp_path)
    base = plain()
    base.block = nn.ModuleList(nn.Linear(70, 37, bias=False) for _ in range(2))
    back = ridgeline.load_quantized(base, tmp_path)
    assert torch.equal(back.block[1].packed, whole.packed[37:])
    assert back.block[1].packed.untyped_storage().nbytes() == back.block[1].packed.nbytes


def test_saving_again_replaces(tmp_path):
    ridgeline.save_quantized(quantised(SCHEMES["uniform"]), tmp_path)
    second = quantised(SCHEMES["shift"])
    ridgeline.save_quantized(second, tmp_path)
    back = ridgeline.load_quantized(plain(), tmp_path)
    assert torch.equal(back.block[0].packed, second.block[0].packed)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    ridgeline.save_quantized(quantised(SCHEMES["uniform"]), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("ridgeline.passes.quantization.store.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        ridgeline.save_quantized(quantised(SCHEMES["shift"]), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_model_without_quantised_layers_is_refused(tmp_path):
    for call in (ridgeline.bits_per_weight, lambda m: ridgeline.save_quantized(m, tmp_path / "x")):
        with pytest.raises(StoreError, match="holds no QuantizedLinear"):
            call(plain())
    assert not (tmp_path / "x").exists()


def _config(change):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def _tensor(name, change):
    def damage(folder):
        identity = json.loads((folder / CONFIG).read_text())["identity"]
        tensors = load_file(folder / TENSORS)
        tensors[name] = change(tensors[name])
        kept = {n: t for n, t in tensors.items() if t is not None}
        save_file(kept, folder / TENSORS, metadata={"identity": identity})

    return damage


def _nan(tensor):
    tensor[0, 0] = torch.nan
    return tensor


DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), "cannot be read"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "cannot be read"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "another format": (_config(lambda c: c.update(format="gptq")), "expected format"),
    "another version": (_config(lambda c: c.update(version=2)), "expected version 1, found 2"),
    "no layers": (_config(lambda c: c.pop("layers")), "key 'layers': expected a dict"),
    "another save": (_config(lambda c: c.update(identity="other")), "two different saves"),
    "unknown codec": (
        _config(lambda c: c["layers"]["block.2"].update(codec="nf4")), "codec 'nf4'",
    ),
    "unknown products": (
        _config(lambda c: c["layers"]["block.2"].update(multiply="int3")), "multiply is 'int3'",
    ),
    "no such layer": (
        _config(lambda c: c["layers"].update(other=c["layers"]["block.2"])), "layer 'other'",
    ),
    "not a linear layer": (
        _config(lambda c: c["layers"].update(norm=c["layers"]["block.2"])), "nn.Linear",
    ),
    "bits that do not fit": (
        _config(lambda c: c["layers"]["block.2"].update(bits=8)), "8-bit uniform weight",
    ),
    "groups of nothing": (
        _config(lambda c: c["layers"]["block.2"].update(group_size=0)), "group_size is 0",
    ),
    "half a file": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "is damaged",
    ),
    "NaN scales": (_tensor("block.2.scale", _nan), "scale holds NaN"),
    "no scales": (_tensor("block.2.scale", lambda t: None), "incomplete"),
    "rows missing": (_tensor("block.2.packed", lambda t: t[:-1].clone()), "scale is"),
    "a smaller norm": (_tensor("norm.weight", lambda t: t[:-1].clone()), "'norm.weight' is"),
    "a tensor missing": (_tensor("norm.bias", lambda t: None), "lacks 1 tensors"),
    "a bias missing": (_tensor("block.0.bias", lambda t: None), "bias is not the model's"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_and_the_model_stays(tmp_path, name):
    damage, said = DAMAGES[name]
    ridgeline.save_quantized(quantised(SCHEMES["uniform"]), tmp_path)
    damage(tmp_path)
    model, untouched = plain(), plain().state_dict()
    with pytest.raises(StoreError, match=said):
        ridgeline.load_quantized(model, tmp_path)
    assert type(model.block[0]) is nn.Linear
    state = model.state_dict()
    assert list(state) == list(untouched)
    assert all(torch.equal(state[n], t) for n, t in untouched.items())


def test_a_permutation_that_names_a_column_twice(tmp_path):
    model = quantised(SCHEMES["binary"])
    model.block[0].permutation[0] = model.block[0].permutation[1]
    ridgeline.save_quantized(model, tmp_path)
    with pytest.raises(StoreError, match="permutation does not name every column once"):
        ridgeline.load_quantized(plain(), tmp_path)


def test_another_architecture_is_refused(tmp_path):
    ridgeline.save_quantized(quantised(SCHEMES["shift"]), tmp_path)
    model = plain()
    model.block[0] = nn.Linear(70, 38)
    with pytest.raises(StoreError, match="stored as 37x70, where the model has 38x70"):
        ridgeline.load_quantized(model, tmp_path)
    assert type(model.block[2]) is nn.Linear
