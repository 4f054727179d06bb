"""Plans of tensor parallelism: from shapes alone, with the reason where a layer stays whole."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
