"""`reparameterize(model, "shift_add_linear" | "quantized_linear")` and `optimize(bits=)`."""

import copy
import itertools

import pytest
import torch
from torch import nn

import ridgeline
from ridgeline.passes.quantization import Codec, QuantizationError, QuantizedLinear
from ridgeline.passes.quantization.allocate import allocate, allocate_within, measure
from ridgeline.passes.quantization.data import LEAST_TOKENS, calibration_batches
from ridgeline.passes.quantization.distil import Recipe

VOCABULARY = 96


class Output:
    def __init__(self, logits):
        self.logits = logits


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Language(nn.Module):
    """Token ids -> logits, with tied embeddings and a layer too small to be worth it."""

    def __init__(self, bare=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.small, self.back = nn.Linear(64, 8), nn.Linear(8, 64)
        self.head = nn.Linear(64, VOCABULARY, bias=False)
        self.head.weight, self.bare = self.embed.weight, bare

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x + self.back(self.small(x))) / 8
        return logits if self.bare else Output(logits)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Language().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (4 * LEAST_TOKENS,))


def divergence(model, other, ids):
    with torch.no_grad():
        p, q = (m(ids[None, :600]).logits.double().log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(("method", "bits"), [("shift_add_linear", 2), ("quantized_linear", 4)])
def test_layers_become_codes_and_the_model_stays(model, ids, method, bits):
    before = copy.deepcopy(model.state_dict())
    new = ridgeline.reparameterize(
        model, method, bits=bits, calibration=ids, distillation=Recipe(steps=2)
    )
    coded = {n: m for n, m in new.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(coded) == {f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")}
    assert all(m.quantized.bits == bits for m in coded.values())
    assert new.head.weight is new.embed.weight
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(isinstance(layer.up, nn.Linear) for layer in model.layers)
    stay = {line.path: line.reason for line in new.report if line.codec is None}
    assert set(stay) == {"small", "back", "head"}
    assert "head" in stay["head"]
    assert "too small" in stay["small"]
    assert 0 < divergence(model, new, ids) < 0.5


def test_distillation_brings_the_model_nearer(model, ids):
    plain = ridgeline.reparameterize(
        model, "shift_add_linear", bits=2, calibration=ids, distillation=False
    )
    start = divergence(model, plain, ids)
    for recipe in (Recipe(30, 2, 1e-2), Recipe(30, 2, 1e-2, code_rate=3e-2)):
        tuned = ridgeline.reparameterize(
            model, "shift_add_linear", bits=2, calibration=ids, distillation=recipe
        )
        assert divergence(model, tuned, ids) < 0.8 * start
        assert all(m.scale.dtype == torch.float16 for m in tuned.modules() if hasattr(m, "packed"))


def test_a_loss_that_is_not_finite_leaves_what_was(model, ids):
    from ridgeline.passes.quantization.distil import distil

    new = ridgeline.reparameterize(
        model, "shift_add_linear", bits=3, calibration=ids, distillation=False
    )
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(QuantizationError, match="lower the rates"):
        distil(new, model, list(ids[:1024].view(2, 1, 512)), Recipe(50, 1, 1e30, norm_rate=1e30))
    assert all(torch.equal(v, before[k]) for k, v in new.state_dict().items())
    assert isinstance(new.layers[0].up, QuantizedLinear)


def test_mixed_widths_keep_to_the_budget_and_beat_the_middle(model, ids):
    new = ridgeline.reparameterize(
        model, "shift_add_linear", average_bits=3.0, calibration=ids, distillation=False
    )
    coded = [m for m in new.modules() if isinstance(m, QuantizedLinear)]
    weights = [m.in_features * m.out_features for m in coded]
    bits = [m.quantized.bits for m in coded]
    assert sum(b * w for b, w in zip(bits, weights, strict=True)) <= 3.0 * sum(weights)
    assert set(bits) <= {2, 3, 4}
    strict = ridgeline.reparameterize(
        model, "shift_add_linear", divergence=1e-3, calibration=ids, distillation=False
    )
    assert divergence(model, strict, ids) < 4e-3


def test_the_allocation_is_the_best_there_is():
    """Against all 3**5 assignments, under a budget of bits and under one of harm."""
    codecs = [Codec(b, 64, "binary") for b in (2, 3, 4)]
    torch.manual_seed(4)
    shapes = {f"l{i}": (64, 64 * (1 + i % 2)) for i in range(5)}
    harm = {
        n: dict(zip(codecs, sorted(torch.rand(3).tolist(), reverse=True), strict=True))
        for n in shapes
    }

    def costs(choice):
        bits = sum(c.bits * shapes[n][0] * shapes[n][1] for n, c in choice.items())
        return bits, sum(harm[n][c] for n, c in choice.items())

    every = [
        costs(dict(zip(shapes, choice, strict=True)))
        for choice in itertools.product(codecs, repeat=5)
    ]
    weights = sum(n * k for n, k in shapes.values())
    bits, least = costs(allocate(harm, shapes, 2.8))
    assert bits <= 2.8 * weights
    assert least == pytest.approx(min(h for b, h in every if b <= 2.8 * weights))
    fewest, found = costs(allocate_within(harm, shapes, 2.0))
    assert found <= 2.0
    assert fewest == min(b for b, h in every if h <= 2.0)
    with pytest.raises(QuantizationError, match="widest codecs"):
        allocate_within(harm, shapes, 1e-9)
    with pytest.raises(QuantizationError, match="narrowest codecs"):
        allocate(harm, shapes, 1.5)


def test_sensitivity_foretells_the_divergence(model, ids):
    """D of one layer at 2 bits against the KL that quantising it alone makes."""
    batches = list(ids[:4096].view(8, 1, 512))
    codec = Codec(2, 64, "binary", centred=False)
    names = [f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")]
    harm = measure(model, names, batches, lambda name: [codec])
    for name in names:
        others = [f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")]
        others.remove(name)
        new = ridgeline.reparameterize(
            model,
            "shift_add_linear",
            codec=codec,
            calibration=batches,
            ignore=others,
            distillation=False,
        )
        measured = divergence(model, new, ids)
        assert 0.3 < harm[name][codec] / measured < 3.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_optimize_takes_a_width(model, ids, bits):
    bare = Language(bare=True).eval()
    bare.load_state_dict(model.state_dict())
    fast = ridgeline.optimize(bare, (ids[None, :64],), target="cpu", bits=bits, calibration=ids)
    ops = [k.configuration for k in fast.plan.kernels if k.op == "ridgeline::quantized_linear"]
    assert ops
    assert all(f"{bits}-bit" in said for said in ops)
    note = next(n for n in fast.plan.notes if n.startswith(f"bits={bits}"))
    assert "6 layers" in note
    with torch.no_grad():
        y, expected = fast(ids[None, :64]), bare(ids[None, :64])
    assert (y - expected).norm() / expected.norm() < {2: 0.5, 3: 0.25, 4: 0.1, 8: 0.01}[bits]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 5}, "codec bits is 5"),
        ({"bits": 3, "average_bits": 3.0}, "exactly one of"),
        ({}, "exactly one of"),
        ({"average_bits": 5.0}, "choose 2 to 4"),
        ({"bits": 3, "calibration": None}, "pass calibration="),
        ({"bits": 3, "calibration": "a text"}, "pass tokenizer="),
        ({"bits": 3, "calibration": torch.arange(100)}, "holds 100 tokens"),
        ({"bits": 3, "calibration": torch.randn(5000)}, "integer token ids"),
        ({"bits": 3, "calibration": []}, "no batch"),
        ({"bits": 3, "calibration": 7}, "calibration is int"),
        ({"bits": 3, "ignore": ["*"]}, "nothing to quantise"),
        ({"bits": 3, "hessian": "half"}, "hessian is 'half'"),
    ],
)
def test_bad_options_are_named(model, ids, options, reason):
    with pytest.raises(QuantizationError, match=reason):
        ridgeline.reparameterize(model, "shift_add_linear", **({"calibration": ids} | options))


def test_uniform_layers_have_no_mixed_widths(model, ids):
    with pytest.raises(QuantizationError, match="use the method shift_add_linear"):
        ridgeline.reparameterize(model, "quantized_linear", average_bits=3.0, calibration=ids)


def test_of_a_diagonal_hessian_only_the_diagonal_counts():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64)).eval()
    mixed = torch.randn(64, 64) * 10 ** torch.linspace(0, 1, 64)
    batches = [torch.randn(256, 64) @ mixed]
    x = torch.randn(256, 64) @ mixed

    def off(batches, hessian):
        options = {"bits": 2, "calibration": batches, "distillation": False}
        made = ridgeline.reparameterize(layer, "shift_add_linear", hessian=hessian, **options)
        return float((made(x) - layer(x)).detach().norm())

    def apart(x):
        """Rows with one entry each, whose Hessian is the diagonal of that of x."""
        return [torch.diag_embed(x.square().mean(0).sqrt()) * len(x.T) ** 0.5]

    assert off(batches, "full") < off(batches, "diagonal")
    assert off(batches, "diagonal") == pytest.approx(off(apart(batches[0]), "full"), rel=1e-3)


def test_weights_that_are_no_numbers_are_named_before_anything_is_done(model, ids):
    broken = copy.deepcopy(model)
    broken.layers[2].down.weight.data[1, 2] = torch.nan
    with pytest.raises(QuantizationError, match="1 of 8192 weights are NaN"):
        ridgeline.reparameterize(broken, "shift_add_linear", bits=3, calibration=ids)


def test_text_is_cut_into_windows_by_its_tokenizer():
    class Tokens:
        def __init__(self, ids):
            self.input_ids = ids

    def tokenizer(text, verbose):
        return Tokens([ord(c) % VOCABULARY for c in text])

    batches = calibration_batches("x" * 3000, tokenizer)
    assert [tuple(b.shape) for b in batches] == [(1, 512)] * 5
