"""The same function in other weights: exact in float64, refused where it is not, and of use."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ridgeline
from ridgeline.passes.certify import relative_error
from ridgeline.passes.preparation import UnprovenError
from ridgeline.passes.preparation.choose import coded_harm
from ridgeline.passes.preparation.fold import orthogonal
from ridgeline.passes.quantization import Codec, QuantizationError, collect_hessians

CODEC = Codec(3, 64, "minimum")
WIDE = 64


def lively(model: nn.Module) -> nn.Module:
    """Every vector random, so that no norm's weight is 1 and no bias 0; one channel in 16 loud."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
            p.data[::16] *= 30
    return model.eval()


def prepared(model: nn.Module, *args: Tensor, **options):
    """The prepared model and its lines; the original must not have changed, and the two must agree
    in float64 up to the rounding of the new weights to float32."""
    before = copy.deepcopy(model.state_dict())
    new = ridgeline.reparameterize(model, "rotation", args=args, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(new) is type(model)
    assert new.state_dict().keys() == before.keys()
    wide = [a.double() if a.is_floating_point() else a for a in args]
    with torch.no_grad():
        got, expected = (copy.deepcopy(m).double()(*wide) for m in (new, model))
    got, expected = (getattr(y, "logits", y) for y in (got, expected))
    assert relative_error([got], [expected]) < 2e-6
    return new, {line.path: line for line in new.report}


def changed(new: nn.Module, old: nn.Module) -> set[str]:
    held = dict(old.named_parameters())
    return {name for name, p in new.named_parameters() if p is not held[name]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_with_shared_heads_and_tied_embeddings(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model, ids = lively(transformers.LlamaForCausalLM(config)), torch.randint(50, (2, 9))
    new, lines = prepared(model, ids, calibration=[ids], codec=CODEC)
    for i in range(2):
        layer = f"model.layers.{i}"
        heads = f"{layer}.self_attn."
        assert f"{heads}v_proj -> {heads}o_proj" in lines
        assert f"{layer}.mlp.up_proj -> {layer}.mlp.down_proj" in lines
        both = f"{layer}.mlp.gate_proj, {layer}.mlp.up_proj"
        assert f"{layer}.post_attention_layernorm -> {both}" in lines
        three = ", ".join(f"{heads}{x}_proj" for x in "qkv")
        assert f"{layer}.input_layernorm -> {three}" in lines
    _, blind = prepared(model, ids)
    assert blind[f"{heads}v_proj -> {heads}o_proj"].what == "turned"
    assert "shared" in lines["lm_head"].reason
    assert new.lm_head.weight is model.lm_head.weight is new.model.embed_tokens.weight
    assert all(line.after <= line.before for line in lines.values() if line.what)


def test_gpt2_with_merged_projections_and_transposed_weights() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=48,
        n_layer=1,
        n_head=3,
        vocab_size=50,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model, ids = lively(transformers.GPT2LMHeadModel(config)), torch.randint(50, (2, 9))
    new, lines = prepared(model, ids)
    block = "transformer.h.0."
    assert lines[f"{block}attn.c_attn -> {block}attn.c_proj"].what == "turned"
    assert changed(new, model) == {
        f"{block}attn.c_{name}" for name in ("attn.weight", "attn.bias", "proj.weight")
    }
    held, was = new.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(held[:, :96], was[:, :96])  # queries and keys
    assert not torch.equal(held[:, 96:], was[:, 96:])
    assert "also read by 'pow'" in lines[f"{block}mlp.c_proj"].reason
    _, lines = prepared(model, ids, calibration=[ids], codec=CODEC)
    assert lines[f"{block}ln_1 -> {block}attn.c_attn"].what.startswith("scaled")


class Gated(nn.Module):
    """down(act(gate x) * between(up x))."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDE)
        self.gate, self.up = nn.Linear(WIDE, 2 * WIDE), nn.Linear(WIDE, 2 * WIDE)
        self.down = nn.Linear(2 * WIDE, WIDE)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.between(self.up(x)))


class ReadTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.norm(x))
        return self.down(F.silu(self.gate(x)) * up) + up[..., :WIDE]


class Squared(Gated):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(up * F.relu(up))


REFUSED = {
    "nonlinearity": (Gated(nn.GELU()), "'gelu'"),
    "read twice": (ReadTwice(), "is also read by"),
    "squared": (Squared(), "in two ways"),
    "dropout": (Gated(nn.Dropout(0.5)).train(), "'dropout'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    model, reason = REFUSED[name]
    x = torch.randn(2, 9, WIDE)
    new = ridgeline.reparameterize(model, "rotation", args=(x,), calibration=[x], codec=CODEC)
    assert reason in {line.path: line for line in new.report}["down"].reason
    assert new.down.weight is model.down.weight
    assert new.training == model.training


def test_dropout_at_rest_is_none() -> None:
    x = torch.randn(2, 9, WIDE)
    _, lines = prepared(lively(Gated(nn.Dropout(0.5))), x, calibration=[x], codec=CODEC)
    assert lines["up -> down"].what.startswith("scaled")


def test_scales_pass_relu_and_two_sites_in_a_row() -> None:
    torch.manual_seed(0)
    model = lively(
        nn.Sequential(
            nn.LayerNorm(WIDE),
            nn.Linear(WIDE, WIDE),
            nn.ReLU(),
            nn.Linear(WIDE, WIDE),
            nn.ReLU(),
            nn.Linear(WIDE, 3),
        )
    )
    x = torch.randn(65, WIDE)
    _, lines = prepared(model, x, calibration=[x], codec=CODEC)
    assert list(lines) == ["0 -> 1", "1 -> 3", "3 -> 5"]
    assert sum(bool(line.what) for line in lines.values()) >= 2


def test_a_layer_called_twice_and_a_weight_held_twice_stay() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDE, WIDE), torch.randn(9, WIDE)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    held = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE))
    held[1].unused = held[2].weight
    for model in (twice, held):
        new, lines = prepared(model, x, calibration=[x])
        assert any("shared" in line.reason for line in lines.values())
        assert not changed(new, model)


def test_planted_outliers_cost_clearly_less() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.norm.weight[::16] *= 40  # loud channels, as real models have them
        for layer in (model.gate, model.up):
            layer.weight[:, ::16] /= 20
        model.up.weight[::24] *= 30
        model.down.weight[:, ::24] /= 25
    x = torch.randn(1024, WIDE)
    new, lines = prepared(model, x, calibration=[x], codec=CODEC)
    for path, line in lines.items():
        assert line.after < 0.7 * line.before, path
    for name in ("up", "down"):
        errors = []
        for m in (new, model):
            hessian = collect_hessians(m, [name], [x])[name]
            weight = m.get_submodule(name).weight.detach()
            errors.append(coded_harm(weight, hessian, torch.ones(len(weight)), CODEC))
        assert errors[0] < 0.7 * errors[1], name


class Attention(nn.Module):
    """Two query heads per key/value head, of an odd width; one channel of each value is loud."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.qkv, self.out = nn.Linear(WIDE, 8 * width), nn.Linear(4 * width, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([4 * self.width, 2 * self.width, 2 * self.width], -1)
        q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("width", [20, 32])
def test_rotations_of_grouped_heads(width: int) -> None:
    model, x = lively(Attention(width)), torch.randn(2, 9, WIDE)
    new, lines = prepared(model, x)
    assert lines["qkv -> out"].what == "turned"
    was, held = model.qkv.weight, new.qkv.weight
    assert torch.equal(was[: 6 * width], held[: 6 * width])
    for head in range(6, 8):
        rows = slice(head * width, (head + 1) * width)
        assert torch.allclose(was[rows].norm(), held[rows].norm())
        assert not torch.allclose(was[rows], held[rows])
    again, _ = prepared(new, x)
    assert changed(again, new) == changed(new, model)
    same = ridgeline.reparameterize(model, "rotation", args=(x,))
    assert torch.equal(same.qkv.weight, new.qkv.weight)
    other = ridgeline.reparameterize(model, "rotation", args=(x,), seed=1)
    assert not torch.equal(other.qkv.weight, new.qkv.weight)


@pytest.mark.parametrize("width", [1, 2, 20, 64])
def test_rotations_are_orthogonal(width: int) -> None:
    q = orthogonal(width, torch.Generator().manual_seed(3))
    assert torch.allclose(q @ q.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    if width == 64:
        assert torch.allclose(q.abs(), torch.tensor(1 / 8, dtype=torch.float64))


def test_scales_of_16_bit_weights_are_powers_of_two() -> None:
    model = lively(Gated()).bfloat16()
    x = torch.randn(2, 9, WIDE).bfloat16()
    new = ridgeline.reparameterize(model, "rotation", args=(x,), calibration=[x], codec=CODEC)
    assert "scaled" in {line.path: line for line in new.report}["up -> down"].what
    ratio = (model.up.bias / new.up.bias).float()
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert torch.equal(new(x), model(x))


def test_a_wrong_fold_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = lively(Attention(32)), torch.randn(2, 9, WIDE)
    monkeypatch.setattr(
        "ridgeline.passes.preparation.fold.orthogonal", lambda n, _: 2 * torch.eye(n).double()
    )
    with pytest.raises(UnprovenError, match="differs from the given one"):
        ridgeline.reparameterize(model, "rotation", args=(x,))


def test_a_call_or_calibration_is_needed() -> None:
    with pytest.raises(QuantizationError, match="pass args="):
        ridgeline.reparameterize(Gated(), "rotation")


class FromMinusOne(nn.Module):
    """A norm whose weight counts from -1, with a bias after it, written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDE)), nn.Parameter(torch.randn(WIDE))
        self.weight.data[::16] += 30
        self.read = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.read(x * (1 + self.weight) + self.bias)


def test_a_norm_that_is_written_out() -> None:
    model, x = FromMinusOne().eval(), torch.randn(2, 9, WIDE)
    new, lines = prepared(model, x, calibration=[x], codec=CODEC)
    assert lines["weight -> read"].what.startswith("scaled")
    assert changed(new, model) == {"weight", "bias", "read.weight"}


class Crossed(nn.Module):
    """Torch's own attention, whose projections are no modules that calibration could watch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDE)
        self.attention = nn.MultiheadAttention(WIDE, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_projections_that_are_no_modules_stay() -> None:
    model, x = lively(Crossed()), torch.randn(2, 9, WIDE)
    new, lines = prepared(model, x, calibration=[x], codec=CODEC)
    assert not changed(new, model)
    assert lines


def test_a_listed_layer_keeps_its_whole_site() -> None:
    model, x = lively(Gated()), torch.randn(2, 9, WIDE)
    new, lines = prepared(model, x, calibration=[x], codec=CODEC, ignore=["down"])
    assert lines["up -> down"].reason == "listed in ignore="
    assert not {"down.weight", "up.bias"} & changed(new, model)
