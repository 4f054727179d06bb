"""Ranks whose code, options, libraries or weights are not the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

import ridgeline
from gloo.meetings import attempted
from gloo.models import build, ids
from gloo.work import PLAIN


def _part_and_call(model: nn.Module, **options: Any) -> tuple[Any, Callable[[], Tensor]]:
    part, x = ridgeline.parallelize(model, **(PLAIN | options)), ids(2, 7) % 53
    return part, lambda: part(x, use_cache=False).logits


@torch.no_grad()
def other_code() -> dict[str, str]:
    """What a call comes to, by what differs on rank 1 alone; the collectives and norms do not.

    Heads and channels divide evenly; then, for the last two, not, so that the ranks' graphs differ.
    """
    odd, x, said = dist.get_rank() == 1, ids(2, 7) % 53, {}
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 53}
    even = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 41}
    for name, parts in (("activation", even), ("scale", uneven), ("nothing", uneven)):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **parts)).eval()
        expected, layer = model(x).logits, model.model.layers[0]
        if odd and name == "activation":
            layer.mlp.act_fn = ACT2FN["relu"]
        if odd and name == "scale":
            layer.self_attn.scaling = 0.1
        said[name] = attempted(_part_and_call(model)[1], expected)
    return said


def other_options() -> dict[str, str]:
    """What `parallelize` says, by the option that differs on rank 1 alone."""
    odd, model, said = dist.get_rank() == 1, build("llama"), {}
    options: dict[str, Any] = {
        "passes": ridgeline.passes.PASSES,
        "lowering": "inductor",
        "max_graphs": 3,
        "fuse": "never",
        "weave": "always",
        "target": "h100",
    }
    for name, value in options.items():
        mine = {name: value} if odd else {}
        said[name] = attempted(lambda mine=mine: _part_and_call(model, **mine)[0], Tensor())
    with pytest.MonkeyPatch.context() as patch:
        if odd:
            patch.setattr(transformers, "__version__", "4.0")
        said["transformers"] = attempted(lambda: _part_and_call(model)[0], Tensor())
    return said


@torch.no_grad()
def changed_in_place() -> dict[str, str]:
    """A norm's weight is changed after the first call: on rank 1, on rank 0 too, unnoticed on rank
    1, and where graphs are dropped there."""
    odd, model, x = dist.get_rank() == 1, build("llama", layers=2), ids(2, 7) % 53
    part, call = _part_and_call(model)
    weight = part.model.layers[1].input_layernorm.weight  # shared with `model`
    said = {"first": attempted(call, model(x).logits)}
    if odd:
        weight.mul_(3)
    said["changed on one"] = attempted(call, x)
    if not odd:
        weight.mul_(3)
    said["changed on both"] = attempted(call, model(x).logits)
    if odd:
        weight.data.mul_(2)
        part.refresh()
    said["dropped on one"] = attempted(call, x)
    part.refresh()
    said["dropped on both"] = attempted(call, x)
    weight.copy_(torch.ones_like(weight))
    said["at last"] = attempted(call, model(x).logits)
    return said
