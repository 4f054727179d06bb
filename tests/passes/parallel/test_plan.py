"""Plans of tensor parallelism: from shapes alone, with the reason where a layer stays whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    Gemma3nTextConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from ridgeline.passes.parallel import Unparallel, plan_parallel
from ridgeline.passes.parallel.plan import head_spans


def test_seventy_billion_parameters_are_planned_without_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    plan = plan_parallel(model, 8)
    assert len(plan.splits) == 2 * 80 + 2
    assert not plan.refused
    norms = 2 * 8192 * (2 * 80 + 1)
    assert plan.bytes_per_rank == ((plan.bytes_whole - norms) // 8 + norms,) * 8


def test_heads_stay_beside_the_keys_that_they_read() -> None:
    assert head_spans(9, 3, 2) == (((0, 3), (3, 9)), ((0, 1), (1, 3)))
    assert head_spans(8, 2, 4) == (
        ((0, 2), (2, 4), (4, 6), (6, 8)),
        ((0, 1), (0, 1), (1, 2), (1, 2)),
    )
    with pytest.raises(Unparallel, match="use at most 3 ranks"):
        head_spans(9, 3, 4)


def test_an_unknown_parameter_keeps_its_layer_whole() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=70,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    plan = plan_parallel(model, 2)
    assert plan.refused == (
        ("model.layers.0.self_attn", "the parameter sinks is not known to allow a split"),
    )
    with pytest.raises(Unparallel, match="no attention or MLP"):
        plan_parallel(torch.nn.Linear(3, 3), 2)


def test_linear_layers_of_unknown_names_are_listed_with_their_bytes() -> None:
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=70, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.adapter = nn.Linear(64, 250, bias=False)
    plan = plan_parallel(model, 2)
    ((path, reason),) = plan.refused
    assert path == "model.layers.*.adapter"
    assert reason == "no split of a layer of this name is known; 2 of 0.1 MB on every rank"
    assert "held by all: model.layers.*.adapter: no split" in str(plan)


def test_experts_in_one_weight_are_listed_with_their_bytes() -> None:
    model = Mlp()
    model.experts = nn.ParameterList([torch.zeros(4, 8, 16)])
    model.positions = nn.ParameterList([torch.zeros(1, 5, 8)])
    ((path, reason),) = plan_parallel(model, 2).refused
    assert path == "experts"
    assert reason.endswith("not split (no expert parallelism); 1 of 0.0 MB on every rank")


def test_what_is_there_is_said_where_no_name_is_known() -> None:
    model = nn.Sequential(nn.ModuleDict({"qkv_proj": nn.Linear(8, 24), "o_proj": nn.Linear(8, 8)}))
    with pytest.raises(Unparallel, match=r"\*.qkv_proj: no split of.*known names are q_proj/k_p"):
        plan_parallel(model, 2)


def test_projections_packed_head_by_head_stay_whole() -> None:
    """GPT-BigCode's c_attn is as wide as GPT-2's, and holds q, k, v of each head in turn."""
    config = GPTBigCodeConfig(
        vocab_size=101, n_positions=32, n_embd=16, n_layer=1, n_head=4, multi_query=False,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    plan = plan_parallel(GPTBigCodeForCausalLM(config), 2)
    ((path, reason),) = plan.refused
    assert path == "transformer.h.0.attn"
    assert "all queries, all keys, then all values" in reason
    assert [split.kind for split in plan.splits] == ["mlp", "embedding", "lm_head"]


def test_norms_of_heads_need_no_weight() -> None:
    config = NanoChatConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    plan = plan_parallel(NanoChatForCausalLM(config), 2)
    assert "attention" in [split.kind for split in plan.splits]


def test_an_mlp_needs_no_gate() -> None:
    config = ArceeConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    (split,) = [s for s in plan_parallel(ArceeForCausalLM(config), 2).splits if s.kind == "mlp"]
    assert split.columns == ("up_proj",)
    assert split.spans == ((0, 24), (24, 48))


def test_channels_that_are_compared_with_one_another_stay_together() -> None:
    config = Gemma3nTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.95, 0.0],
    )  # fmt: skip
    mlps = nn.ModuleList(Gemma3nTextMLP(config, layer) for layer in range(2))
    plan = plan_parallel(mlps, 2)
    assert plan.refused == (("0", "its activation reads all channels of a row"),)
    assert [split.path for split in plan.splits] == ["1"]


class Mlp(nn.Module):
    """Channels under Megatron's names, with an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.one, self.two = (
            nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})
            for _ in range(2)
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def forward_pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True)


def backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: x


def weight_norm(layer: nn.Module) -> None:
    layer.bias.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


CHANGES = {
    forward_hook: "has a hook (forward_hook.<locals>.<lambda>); remove it",
    forward_pre_hook: "has a hook (forward_pre_hook.<locals>.<lambda>); remove it",
    backward_hook: "has a hook (backward_hook.<locals>.<lambda>); remove it",
    own_forward: "has a forward of its own, set on the object",
    weight_norm: "has a computed weight (parametrizations)",
    spectral_norm: "has a computed weight (weight_norm, spectral_norm or pruning); make it perm",
    pruned: "has a computed weight (weight_norm, spectral_norm or pruning); make it perm",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", ["up_proj", "down_proj"])
def test_layers_that_compute_something_else_stay_whole(change: Any, layer: str) -> None:
    model = Mlp()
    change(model.one[layer])
    change(model.head)
    plan = plan_parallel(model, 2)
    assert [split.path for split in plan.splits] == ["two"]
    reasons = dict(plan.refused)
    assert reasons["one"].startswith(f"{layer} {CHANGES[change]}")
    assert reasons["head"].startswith(f"the lm_head {CHANGES[change]}")


def test_subclasses_of_layers_stay_whole() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Mlp()
    model.one["down_proj"] = Doubled(16, 8)
    plan = plan_parallel(model, 2)
    assert plan.refused == (("one", "no split is known of down_proj, a Doubled"),)
    model.two.forward = lambda x: x
    with pytest.raises(Unparallel, match="two: it has a forward of its own, set on the object"):
        plan_parallel(model, 2)


def test_a_weight_that_would_be_cut_in_two_ways_is_not() -> None:
    model = Mlp()
    model.one["up_proj"] = nn.Linear(8, 8)
    model.one["down_proj"] = nn.Linear(8, 8)
    model.one["up_proj"].weight = model.one["down_proj"].weight
    plan = plan_parallel(model, 2)
    ((path, reason),) = plan.refused
    assert path == "one"
    assert reason.startswith("its up_proj.weight is one.down_proj.weight too, of which")
    assert [split.path for split in plan.splits] == ["two", "emb", "head"]
    model.head.weight = model.emb.weight  # cut alike: one part
    model.two["down_proj"].bias = model.one["down_proj"].bias  # held whole by both
    assert len(plan_parallel(model, 2).splits) == 3
