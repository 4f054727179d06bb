"""`parallelize`: this rank's part of a model, compiled, on a group of ranks that agree."""

from datetime import timedelta
from typing import Any

from torch import nn

from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.plan import plan_parallel
from ridgeline.passes.parallel.shard import shard


def rank_model(model: nn.Module, mesh: Any, timeout: timedelta | None = None) -> nn.Module:
    ranks = Ranks.of(mesh, timeout)
    with ranks.together():
        plan = plan_parallel(model, ranks.world)
        ranks.agree("the model", {"plan": plan.digest()})
        return shard(model, plan, ranks.rank, ranks.name)
