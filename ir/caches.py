"""Key/value caches of transformers as tensors: what goes into a program and what comes out.

A cache layer is a bag of tensors and plain attributes. A program takes the tensors as inputs; those
that the model replaces come back as outputs, those that it updates in place are updated in place.
Layers of sliding windows also count their tokens in a Python integer: a program takes it as the
size of an empty tensor [count, 0], a free dimension, and returns the new count.
A cache is a list of layers, or a pair of such lists (an encoder-decoder's own and cross attention).
A layer whose other plain attributes change during a step holds state that no graph can carry, and
is refused. transformers is never imported here: where no cache class has been
loaded, no argument is a cache.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ridgeline.ir.cache_layer import COUNTERS, CacheError, layout_of


def is_cache(value: Any) -> bool:
    """Is `value` a transformers cache?"""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _parts(cache: Any) -> list[Any]:
    """The caches that are lists of layers: the cache itself, or the two of an encoder-decoder."""
    if hasattr(cache, "cross_attention_cache"):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def layers(cache: Any) -> list[Any]:
    """Every layer, of each part in turn."""
    return [layer for part in _parts(cache) for layer in part.layers]


def _copy(cache: Any) -> Any:
    """A copy with lists of layers of its own, which hold the same layers."""
    new = copy.copy(cache)
    if hasattr(cache, "cross_attention_cache"):
        new.self_attention_cache = _copy(cache.self_attention_cache)
        new.cross_attention_cache = _copy(cache.cross_attention_cache)
        new.is_updated = dict(cache.is_updated)
    else:
        new.layers = list(cache.layers)
    return new


def taken_apart(cache: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    """(what a program specialises on, its `tensors`) of a cache: classes, plain attributes, which
    tensors exist; counts by which are equal, but for 0 and 1, which are no free sizes.

    Raises CacheError for a cache that is not simply layers of tensors and plain values.
    """
    signature: list[Any] = [type(cache), *getattr(cache, "is_updated", {}).items()]
    held: list[Tensor] = []
    counts: dict[int, int] = {}
    for part in _parts(cache):
        if not isinstance(getattr(part, "layers", None), list):
            raise CacheError(
                f"{type(part).__name__} is not a list of cache layers; use DynamicCache or"
                " StaticCache"
            )
        signature.append(type(part))
        for layer in part.layers:
            state, layout = vars(layer), layout_of(layer)
            held += layout.tensors(state)
            signature += (layout, *layout.plain(state))
            for name in layout.counters:
                count = state[name]
                free = count > 1
                signature.append((free, counts.setdefault(count, len(counts)) if free else count))
    return tuple(signature), held + [torch.empty(count, 0) for count in counts]


def tensors(cache: Any) -> list[Tensor]:
    """The cache's tensors, layer by layer, in the order in which the layer holds them; then an
    empty one [count, 0] for each different count of tokens."""
    return taken_apart(cache)[1]


def _counts(cache: Any) -> list[int]:
    """The different counts of the layers that are free sizes, in order."""
    found = {vars(layer)[n]: None for layer in layers(cache) for n in layout_of(layer).counters}
    return [count for count in found if count > 1]


def counts(cache: Any) -> int:
    """How many of `tensors`, the last, stand for counts."""
    return len(_counts(cache))


def with_tensors(cache: Any, values: Sequence[Tensor]) -> Any:
    """A copy of `cache` that holds `values` instead of its own `tensors`."""
    remaining = iter(values)
    new = _copy(cache)
    for part in _parts(new):
        part.layers = [_layer_with(layer, remaining) for layer in part.layers]
    sizes = {count: next(remaining).shape[0] for count in _counts(cache)}
    for layer in layers(new) if sizes else ():
        for name in layout_of(layer).counters:
            setattr(layer, name, sizes.get(vars(layer)[name], vars(layer)[name]))
    return new


def snapshot(cache: Any) -> Any:
    """A copy of `cache` with layers of its own, which hold the same tensors."""
    new = _copy(cache)
    for part in _parts(new):
        part.layers = list(map(copy.copy, part.layers))
    return new


def _layer_with(layer: Any, values: Iterator[Tensor]) -> Any:
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(new, name, next(values))
    return new


Place = tuple[int, int, str]
"""(part, layer, attribute) of a tensor in a cache."""


def tie_lengths(cache: Any) -> None:
    """While a cache is traced: the keys and values of a layer that agree in batch, heads and length
    do so for good. Nothing else may tell, as in cross attention, which only reads them."""
    for layer in layers(cache):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor):
            _ = keys.shape[:-1] == values.shape[:-1]  # asking makes it a guard


def replaced(before: Any | None, after: Any) -> list[tuple[Place, Tensor]]:
    """Where and what a step put in place of `before`'s tensors.

    before: the cache as it went in, None when the model made its own. Raises CacheError where a
    plain attribute changed otherwise than by first use.
    """
    changes = []
    for p, part in enumerate(_parts(after)):
        known = _parts(before)[p].layers if before is not None else []
        for i, layer in enumerate(part.layers):
            old = known[i] if i < len(known) else None
            if old is not None:
                _check_plain(i, old, layer)
            for name, value in vars(layer).items():
                carried = isinstance(value, Tensor | torch.SymInt)
                if carried and (old is None or getattr(old, name, None) is not value):
                    changes.append(((p, i, name), value))
    return changes


def _check_plain(index: int, old: Any, new: Any) -> None:
    """Plain attributes may only change as `lazy_initialization` changes them."""
    expected = old
    if not getattr(old, "is_initialized", True) and getattr(new, "is_initialized", False):
        expected = copy.copy(old)
        expected.lazy_initialization(new.keys, new.values)
    for name, value in vars(new).items():
        if isinstance(value, Tensor) or name in COUNTERS:
            continue
        if str(getattr(expected, name, None)) != str(value):
            raise CacheError(
                f"cache layer {index} ({type(new).__name__}) counts in the Python attribute"
                f" {name!r}, which a graph cannot carry; caches of full attention layers"
                " (DynamicLayer, StaticLayer) can be captured, those of sliding windows not yet"
            )


def install(cache: Any, template: Any, changes: Sequence[Place], values: Sequence[Tensor]) -> None:
    """Put the new tensors of a step into the caller's own cache object.

    template: the cache as the captured step left it, for layers that `cache` does not have yet.
    """
    parts, templates = _parts(cache), _parts(template)
    given = dict(zip(changes, values, strict=True))
    for (p, index, name), value in given.items():
        held = parts[p].layers
        while len(held) <= index:
            held.append(_fresh(templates[p].layers[len(held)]))
        layer = held[index]
        if not getattr(layer, "is_initialized", True):
            for other, tensor in given.items():  # initialisation may read any of them
                if other[:2] == (p, index):
                    setattr(layer, other[2], tensor)
            layer.lazy_initialization(given[p, index, "keys"], given[p, index, "values"])
        setattr(layer, name, value)
    for part, final in zip(parts, templates, strict=True):
        for layer, traced in zip(part.layers, final.layers, strict=False):
            for name in COUNTERS:  # those that the captured step knew as numbers
                if isinstance(count := vars(traced).get(name), int):
                    setattr(layer, name, count)
    if hasattr(cache, "is_updated"):
        cache.is_updated = dict(template.is_updated)


def _fresh(layer: Any) -> Any:
    """A copy of a traced layer without its traced tensors."""
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(new, name, None)
    new.is_initialized = False
    return new


def rebuilt(template: Any, changes: Sequence[Place], values: Sequence[Tensor]) -> Any:
    """A new cache like `template`, which the model made during the step, with real tensors."""
    new = _copy(template)
    for part in _parts(new):
        part.layers = []
    install(new, template, changes, values)
    return new


def is_filled(cache: Any) -> bool:
    """Does the cache hold tokens already? (A decode step has one token and a filled cache.)"""
    for layer in _parts(cache)[0].layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel() > 0:
            length = layer.get_seq_length()
            return bool(length > 0) if not isinstance(length, torch.SymInt) else True
    return False
