"""Groups that are not all ranks, and ranks that ask for other things at one turn."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ridgeline
from gloo.models import build, ids
from gloo.work import PLAIN, error
from ridgeline.passes.parallel.agree import Ranks


@torch.no_grad()
def of_a_mesh() -> dict[str, Any]:
    """Two groups of two ranks, each with a batch of its own, the second of another length."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = build("llama")
    part = ridgeline.parallelize(model, mesh["tensor"], **PLAIN)
    x = ids(2, 7 + mesh.get_local_rank("data"))
    got, expected = part(x, use_cache=False).logits, model(x, use_cache=False).logits
    try:
        ridgeline.parallelize(model, mesh, **PLAIN)
        said = ""
    except ridgeline.RidgelineError as failure:
        said = str(failure)
    return {"error": error(got, expected), "tokens": x.shape[1], "said": said}


def asks_for_another_thing() -> list[str]:
    """Rank 1 has measured something where rank 0 agrees on something; then both agree."""
    ranks, said = Ranks.of(None), []
    other = dist.get_rank() == 1
    for asks in (
        (lambda: ranks.largest([1.0])) if other else (lambda: ranks.agree("it", {})),
        lambda: ranks.agree("it", {"long": "1, " * 40 + str(dist.get_rank())}),
        lambda: ranks.agree("it", {"same": "1"}),
    ):
        try:
            said.append(str(asks()))
        except Exception as failure:
            said.append(f"{type(failure).__name__}: {failure}")
    return said


def unusable(arguments: dict[str, Any]) -> list[str]:
    """What rank 1's arguments come to on each rank; then that a call without them is right."""
    model, x, said = build("llama"), ids(2, 7), []
    mine = arguments if dist.get_rank() == 1 else {}
    for options in (mine, {}):
        try:
            part = ridgeline.parallelize(model, **(PLAIN | options))
            with torch.no_grad():
                got, expected = part(x, use_cache=False).logits, model(x, use_cache=False).logits
            said.append("right" if error(got, expected) <= 1e-5 else "wrong")
        except Exception as failure:
            said.append(f"{type(failure).__name__}: {failure}")
    return said


@torch.no_grad()
def alone() -> dict[str, Any]:
    """A model on one rank."""
    model, x = build("llama"), ids(2, 7)
    part = ridgeline.parallelize(model, **PLAIN)
    got, expected = part(x, use_cache=False).logits, model(x, use_cache=False).logits
    return {"error": error(got, expected), "notes": part.plan.notes}


def saved() -> list[str]:
    """What a part says when it is split once more, and when it is saved."""
    part, said = ridgeline.parallelize(build("llama"), **PLAIN), []
    for attempt in (ridgeline.parallelize, lambda part: part.save_pretrained("nowhere")):
        try:
            said.append(str(attempt(part)))
        except Exception as failure:
            said.append(f"{type(failure).__name__}: {failure}")
    return said
