"""What ranks do in the tests; each function returns plain data."""

import dataclasses
import os
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import ridgeline
from gloo.models import LAYERS, build, ids

PLAIN: dict[str, Any] = {
    "target": "a100",
    "passes": (),
    "lowering": "eager",
    "fuse": "always",
    "weave": "never",
}
"""Nothing but the collectives is rewritten, and what is left runs op by op."""


class Sent(TorchDispatchMode):
    """Counts the collectives that are called, and how many are at most under way at once; order:
    of sends, s, and waits, w."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.waited = self.under_way = 0
        self.order = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            self.count[func._opname] += 1
            self.order += "s"
            self.under_way = max(self.under_way, self.count.total() - self.waited)
        elif func.namespace == "_c10d_functional":
            self.waited += 1
            self.order += "w"
        return func(*args, **(kwargs or {}))


def error(got: Tensor, expected: Tensor) -> float:
    """The relative Frobenius error."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def outputs(
    family: str, dtype: str, batch: int, length: int, hidden: bool, layers: int = LAYERS
) -> dict[str, Any]:
    """Errors against one process of logits and, where `hidden`, residuals; both sides' errors
    against fp64 (exact); what a call sends."""
    model = build(family, getattr(torch, dtype), layers)
    before = [p.clone() for p in model.parameters()]
    x, options = ids(batch, length), {"output_hidden_states": hidden, "use_cache": False}
    with torch.no_grad():
        expected = model(x, **options)
        exact = build(family, getattr(torch, dtype), layers).double()(x).logits
        part = ridgeline.parallelize(model, **PLAIN)
        part.capture(x, **options)
        with Sent() as sent:
            got = part(x, **options)
    pairs = zip(got.hidden_states or (), expected.hidden_states or (), strict=True)
    bytes_of = {id(p): p.nbytes for p in part.parameters()}
    return {
        "logits": error(got.logits, expected.logits),
        "exact": [error(y.logits, exact) for y in (got, expected)],
        "residuals": [error(a, b) for a, b in pairs],
        "sent": dict(sent.count),
        "applied": [d.rewrite for d in part.plan.applied],
        "refused": [d.reason for d in part.plan.refused],
        "notes": part.plan.notes,
        "bytes": sum(bytes_of.values()),
        "unchanged": all(map(torch.equal, before, model.parameters())),
    }


