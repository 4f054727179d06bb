"""Key/value caches of transformers as tensors: what goes into a program and what comes out.

A cache layer is a bag of tensors and plain attributes. A program takes the tensors as inputs; those
that the model replaces come back as outputs, those that it updates in place are updated in place.
A layer whose *plain* attributes change during a step (a Python counter, say) holds state that no
graph can carry, and is refused. transformers is never imported here: where no cache class has been
loaded, no argument is a cache.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError


class CacheError(RidgelineError):
    """A cache whose state cannot be carried by a graph."""


def is_cache(value: Any) -> bool:
    """Is `value` a transformers cache?"""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def check(cache: Any) -> None:
    """Raise CacheError for a cache that is not simply a list of layers."""
    if not isinstance(getattr(cache, "layers", None), list):
        raise CacheError(
            f"{type(cache).__name__} is not a list of cache layers; use DynamicCache or StaticCache"
        )


def tensors(cache: Any) -> list[Tensor]:
    """The cache's tensors, layer by layer, in the order in which the layer holds them."""
    return [v for layer in cache.layers for v in vars(layer).values() if isinstance(v, Tensor)]


def signature(cache: Any) -> tuple[Any, ...]:
    """What a program specialises on: classes, plain attributes, which tensors exist."""
    return (type(cache).__name__, *(_layer_signature(layer) for layer in cache.layers))


def _layer_signature(layer: Any) -> tuple[Any, ...]:
    state = vars(layer)
    plain = [Tensor if isinstance(v, Tensor) else v for v in state.values()]
    try:
        hash(key := (type(layer).__name__, *state, *plain))
    except TypeError:  # some attribute is a list or the like
        return (type(layer).__name__, *state, *map(str, plain))
    return key


def with_tensors(cache: Any, values: Sequence[Tensor]) -> Any:
    """A copy of `cache` that holds `values` instead of its own tensors."""
    remaining = iter(values)
    new = copy.copy(cache)
    new.layers = []
    for layer in cache.layers:
        copied = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(copied, name, next(remaining))
        new.layers.append(copied)
    return new


def replaced(before: Any | None, after: Any) -> list[tuple[int, str, Tensor]]:
    """(layer, attribute, tensor) of what a step put in place of `before`'s tensors.

    before: the cache as it went in, None when the model made its own. Raises CacheError where a
    plain attribute changed otherwise than by first use.
    """
    changes = []
    for i, layer in enumerate(after.layers):
        old = before.layers[i] if before is not None and i < len(before.layers) else None
        if old is not None:
            _check_plain(i, old, layer)
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and (old is None or getattr(old, name, None) is not value):
                changes.append((i, name, value))
    return changes


def _check_plain(index: int, old: Any, new: Any) -> None:
    """Plain attributes may only change as `lazy_initialization` changes them."""
    expected = old
    if not getattr(old, "is_initialized", True) and getattr(new, "is_initialized", False):
        expected = copy.copy(old)
        expected.lazy_initialization(new.keys, new.values)
    for name, value in vars(new).items():
        if isinstance(value, Tensor):
            continue
        if str(getattr(expected, name, None)) != str(value):
            raise CacheError(
                f"cache layer {index} ({type(new).__name__}) counts in the Python attribute"
                f" {name!r}, which a graph cannot carry; use DynamicCache or StaticCache with"
                " full attention layers"
            )


def install(
    cache: Any, template: Any, changes: Sequence[tuple[int, str]], values: Sequence[Tensor]
) -> None:
    """Put the new tensors of a step into the caller's own cache object.

    template: the cache as the captured step left it, for layers that `cache` does not have yet.
    """
    for (index, name), value in zip(changes, values, strict=True):
        while len(cache.layers) <= index:
            cache.layers.append(_fresh(template.layers[len(cache.layers)]))
        layer = cache.layers[index]
        if not getattr(layer, "is_initialized", True):
            keys, these = _keys_and_values(index, changes, values)
            layer.lazy_initialization(keys, these)
        setattr(layer, name, value)


def _keys_and_values(
    index: int, changes: Sequence[tuple[int, str]], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    of_layer = {n: v for (i, n), v in zip(changes, values, strict=True) if i == index}
    return of_layer["keys"], of_layer["values"]


def _fresh(layer: Any) -> Any:
    """A copy of a traced layer without its traced tensors."""
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(new, name, None)
    new.is_initialized = False
    return new


def rebuilt(template: Any, changes: Sequence[tuple[int, str]], values: Sequence[Tensor]) -> Any:
    """A new cache like `template`, which the model made during the step, with real tensors."""
    new = copy.copy(template)
    new.layers = []
    install(new, template, changes, values)
    return new


def is_filled(cache: Any) -> bool:
    """Does the cache hold tokens already? (A decode step has one token and a filled cache.)"""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel() > 0:
            length = layer.get_seq_length()
            return bool(length > 0) if not isinstance(length, torch.SymInt) else True
    return False
