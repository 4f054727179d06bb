"""Tiny random-weight models of many families, from transformers and diffusers configurations.

A family is a name, how to build it and what to call it with; sizes are small, and odd where the
family allows it. The packages are imported when a family is built.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    kind: "decoder", "encoder", "encoder-decoder", "vision", "audio" or "diffusion".
    build: (attention implementation) -> the model in eval mode. inputs: -> keyword arguments.
    """

    name: str
    kind: str
    build: Callable[[str], nn.Module] = field(repr=False)
    inputs: Callable[[], dict[str, Any]] = field(repr=False)


def _transformers(name: str, auto: str, sizes: dict[str, Any]) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import transformers

        merged = {k: v for k, v in {**_SIZES, **sizes}.items() if v is not None}
        config = transformers.AutoConfig.for_model(name, **merged)
        model = getattr(transformers, auto).from_config(config, attn_implementation=attention)
        return model.eval()

    return build


def _ids(length: int = 9) -> Tensor:
    return torch.randint(3, 90, (2, length))


_HEAD = {"head_dim": 16}
_WITH_HEAD_DIM = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("stablelm", "starcoder2", "olmo", "olmo2", "cohere", "granite", "smollm3", "mixtral"),
    *("persimmon", "nemotron", "helium", "glm"),
)
_PLAIN = (*("gpt2", "gpt_neox", "opt", "bloom", "falcon", "mpt", "biogpt", "gpt_bigcode", "xglm"),)
_DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_WITH_HEAD_DIM, _HEAD),
    **{name: {} for name in _PLAIN},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {**_HEAD, "num_local_experts": 4},
    "deepseek_v3": {
        **{
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    },
    "llama4_text": {
        **{**_HEAD, "intermediate_size_mlp": 96, "num_local_experts": 2, "rope_theta": 1e4},
    },
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "head_dim": 16, "num_heads": 8, "n_groups": 1},
}
_ENCODERS = (
    *("bert", "roberta", "electra", "albert", "deberta-v2", "mpnet", "xlm-roberta", "modernbert"),
    *("camembert", "esm", "roformer", "convbert", "fnet", "nystromformer"),
)
_DISTILBERT = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
_PAIR = {
    **{"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    **{"encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 1},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
}
_PAIRS = ("t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "marian", "m2m_100")
_VISION = (
    *("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "data2vec-vision", "vit_msn"),
    *("ijepa", "siglip_vision_model", "clip_vision_model"),
)
_WAVES = {
    **{"conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4)},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
_AUDIO = ("wav2vec2", "hubert", "wavlm", "sew", "unispeech", "data2vec-audio")


def families() -> Iterator[Family]:
    """Every family of this list."""

    def text() -> dict[str, Any]:
        return {"input_ids": _ids()}

    for name, sizes in _DECODERS.items():
        yield Family(name, "decoder", _transformers(name, "AutoModelForCausalLM", sizes), text)
    for name in _ENCODERS:
        yield Family(name, "encoder", _transformers(name, "AutoModel", {}), text)
    yield Family(
        "distilbert", "encoder", _transformers("distilbert", "AutoModel", _DISTILBERT), text
    )
    for name in _PAIRS:
        build = _transformers(name, "AutoModelForSeq2SeqLM", _PAIR)
        yield Family(
            *(name, "encoder-decoder", build),
            lambda: {
                "input_ids": _ids(),
                "decoder_input_ids": _ids(5),
                "attention_mask": torch.ones(2, 9, dtype=torch.int64),
            },
        )
    for name in _VISION:
        build = _transformers(name, "AutoModel", {"num_key_value_heads": None})
        yield Family(name, "vision", build, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})
    for name in _AUDIO:
        build = _transformers(name, "AutoModel", _WAVES)
        yield Family(name, "audio", build, lambda: {"input_values": torch.randn(2, 1600)})
    mel = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    yield Family(
        *("whisper", "audio", _transformers("whisper", "AutoModel", {**_PAIR, **mel})),
        lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _ids(5)},
    )
    yield from _diffusion()


def _diffusion() -> Iterator[Family]:
    def dit(attention: str) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2,
            sample_size=8, patch_size=2, norm_num_groups=4,
        ).eval()  # fmt: skip

    def unet(attention: str) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
            layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    def vae(attention: str) -> nn.Module:
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            block_out_channels=(32,), norm_num_groups=8, latent_channels=4, sample_size=16
        ).eval()

    steps = torch.tensor([1, 2])
    yield Family(
        *("dit", "diffusion", dit),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": steps, "class_labels": steps
        },
    )  # fmt: skip
    yield Family(
        *("unet", "diffusion", unet),
        lambda: {
            "sample": torch.randn(2, 4, 8, 8), "timestep": steps,
            "encoder_hidden_states": torch.randn(2, 7, 32),
        },
    )  # fmt: skip
    yield Family("vae", "diffusion", vae, lambda: {"sample": torch.randn(2, 3, 16, 16)})
