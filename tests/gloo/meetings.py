"""Calls before which ranks have something else to say, and what each attempt comes to."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ridgeline
from gloo.forms import WIDTH, by_hand
from gloo.models import build, ids
from gloo.work import PLAIN, error
from ridgeline.passes.parallel.agree import Ranks

OPTIONS: dict[str, Any] = PLAIN | {"split": False, "fuse": "never"}
LOWEST = torch.finfo(torch.float32).min


class Scaled(nn.Module):
    """A network whose input is scaled, and stands beside a mask that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = by_hand("functional")

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        return self.inner(x * scale) + (0 if mask is None else 0 * mask.clamp(-1, 1).sum())


def rows() -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def causal(fill: float) -> Tensor:
    return torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), fill)


def attempted(call: Callable[[], Tensor], expected: Tensor) -> str:
    try:
        return "right" if error(call(), expected) <= 1e-5 else "wrong"
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


@torch.no_grad()
def apart() -> dict[str, Any]:
    """What each attempt says, by its name; keys: of the store, that were left by calls alike, and
    by those that differ."""
    odd, x = dist.get_rank() == 1, rows()
    store = dist.distributed_c10d._get_default_store()
    parts = [ridgeline.parallelize(Scaled().eval(), **OPTIONS) for _ in range(2)]
    model, expected = Scaled().eval(), Scaled().eval()(x)
    said: dict[str, Any] = {"first": attempted(lambda: parts[0](x), expected)}
    said["first of the other"] = attempted(lambda: parts[1](x), expected)
    said["two models"] = attempted(lambda: parts[odd](x), expected)
    part = parts[0]
    said["a scale, to capture"] = attempted(lambda: part(x, scale=1.5 + odd), x)
    said["both scale"] = attempted(lambda: part(x, scale=2.0), model(x, scale=2.0))
    said["a scale"] = attempted(lambda: part(x, scale=1.0 + odd), x)
    for name, value in (("NaN", torch.nan), ("inf", torch.inf)):
        y = x.clone()
        y[0, 0, 0] = value if odd else 0.0
        said[name] = attempted(lambda y=y: part(y), x)
    for fill in (-torch.inf, LOWEST, -1e9):
        mask = causal(fill)
        said[f"{fill:.0e}, alike"] = attempted(lambda mask=mask: part(x, mask=mask), expected)
        said[f"{fill:.0e}, other activations"] = attempted(
            lambda mask=mask: part(x + odd, mask=mask), x
        )
        other = mask.clone()
        other[0, 0, 0, 1] = 0.0 if odd else fill
        said[f"{fill:.0e}, another mask"] = attempted(lambda other=other: part(x, mask=other), x)
    mask, keys = causal(-torch.inf), []
    for different in (0, 1):
        before = _count(store)
        for _ in range(5):
            attempted(lambda: part(x + odd * different, mask=mask), x)  # noqa: B023
        keys.append(_count(store) - before)
    return said | {"keys": keys}


def _count(store: Any) -> int:
    dist.barrier()
    count = store.num_keys()
    dist.barrier()
    return count


@torch.no_grad()
def fails_after_the_last_collective() -> list[str]:
    """Rank 1 alone fails when its call is done, twice; then all go on with a new kind of call."""
    model, x = build("llama"), ids(2, 7)
    part = ridgeline.parallelize(model, **PLAIN)
    expected, said = model(x).logits, []

    def call(**options: Any) -> Tensor:
        return part(x, use_cache=False, **options).logits

    said.append(attempted(call, expected))
    state = part._ridgeline
    ((number, (key, captured, run)),) = state.graphs.items()

    def broken(*flat: Tensor) -> None:
        run(*flat)
        raise torch.OutOfMemoryError("no memory for logits")

    if dist.get_rank() == 1:
        state.graphs[number] = (key, captured, state.compile_program._told(broken))
    said.append(attempted(call, expected))
    state.graphs[number] = (key, captured, run)
    said.append(attempted(lambda: part(x, use_cache=True).logits, expected))
    said.append(attempted(lambda: part(x, use_cache=True).logits, expected))
    said.append(attempted(call, expected))
    return said


@torch.no_grad()
def late() -> list[str]:
    """Rank 1 comes while rank 0, which has waited for a second, asks whether anybody has failed."""
    part, x = ridgeline.parallelize(Scaled().eval(), **OPTIONS), rows()
    expected, listen = Scaled().eval()(x), Ranks.refuse_failed
    said = [attempted(lambda: part(x), expected)]
    store = dist.distributed_c10d._get_default_store()

    def listened(ranks: Ranks) -> None:
        listen(ranks)
        if dist.get_rank() == 0:
            store.set("asks", b"")
            store.wait(["comes"])
            time.sleep(0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "refuse_failed", listened)
        if dist.get_rank() == 1:
            store.wait(["asks"])
            store.set("comes", b"")
        said.append(attempted(lambda: part(x), expected))
    return said


@torch.no_grad()
def with_another_default_device() -> list[str]:
    part, x = ridgeline.parallelize(Scaled().eval(), **OPTIONS), rows()
    expected, long = Scaled().eval()(x), torch.ones(2, 6, 600)
    said = []
    for mask in (None, long):
        part.capture(x, mask=mask)
        with torch.device("meta"):
            said.append(attempted(lambda mask=mask: part(x, mask=mask), expected))
    return said


def in_threads() -> list[str]:
    """Four threads of each rank call at once."""
    model, x = build("llama"), ids(2, 7)
    part, said = ridgeline.parallelize(model, **PLAIN), []
    with torch.no_grad():
        expected = model(x).logits

    def call() -> None:
        with torch.no_grad():
            for _ in range(3):
                said.append(attempted(lambda: part(x, use_cache=False).logits, expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said
