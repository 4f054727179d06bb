"""Calls that go on from caches, on ranks that hold one head and two, or other numbers of tokens."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import ridgeline
from gloo.meetings import attempted
from gloo.models import build, ids
from gloo.work import PLAIN, error

COMPILED: dict[str, Any] = {"passes": (), "fuse": "never", "weave": "never"}


class Attention(nn.Module):
    """Attention of 3 heads of 8 channels, or of this rank's, with no other kernel than the
    cache's: a Llama takes ten times as long to compile."""

    def __init__(self, mine: slice | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24, bias=False) for _ in range(4))
        self.mine = mine
        if mine is not None:
            for linear in (self.q, self.k, self.v):
                linear.weight = nn.Parameter(linear.weight[mine].detach().clone())
            self.o.weight = nn.Parameter(self.o.weight[:, mine].detach().clone())

    def forward(self, x: Tensor, cache: DynamicCache) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, *cache.update(k, v, 0))
        y = self.o(y.transpose(1, 2).flatten(2))
        return y if self.mine is None else funcol.all_reduce(y, "sum", dist.group.WORLD)


@torch.no_grad()
def uneven() -> dict[str, Any]:
    """3 heads on 2 ranks, one sequence: what the prefill leaves in its cache lies as what a step
    leaves where it is one head, and not where it is two. Errors of each step against one process,
    and what was captured."""
    mine = slice(0, 8) if dist.get_rank() == 0 else slice(8, 24)
    part = ridgeline.parallelize(Attention(mine).eval(), split=False, **COMPILED)
    model, x = Attention().eval(), torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(1))
    caches, errors = [DynamicCache(), DynamicCache()], []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        got, expected = (
            m(x[:, start:end], cache) for m, cache in zip((part, model), caches, strict=True)
        )
        errors.append(error(got, expected))
    heads_here = caches[0].layers[0].keys.shape[1]
    return {"errors": errors, "captures": part.captures, "heads": heads_here}


@torch.no_grad()
def of_other_lengths() -> list[str]:
    """Rank 1 has one token less in its cache, which grows or is static; then as many."""
    model, x, said = build("llama", layers=2), ids(2, 7), []
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
