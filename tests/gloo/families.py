"""Tiny models whose projections have other names than Llama's."""

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import ridgeline
from gloo.models import ids
from gloo.work import PLAIN, error
from ridgeline.passes.parallel import plan_parallel


def _built() -> dict[str, PreTrainedModel]:
    sizes: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 32}
    seq2seq: dict[str, Any] = {"vocab_size": 101, "d_model": 32, "decoder_start_token_id": 0}
    bart = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _BART.items()}
    return {
        "opt": OPTForCausalLM(OPTConfig(**sizes, **heads, ffn_dim=48, word_embed_proj_dim=32)),
        "phi": PhiForCausalLM(PhiConfig(**sizes, **heads, intermediate_size=48)),
        "t5": T5ForConditionalGeneration(
            T5Config(**seq2seq, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "bart": BartForConditionalGeneration(
            BartConfig(**seq2seq, **bart, max_position_embeddings=32)
        ),
    }


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


@torch.no_grad()
def of_other_names() -> dict[str, Any]:
    """Of each model what is split, and the error of its logits against one process."""
    torch.manual_seed(0)
    told, x = {}, ids(2, 7)
    for family, model in _built().items():
        for parameter in model.parameters():  # norms and biases that are not 1 and 0
            parameter += 0.1 * torch.randn_like(parameter)
        given = {"decoder_input_ids": x[:, :5]} if model.config.is_encoder_decoder else {}
        part = ridgeline.parallelize(model.eval(), **PLAIN)
        got, expected = (m(x, use_cache=False, **given).logits for m in (part, model))
        kinds = [split.kind for split in plan_parallel(model, 2).splits]
        told[family] = {"kinds": kinds, "error": error(got, expected)}
    return told
