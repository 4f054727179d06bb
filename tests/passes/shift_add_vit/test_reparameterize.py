"""Whole models: what is replaced, what stays and why, two stages of training, and the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.reparameterize import ReparameterizeError
from ridgeline.passes.shift_add_vit import (
    AdditiveAttention,
    MixtureOfPrimitives,
    ShiftAddError,
    ShiftLinear,
    balance_loss,
    count_operations,
    freeze,
)
from ridgeline.passes.shift_add_vit.find import SEPARATE


class Attention(nn.Module):
    """As ViTs have it."""

    def __init__(self, dim: int = 32, heads: int = 2, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, scale
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0)
        scale = self.scale or q.shape[-1] ** -0.5
        y = self.attn_drop((q @ k.transpose(-1, -2) * scale).softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 48), nn.Linear(48, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images [B,8,8] -> 10 logits."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 32), nn.Linear(32, 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3)
        return self.head(self.blocks(self.embed(patches.reshape(len(images), 16, 4))).mean(1))


def encoder(**options) -> nn.TransformerEncoder:
    settings = {"dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(32, 2, 48, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def reparameterized(model: nn.Module, **options) -> nn.Module:
    return ridgeline.reparameterize(model, "shift_add_vit", target="cpu", **options)


def became(model: nn.Module) -> dict[str, str]:
    return {line.path: line.became for line in model.report}


MODELS = {
    "vit": (ViT, lambda: torch.randn(3, 8, 8)),
    "encoder": (encoder, lambda: torch.randn(3, 5, 32)),
    "norm first": (lambda: encoder(norm_first=True), lambda: torch.randn(3, 5, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_caller_keeps_its_model(name):
    build, example = MODELS[name]
    model, x = build().eval(), example()
    with torch.no_grad():
        before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
        new = reparameterized(model)
        for parameter in new.parameters():
            parameter.zero_()
        assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_two_stages():
    model = ViT()
    first = reparameterized(model, stage=1)
    assert became(first) == {f"blocks.{i}.attn": "AdditiveAttention" for i in (0, 1)}
    second = reparameterized(first, stage=2)
    layers = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("fc1", "fc2", "attn.qkv", "attn.proj")]
    found = became(second)
    assert [path for path, kind in found.items() if kind == "MixtureOfPrimitives"] == layers
    assert found["embed"] == found["head"] == ""
    assert type(second.embed) is type(second.head) is nn.Linear
    assert str(second.report[-1]).startswith("head stays: outside the blocks")


@pytest.mark.parametrize("linears", ["shift", "mixture", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_training_then_kernels(name, linears):
    build, example = MODELS[name]
    model, x = reparameterized(build(), linears=linears).train(), example()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(x).square().mean()
    if linears == "mixture":
        loss = loss + balance_loss(model)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        fast = ridgeline.optimize(model, (x,), target="cpu", lowering="eager")
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    assert not fast.fallbacks
    assert "ridgeline::binary_attention" in {k.op for k in fast.plan.kernels}
    frozen = [m for m in fast.modules() if isinstance(m, QuantizedLinear)]
    assert len(frozen) == {"shift": 8, "mixture": 8, "keep": 0}[linears]
    assert not any(isinstance(m, ShiftLinear) for m in fast.modules())


@pytest.mark.slow
def test_compiled_code_and_free_sizes():
    model = reparameterized(ViT(depth=1)).train()
    model(torch.randn(4, 8, 8))
    model.eval()
    fast = ridgeline.optimize(model, target="cpu")
    with torch.no_grad():
        for batch in (3, 5):
            x = torch.randn(batch, 8, 8)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not fast.fallbacks
    assert not [n for n in fast.plan.notes if "Inductor did not" in n]


@torch.no_grad()
def test_an_image_alone_and_inside_a_batch():
    model = reparameterized(ViT(), latencies=(2.0, 1.0), capacity=1.0).train()
    model(3 * torch.randn(16, 8, 8))
    model.eval()
    x = torch.randn(6, 8, 8)
    x[1:] *= 10
    whole = model(x)
    torch.testing.assert_close(model(x[:1]), whole[:1], rtol=1e-4, atol=1e-5)


def test_thresholds_are_running_means():
    attention = reparameterized(ViT(), linears="keep").blocks[0].attn.train()
    x = torch.randn(4, 9, 32) + 1
    with torch.no_grad():
        attention(x)
        packed = attention.qkv(x).unflatten(-1, (3, 2, 16))
        torch.testing.assert_close(attention.queries.mean, packed[:, :, 0].mean((0, 1)))
        torch.testing.assert_close(attention.keys.mean, packed[:, :, 1].mean((0, 1)))
        before = attention.queries.mean.clone()
        attention(2 * x)
        assert not torch.equal(attention.queries.mean, before)
        assert attention.queries.batches == 2
        parts = packed.permute(2, 0, 3, 1, 4)
        trained = attention._attend(*parts)  # by the thresholds that eval uses too
        assert torch.equal(attention.eval()._attend(*parts), trained)


def test_an_attention_that_has_seen_no_batch_is_warned_of(caplog):
    freeze(reparameterized(ViT(), linears="keep").eval())
    assert "2 additive attentions have seen no batch" in caplog.text


@torch.no_grad()
def test_a_free_number_of_tokens():
    model = reparameterized(encoder(), latencies=(3.0, 2.0)).train()
    model(torch.randn(3, 5, 32))
    model.eval()
    fast = ridgeline.optimize(model, target="cpu", lowering="eager")
    for tokens in (5, 8, 13):
        x = torch.randn(2, tokens, 32)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not fast.fallbacks


def test_freezing_packs_shift_layers_once():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(ViT(), layer)
    shift = reparameterized(model, linears="shift", attention="keep").eval()
    frozen = freeze(shift)
    x = torch.randn(2, 8, 8)
    assert freeze(frozen) is frozen
    assert freeze(shift.train()) is shift
    assert isinstance(shift[0].blocks[0].fc1, ShiftLinear)
    assert isinstance(frozen[0].blocks[0].fc1, QuantizedLinear)
    assert frozen[0].head is not shift[0].head
    assert frozen[0].head.weight is shift[0].head.weight
    with torch.no_grad():
        torch.testing.assert_close(frozen[0].eval()(x), shift[0].eval()(x), rtol=1e-4, atol=1e-5)


def test_operations_are_counted():
    model, x = ViT().eval(), torch.randn(1, 8, 8)
    plain = count_operations(model, x)
    products = 16 * (4 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48)) + 320 + 2 * 2 * 16 * 16 * 32
    assert (plain.multiplications, plain.additions, plain.shifts) == (products, products, 0)
    shift = count_operations(reparameterized(model, attention="keep", linears="shift"), x)
    assert shift.shifts == 16 * 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert shift.multiplications == products - shift.shifts + 16 * 2 * (4 * 32 + 48 + 32)
    add = count_operations(reparameterized(model, linears="keep"), x)
    assert add.multiplications < plain.multiplications + 2 * 16 * 32 * 10
    mixed = count_operations(reparameterized(model), x)
    assert shift.multiplications < mixed.multiplications < plain.multiplications
    assert shift.joules < mixed.joules
    assert shift.arithmetic_joules < mixed.arithmetic_joules < plain.arithmetic_joules
    layers = encoder().eval()
    tokens = torch.randn(1, 5, 32)
    assert count_operations(layers, tokens).multiplications > 5 * 2 * (4 * 32 * 32 + 2 * 32 * 48)


def test_a_vit_of_transformers_trains_and_runs_by_kernels():
    """Its queries, keys and values have layers of their own, and its attention gives a pair."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.ViTConfig(
        num_attention_heads=4, image_size=16, patch_size=4, num_labels=10, **sizes
    )
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 16, 16)
    new = reparameterized(model, linears="shift").train()
    assert became(new)["vit.layers.1.attention"] == "AdditiveAttention"
    assert became(new)["vit.layers.1.mlp.fc1"] == "ShiftLinear"
    loss = F.cross_entropy(new(pixel_values=images).logits, torch.tensor([1, 2]))
    loss.backward()
    attention = new.vit.layers[0].attention
    assert bool(attention.qkv.weight.grad.any())
    packed = torch.cat([getattr(model.vit.layers[0].attention, n).weight for n in SEPARATE])
    torch.testing.assert_close(attention.qkv.weight, packed)
    with torch.no_grad():
        given = {"pixel_values": images}
        fast = ridgeline.optimize(new.eval(), kwargs=given, target="cpu", lowering="eager")
        found = fast(pixel_values=images).logits
        torch.testing.assert_close(found, new(pixel_values=images).logits, rtol=1e-3, atol=1e-4)
    ran = [k.op for k in fast.plan.kernels]
    assert {"ridgeline::binary_attention", "ridgeline::quantized_linear"} <= set(ran)
    with pytest.raises(ShiftAddError, match="neither masks nor weights"):
        attention(torch.randn(1, 5, 64), torch.ones(1, 1, 5, 5))


