"""The arguments of one call of a model, taken apart: tensors, caches, and everything else."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ridgeline.ir import caches
from ridgeline.ir.capture_errors import CaptureError


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call: tensors in a flat list, everything else in a signature.

    leaves: the arguments' leaves, caches whole. flat: tensors, a cache's own in its place.
    key: structure, dtypes, devices, which sizes are 0, 1 or more, plain values, and which tensors
    are one and the same.
    """

    leaves: list[Any]
    spec: TreeSpec
    flat: list[Tensor]
    key: tuple[Any, ...]

    def rebuild(self, flat: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """(args, kwargs, caches) with `flat` in place of this call's tensors."""
        remaining = iter(flat)
        leaves, made = [], []
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                leaf = next(remaining)
            elif caches.is_cache(leaf):
                leaf = caches.with_tensors(leaf, [next(remaining) for _ in caches.tensors(leaf)])
                made.append(leaf)
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs, made

    def trains(self, model: nn.Module) -> bool:
        """Must gradients flow through this call of `model`?"""
        return torch.is_grad_enabled() and (
            model.training or any(x.requires_grad for x in self.flat)
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What stays the same when a cache that counts in Python goes on counting."""
        layers = [type(layer).__name__ for cache in self.caches for layer in caches.layers(cache)]
        return (repr(self.spec), *layers)

    @property
    def caches(self) -> list[Any]:
        """The caches among the arguments."""
        return [leaf for leaf in self.leaves if caches.is_cache(leaf)]


# What repr tells apart completely; any other object could change without its signature changing.
PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


def flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """Take a call's arguments apart. Raises CacheError for caches that no graph can carry."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)), is_leaf=caches.is_cache)
    flat: list[Tensor] = []
    key: list[Any] = [repr(spec)]  # {"x": t} is not {"y": t}, nor is (t,) [t]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat.append(leaf)
            key.append(_tensor_key(leaf))
        elif caches.is_cache(leaf):
            signature, inside = caches.taken_apart(leaf)
            flat += inside
            key += (signature, *map(_tensor_key, inside))
        else:
            if not isinstance(leaf, PLAIN):
                raise CaptureError(
                    f"an argument is a {type(leaf).__name__}, whose value no signature can hold;"
                    " pass tensors, numbers, strings, caches, and containers of them"
                )
            key.append((type(leaf).__name__, repr(leaf)))
    addresses = list(map(id, flat))
    if len(set(addresses)) < len(addresses):  # export takes them for one input
        key.append(tuple(map(addresses.index, addresses)))
    return Call(leaves, spec, flat, tuple(key))


def _tensor_key(x: Tensor) -> tuple[Any, ...]:
    return (x.dtype, x.device, x.requires_grad, _size_classes(x.shape))


@functools.lru_cache(maxsize=4096)
def _size_classes(shape: torch.Size) -> tuple[int, ...]:
    """0, 1 or 2 (more) for each size: what a captured graph may specialise on."""
    return tuple(min(s, 2) for s in shape)
