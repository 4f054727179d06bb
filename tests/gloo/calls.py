"""Calls that one rank makes in another way, or cannot make; then all go on in the same group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ridgeline
from gloo.forms import WIDTH, by_hand
from gloo.models import build, ids
from gloo.work import PLAIN, error


class Broken(Exception):
    """What a model's own code raises."""


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise Broken("no rows of this table")


def out_of_step() -> dict[str, str]:
    """What each attempt says, by its name; "right" where the outputs are."""
    model = build("llama")
    part = ridgeline.parallelize(model, **PLAIN)
    odd = dist.get_rank() == 1
    said: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Tensor], expected: Tensor) -> None:
        try:
            said[name] = "right" if error(call(), expected) <= 1e-5 else "wrong"
        except Exception as failure:
            said[name] = f"{type(failure).__name__}: {failure}"

    def called(x: Tensor, **options: Any) -> Tensor:
        return part(x, use_cache=False, **options).logits

    def broken(x: Tensor) -> Tensor:
        """Rank 1's code raises where it is traced."""
        embed = part._ridgeline.original.get_submodule("model.embed_tokens")
        if odd:
            embed.forward = _broken
        try:
            return called(x)
        finally:
            embed.__dict__.pop("forward", None)

    with torch.no_grad():
        x, other = ids(2, 7), ids(2, 9)
        expected, longer = model(x).logits, model(other).logits
        attempt("fails while traced", lambda: broken(x), expected)
        attempt("after it", lambda: called(x), expected)
        captures = part.captures
        attempt("another length", lambda: called(ids(2, 8) if odd else x), expected)
        attempt("other ids", lambda: called(x.flip(1) if odd else x), expected)
        attempt("another kind of call", lambda: part(x, use_cache=odd).logits, expected)
        if odd:
            part.refresh()
        attempt("captures again, and fails", lambda: broken(x), expected)
        part.refresh()
        attempt("an argument of no use", lambda: called(x, **({"y": object()} if odd else {})), x)
        attempt("at last", lambda: called(other), longer)
        said["captures"] = f"{captures} {part.captures}"
        mine = ridgeline.parallelize(by_hand("functional"), split=False, **PLAIN)
        rows = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
        whole = mine(rows)
        attempt("other activations", lambda: mine(rows + odd), whole)
        mine.train()
        with torch.enable_grad():
            attempt("gradients", lambda: mine(rows), whole)
        mine.eval()
        attempt("the same", lambda: mine(rows * (1 + 1e-6 * odd)), whole)
    return said