class _Relative(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(torch.zeros(3))


class SeparateAttention(nn.Module):
    """An attention of transformers' form, as far as it is looked at."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))
        for name, value in ({"num_heads": 2} | attributes).items():
            setattr(self, name, value)


class _Odd(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Module()
        self.second.attn = attention


@pytest.mark.parametrize(
    ("build", "path", "reason"),
    [
        (lambda: encoder(dropout=0.1), "layers.0.self_attn", "dropout 0.1"),
        (lambda: encoder(batch_first=False), "layers.0.self_attn", "batch_first=True"),
        (lambda: _Odd(nn.MultiheadAttention(32, 2)), "second.attn", "cross attention"),
        (lambda: _Odd(_Relative()), "second.attn", "bias_table"),
        (lambda: _Odd(Attention(scale=1.0)), "second.attn", "does not compute softmax"),
        (lambda: _Odd(SeparateAttention(is_causal=True)), "second.attn", "is causal"),
        (lambda: _Odd(SeparateAttention(dropout=0.1)), "second.attn", "dropout 0.1"),
        (lambda: _Odd(SeparateAttention(num_heads=5)), "second.attn", "projections of shapes"),
    ],
)
def test_attentions_that_stay_say_why(build, path, reason):
    model = build()
    if isinstance(model, nn.TransformerEncoder):
        model = nn.ModuleList([model, Block()])
        path = f"0.{path}"
    lines = {line.path: line for line in reparameterized(model, stage=1).report}
    assert not lines[path].became
    assert reason in lines[path].reason
    assert "AdditiveAttention" in {line.became for line in lines.values()}


def test_dropout_inside_attention_stays():
    model = ViT()
    model.blocks[1].attn.attn_drop.p = 0.2
    new = reparameterized(model, stage=1)
    assert became(new) == {"blocks.0.attn": "AdditiveAttention", "blocks.1.attn": ""}
    assert isinstance(new.blocks[1].attn, Attention)


def test_linear_layers_that_stay_say_why():
    model = ViT()
    model.blocks[0].fc1.weight.data[0, 0] = torch.inf
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight
    lines = {line.path: line for line in reparameterized(model, ignore=["*.fc2"]).report}
    assert "infinite or NaN" in lines["blocks.0.fc1"].reason
    assert "ignore" in lines["blocks.0.fc2"].reason
    assert "shared by" in lines["blocks.1.attn.proj"].reason
    assert lines["blocks.1.fc1"].became == "MixtureOfPrimitives"


def test_projections_of_an_attention_that_is_kept_stay():
    model, x = encoder().eval(), torch.randn(2, 5, 32)
    new = reparameterized(model, attention="keep", linears="shift").eval()
    lines = {line.path: line for line in new.report}
    assert "own code" in lines["layers.0.self_attn.out_proj"].reason
    assert lines["layers.0.linear1"].became == "ShiftLinear"
    with torch.no_grad():  # torch's fused code must not take the latent weights
        changed = new(x)
        assert not torch.allclose(changed, model(x), atol=1e-3)
        new.layers[0].linear1.weight.mul_(1 + 1e-6)
        torch.testing.assert_close(new(x), changed, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_masks_and_cross_attention_are_refused_in_the_call():
    model, x = reparameterized(encoder()).eval(), torch.randn(2, 5, 32)
    with pytest.raises(ShiftAddError, match="masks"):
        model(x, mask=torch.zeros(5, 5))
    with pytest.raises(ShiftAddError, match="masks"):
        model(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    attention = model.layers[0].self_attn
    with pytest.raises(ShiftAddError, match="one tensor"):
        attention(x, x + 1, x)


def test_arguments_are_checked():
    model = ViT()
    for options, said in (
        ({"stage": 3}, "stage"),
        ({"attention": "linear"}, "attention"),
        ({"linears": "add"}, "linears"),
        ({"terms": 4}, "terms"),
        ({"capacity": 0.1}, "capacity"),
        ({"ignore": ["nothing"]}, "matches 'nothing'"),
        ({"latencies": (1.0, -1.0)}, "latencies"),
    ):
        with pytest.raises(ShiftAddError, match=said):
            reparameterized(model, **options)
    with pytest.raises(ReparameterizeError, match="method"):
        ridgeline.reparameterize(model, "shift_add")
    with pytest.raises(ReparameterizeError, match="Module"):
        ridgeline.reparameterize(7, "shift_add_vit")
    with pytest.raises(ShiftAddError, match="no attention was found"):
        reparameterized(nn.Sequential(nn.ReLU()))
    model.report = "mine"
    with pytest.raises(ShiftAddError, match="report"):
        reparameterized(model)


def test_a_reparameterized_model_is_saved_and_loaded(tmp_path):
    model = reparameterized(ViT()).train()
    model(torch.randn(4, 8, 8))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = reparameterized(ViT())
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    x = torch.randn(2, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
    assert isinstance(again.blocks[0].attn, AdditiveAttention)
    assert isinstance(again.blocks[0].fc1, MixtureOfPrimitives)