def generated(family: str) -> dict[str, Any]:
    """Tokens of a greedy generation, on the ranks and in one process."""
    model, x = build(family, layers=2), ids(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    part = ridgeline.parallelize(model, **PLAIN)
    return {
        "got": part.generate(x, **options).tolist(),
        "expected": model.generate(x, **options).tolist(),
        "refused": [(d.phase, d.reason) for d in part.plan.refused],
        "fallbacks": part.fallbacks,
    }


def other_model(odd: int) -> None:
    """Rank `odd` has another checkpoint."""
    model = build("llama")
    if dist.get_rank() == odd:
        with torch.no_grad():
            model.model.norm.weight[3] += 1
    ridgeline.parallelize(model, **PLAIN)


def other_setting(odd: int) -> None:
    """Rank `odd` has the others' weights, and norms with another epsilon."""
    model = build("llama")
    if dist.get_rank() == odd:
        model.config.rms_norm_eps = 0.5
    ridgeline.parallelize(model, **PLAIN)


def other_version(odd: int) -> None:
    """Rank `odd` runs another torch."""
    if dist.get_rank() == odd:
        torch.__version__ = "2.0.0"
    ridgeline.parallelize(build("llama"), **PLAIN)


def other_batch(odd: int) -> None:
    """Rank `odd` is called with one sequence, the others with two."""
    part = ridgeline.parallelize(build("llama"), **PLAIN)
    with torch.no_grad():
        part(ids(1 if dist.get_rank() == odd else 2, 7), use_cache=False)


def fails(odd: int) -> None:
    """Rank `odd` cannot split its model."""
    model: Any = torch.nn.Linear(3, 3) if dist.get_rank() == odd else build("llama")
    ridgeline.parallelize(model, **PLAIN)


def goes_on_after_failures() -> list[str]:
    """All ranks fail, then rank 1 alone, then none: what each attempt says."""
    said = []
    for failing in ((0, 1), (1,), ()):
        model: Any = torch.nn.Linear(3, 3) if dist.get_rank() in failing else build("llama")
        try:
            part = ridgeline.parallelize(model, **PLAIN)
            with torch.no_grad():
                got, expected = part(ids(2, 7)).logits, model(ids(2, 7)).logits
            said.append("right" if error(got, expected) <= 1e-5 else "wrong")
        except Exception as failure:
            said.append(type(failure).__name__)
    return said


def fails_when_run(odd: int) -> None:
    """Rank `odd` cannot run a form that all ranks time, and lives."""
    model, x = build("llama"), ids(2, 7)
    part = ridgeline.parallelize(model, **(PLAIN | {"fuse": "measured"}))
    compiler = part._ridgeline.compile_program
    form = compiler._form

    def broken(*inputs: Tensor) -> None:
        raise ValueError("no memory for it")

    if dist.get_rank() == odd:
        compiler._form = lambda *a, **k: dataclasses.replace(form(*a, **k), run=broken)
    store = dist.distributed_c10d._get_default_store()
    with torch.no_grad():
        try:
            part(x, use_cache=False)
        finally:
            if dist.get_rank() == odd:
                store.wait(["told"], timedelta(seconds=60))
            store.set("told", b"")


def ends_before(odd: int) -> None:
    """Rank `odd` ends before the ranks have agreed."""
    dist.barrier()  # all have connected
    if dist.get_rank() == odd:
        os._exit(1)
    ridgeline.parallelize(build("llama"), **PLAIN)


def ends_between(odd: int) -> None:
    """Rank `odd` ends when all graphs are compiled, and the others go on."""
    model, x = build("llama"), ids(2, 7)
    part = ridgeline.parallelize(model, **PLAIN)
    with torch.no_grad():
        part(x, use_cache=False)
        if dist.get_rank() == odd:
            os._exit(1)
        part(x, use_cache=False)


def stays_away(odd: int) -> None:
    """Rank `odd` makes one call less than the others, and lives."""
    model, x = build("llama"), ids(2, 7)
    part = ridgeline.parallelize(model, **PLAIN)
    with torch.no_grad():
        part(x, use_cache=False)
        if dist.get_rank() != odd:
            part(x, use_cache=False)


def woven(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case woven, against one process."""
    return [_woven(**case) for case in cases]


def _woven(
    family: str,
    batch: int,
    lengths: list[int],
    fuse: str = "always",
    padding: int = 0,
    static: int = 0,
    layers: int = LAYERS,
) -> dict[str, Any]:
    """Calls with so many tokens of each sequence, which go on from the cache of the one before.
    padding: on the left of each sequence, one more from each to the next. static: slots of a cache
    of fixed length."""
    model, x = build(family, layers=layers), ids(batch, sum(lengths))
    mask = torch.ones_like(x)
    for row in range(batch if padding else 0):
        mask[row, : padding + row] = 0
    errors, at = [], 0
    with torch.no_grad():
        part = ridgeline.parallelize(model, **(PLAIN | {"fuse": fuse, "weave": "always"}))
        caches: list[Any] = [None, None]
        if static:
            caches = [StaticCache(config=m.config, max_cache_len=static) for m in (part, model)]
        for length in lengths:
            rows, at = x[:, at : at + length], at + length
            options = {"attention_mask": mask[:, :at]} if padding else {}
            got, expected = (
                m(rows, use_cache=True, past_key_values=cache, **options)
                for m, cache in zip((part, model), caches, strict=True)
            )
            caches = [got.past_key_values, expected.past_key_values]
            errors.append(error(got.logits, expected.logits))
        first = x[:, : lengths[0]]
        options = {"attention_mask": mask[:, : lengths[0]]} if padding else {}
        cache = StaticCache(config=part.config, max_cache_len=static) if static else None
        with Sent() as sent:
            part(first, use_cache=True, past_key_values=cache, **options)
    return {
        "errors": errors,
        "under way": sent.under_way,
        "sent": dict(sent.count),
        "woven": [d.variant for d in part.plan.applied if d.rewrite == "token_weave"],
        "refused": [d.reason for d in part.plan.refused if d.rewrite == "token_weave"],
    }


def woven_generation() -> dict[str, Any]:
    """A greedy generation with a static cache, whose prefills write to it part by part."""
    model, x = build("llama", layers=2), ids(1, 9)
    part = ridgeline.parallelize(model, **(PLAIN | {"weave": "always"}))
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    return {
        "got": [part.generate(x, **options).tolist() for _ in range(2)],
        "expected": model.generate(x, **options).tolist(),
        "woven": [d.variant for d in part.plan.applied if d.rewrite == "token_weave"],
        "refused": [d.reason for d in part.plan.refused if d.rewrite == "token_weave"],
    }


def compiled(family: str, length: int) -> dict[str, Any]:
    """What Inductor sends, and waits for, in order; errors at this length and at another. Of one
    layer it would move nothing."""
    model = build(family, layers=2)
    options = {"passes": (), "lowering": "inductor", "fuse": "never", "weave": "always"}
    part = ridgeline.parallelize(model, **options)
    errors = []
    with torch.no_grad():
        for tokens in (length, length + 3):
            x = ids(1, tokens)
            with Sent() as sent:
                got = part(x, use_cache=False).logits
            errors.append(error(got, model(x).logits))
    return {"errors": errors, "order": sent.order, "captures": part.captures}


def measured() -> dict[str, Any]:
    """What is left of both rewrites where they must be quicker to stay."""
    model, x = build("llama"), ids(6, 7)
    with torch.no_grad():
        part = ridgeline.parallelize(model, **(PLAIN | {"fuse": "measured", "weave": "measured"}))
        got, expected = part(x, use_cache=False).logits, model(x).logits
    names = ("allreduce_rms_norm", "token_weave")
    return {
        "error": error(got, expected),
        "decided": {
            name: [
                d.refused_by for d in (*part.plan.applied, *part.plan.refused) if d.rewrite == name
            ]
            for name in names
        },
        "notes": part.plan.notes,
    }


def predicted_for(target: str) -> dict[str, Any]:
    """What the plan says of a target that is not here, and the error of what runs."""
    model, x = build("gqa"), ids(2, 7)
    with torch.no_grad():
        options = {**PLAIN, "target": target, "fuse": None}
        part = ridgeline.parallelize(model, **options)
        got, expected = part(x, use_cache=False).logits, model(x, use_cache=False).logits
    return {
        "notes": part.plan.notes,
        "applied": [d.rewrite for d in part.plan.applied],
        "kernels": [f"{k.op} {k.configuration}" for k in part.plan.kernels],
        "logits": error(got, expected),
    }
