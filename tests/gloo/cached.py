"""Calls that go on from caches, on ranks that hold one head and two, or other numbers of tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import ridgeline
from gloo.meetings import attempted
from gloo.models import build, ids
from gloo.work import PLAIN, error

COMPILED: dict[str, Any] = {"passes": (), "fuse": "never", "weave": "never"}


@torch.no_grad()
def uneven() -> dict[str, Any]:
    """3 key-value heads on 2 ranks, one sequence: what the prefill leaves in its cache lies as what
    a step leaves where it is one head, and not where it is two. Errors of each step against one
    process, and what was captured."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 53}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    part, x = ridgeline.parallelize(model, **COMPILED), ids(1, 9) % 53
    caches, errors = [DynamicCache(), DynamicCache()], []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        got, expected = (
            m(x[:, start:end], past_key_values=cache, use_cache=True).logits
            for m, cache in zip((part, model), caches, strict=True)
        )
        errors.append(error(got, expected))
    heads_here = caches[0].layers[0].keys.shape[1]
    return {"errors": errors, "captures": part.captures, "heads": heads_here}


@torch.no_grad()
def of_other_lengths() -> list[str]:
    """Rank 1 has one token less in its cache, which grows or is static; then as many."""
    model, x, said = build("llama"), ids(2, 7), []
    part = ridgeline.parallelize(model, **PLAIN)

    def logits(m: Any, cache: Any, start: int, end: int) -> Tensor:
        return m(x[:, start:end], past_key_values=cache, use_cache=True).logits

    for make in (DynamicCache, lambda: StaticCache(config=model.config, max_cache_len=9)):
        mine, theirs = make(), make()
        logits(part, mine, 0, 5)
        logits(model, theirs, 0, 5)
        said.append(attempted(lambda m=mine: logits(part, m, 5, 6), logits(model, theirs, 5, 6)))
        if dist.get_rank() == 1:
            mine.crop(-1)
        said.append(attempted(lambda m=mine: logits(part, m, 6, 7), x))
        if dist.get_rank() == 0:
            mine.crop(-1)
        theirs.crop(-1)
        said.append(attempted(lambda m=mine: logits(part, m, 5, 6), logits(model, theirs, 5, 6)))
    return said
