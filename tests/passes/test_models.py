"""Whole models of transformers: first that the rewrite ran, then that the outputs agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ridgeline.passes import optimize

transformers = pytest.importorskip("transformers")
LAYERS = 2
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **_SIZES, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=99, n_positions=64,
        bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(**options: Any) -> nn.Module:
    config = transformers.BertConfig(
        **_SIZES, num_attention_heads=4, vocab_size=99, max_position_embeddings=64, **options
    )
    return transformers.BertModel(config)


def vit(**options: Any) -> nn.Module:
    config = transformers.ViTConfig(
        **_SIZES, num_attention_heads=4, image_size=16, patch_size=4, **options
    )
    return transformers.ViTModel(config)


def _made(build: Callable[..., nn.Module], dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(**options).eval().to(dtype)
    with torch.no_grad():  # logits of ordinary size, so that attention is not near uniform
        for name, parameter in model.named_parameters():
            if "weight" in name and parameter.dim() == 2:
                parameter.mul_(4)
    return model


def _ids(batch: int, length: int = 7) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(batch))


def _padding(batch: int, length: int = 7) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def _agree(got: Tensor, expected: Tensor, rows: Tensor | None = None) -> None:
    """Within the rounding of the dtype, over a whole model; rows: those that mean something."""
    rounding = {torch.float32: 2e-5, torch.bfloat16: 4e-2}[expected.dtype]
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if rows is not None:
        got, expected = got[rows], expected[rows]
    assert (got - expected).double().norm() <= rounding * expected.double().norm()


def _mask(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "no mask":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left padding":
        mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("no mask", torch.float32),
        ("mask of ones", torch.float32),
        ("left padding", torch.float32),
        ("left padding", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, bert])
@torch.no_grad()
def test_language_models(rewrite, build, implementation, kind, dtype):
    model = _made(build, dtype, attn_implementation=implementation)
    options = {} if build is bert else {"use_cache": False}
    batch, result = (3 if kind == "left padding" else 1), None
    for length in (7, 12):  # the second runs in the graph captured for the first
        mask = _mask(kind, batch, length)
        inputs = {"input_ids": _ids(batch, length), **options}
        inputs |= {} if mask is None else {"attention_mask": mask}
        if result is None:
            result = rewrite(model, (), inputs)
            assert len(result.attentions) == LAYERS, result.reasons
        got, expected = result(**inputs)[0], model(**inputs)[0]
        _agree(got, expected, None if mask is None else mask.bool())
    if kind == "no mask" and build is not bert:
        assert all(n.args[3] is None and n.kwargs["diagonal"] == 0 for n in result.attentions)
    if build is llama:
        assert all(n.args[1].meta["val"].shape[1] == 2 for n in result.attentions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_vision_transformer(rewrite, implementation, dtype):
    model = _made(vit, dtype, attn_implementation=implementation)
    for batch in (1, 3):
        image = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        result = rewrite(model, (image,))
        assert len(result.attentions) == LAYERS, result.reasons
        assert all(n.args[3] is None and n.kwargs["diagonal"] is None for n in result.attentions)
        _agree(result(image).last_hidden_state, model(image).last_hidden_state)


@torch.no_grad()
def test_returned_attention_weights_are_left_alone(rewrite):
    model = _made(llama, torch.float32, attn_implementation="eager")
    inputs = {"input_ids": _ids(2), "use_cache": False, "output_attentions": True}
    result = rewrite(model, (), inputs)
    assert result.attentions == []
    assert "also read by the model's return value" in result.reasons
    got, expected = result(**inputs), model(**inputs)
    _agree(got.logits, expected.logits)
    for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_sliding_window(rewrite):
    config = transformers.MistralConfig(
        **_SIZES, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, sliding_window=4
    )
    torch.manual_seed(0)
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        model = transformers.MistralForCausalLM(config).eval()
        inputs = {"input_ids": _ids(2, 9), "use_cache": False}
        result = rewrite(model, (), inputs)
        assert len(result.attentions) == LAYERS
        assert all(n.args[3] is not None for n in result.attentions)
        _agree(result(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_keeps_dropout_and_gradients(rewrite, implementation):
    model = _made(gpt2, torch.float32, attn_implementation=implementation).train()
    inputs = {"input_ids": _ids(2), "labels": _ids(2), "use_cache": False}
    assert rewrite(model, (), inputs).attentions == []  # attention dropout is on by default
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    result = rewrite(model, (), inputs)
    assert len(result.attentions) == LAYERS, result.reasons
    gradients = []
    for run in (model, result):
        model.zero_grad()
        run(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


# -- the flow as users call it ---------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.slow
def test_generate(cache):
    # Eager attention over a static cache ties the graph to the prompt's length.
    implementation = "eager" if cache is None else "sdpa"
    model = _made(llama, torch.float32, attn_implementation=implementation)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = [
        {
            "inputs": _ids(2, length), "attention_mask": _mask("left padding", 2, length),
            "max_length": 16, "do_sample": False, "pad_token_id": 0,
            "cache_implementation": cache,
        }
        for length in (7, 11)
    ]  # fmt: skip
    expected = [model.generate(**call) for call in calls]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    fast = optimize(model, target="a100", lowering="eager")
    assert isinstance(fast, transformers.LlamaForCausalLM)
    for call, tokens in zip(calls, expected, strict=True):
        assert torch.equal(fast.generate(**call), tokens)
    assert (fast.captures, fast.fallbacks) == (2, {})
    found = list(fast.plan.applied)
    if implementation == "sdpa":  # the fused call may be as good on this target
        found += [d for d in fast.plan.refused if d.refused_by == "cost"]
    found = [d for d in found if d.rewrite == "flash_attention"]
    assert sorted(d.phase for d in found) == ["decode"] * LAYERS + ["prefill"] * LAYERS
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.slow
def test_generate_over_a_sliding_window(cache):
    """The layers' own counters are free: a graph serves every length on one side of the window."""
    config = transformers.Gemma2Config(
        **_SIZES, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, sliding_window=9,
        head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    fast = optimize(model, target="a100", lowering="eager")
    for length in (5, 13, 4):
        call = {
            "inputs": _ids(2, length), "min_new_tokens": 20, "max_new_tokens": 20,
            "do_sample": False, "pad_token_id": 0, "cache_implementation": cache,
        }  # fmt: skip
        assert fast.generate(**call).tolist() == model.generate(**call).tolist()
    assert fast.fallbacks == {}
    assert fast.captures <= 7  # static caches hold 25, 33 and 24 tokens


@torch.no_grad()
def test_hidden_states_on_request():
    """transformers puts hooks on the layers for them, at the first request, and leaves them."""
    model = _made(llama, torch.float32)
    fast, ids = optimize(model, target="a100", lowering="eager"), _ids(2)
    for wanted in (False, True, False, True, True):
        ours = fast(ids, use_cache=False, output_hidden_states=wanted)
        theirs = model(ids, use_cache=False, output_hidden_states=wanted)
        _agree(ours.logits, theirs.logits)
        assert len(ours.hidden_states or ()) == (LAYERS + 1 if wanted else 0)
        for a, b in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            _agree(a, b)
    assert fast.fallbacks == {}
    captured = fast.captures
    fast(ids, use_cache=False)
    assert fast.captures <= captured + 1
