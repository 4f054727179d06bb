"""Tiny models of the families, the same on every rank."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

LAYERS = 1
"""Of each model, unless a test is about what goes from layer to layer."""
_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 70,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(family: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> PreTrainedModel:
    """llama: 4 key-value heads; gqa: 2, with biases and tied embeddings; gpt2; gemma; gemma2."""
    torch.manual_seed(0)
    sizes = _SIZES | {"num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    elif family == "gqa":
        tied = {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **(heads | tied)))
    elif family == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**sizes, **few))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **few))
    else:
        ends = {name: _SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        model = GPT2LMHeadModel(
            GPT2Config(**ends, n_embd=64, n_layer=layers, n_head=4, n_positions=64)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are not 1 and 0
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval().to(dtype)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(1))
