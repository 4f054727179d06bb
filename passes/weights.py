"""Quantised and stacked weights, made once and shared by every graph of one `optimize`."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import constant
from ridgeline.passes.quantization import Codec, QuantizedWeight, quantize, round_to_nearest

_VERSION = operator.attrgetter("_version")


class WeightStore:
    """Weights by name and codec.

    hessians: weight name -> H [K,K] = 2/n Σ x xᵀ from calibration data; with it GPTQ is used,
    without it a calibration-free search.
    """

    def __init__(self, hessians: dict[str, Tensor] | None = None) -> None:
        self.hessians = hessians or {}
        self._sources: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._rounded: dict[tuple[str, Codec], QuantizedWeight] = {}
        self._refined: dict[tuple[str, Codec], QuantizedWeight] = {}
        self._stacked: dict[tuple[tuple[str, ...], Codec], QuantizedWeight] = {}
        self._held: dict[str, Tensor] = {}
        self._known: dict[Any, float] = {}

    def memo(self, key: Any, compute: Callable[[], float]) -> float:
        """What was computed for `key` before, else now."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def parameter(self, node: fx.Node, transposed: bool) -> Tensor:
        """The tensor [N,K] that a get_attr node stands for."""
        weight = constant(node).detach()
        return weight.T if transposed else weight

    def stale(self) -> bool:
        """Has a weight been changed in place since it was folded?"""
        return list(map(_VERSION, self._sources.values())) != self._versions

    def rounded(self, name: str, weight: Tensor, codec: Codec) -> QuantizedWeight:
        """Round to nearest: what the chooser weighs."""
        key = (name, codec)
        if key not in self._rounded:
            self._rounded[key] = round_to_nearest(weight, codec)
        return self._rounded[key]

    def refined(self, name: str, weight: Tensor, codec: Codec) -> QuantizedWeight:
        """The best that can be had: lossless as it is, GPTQ with data, a search without."""
        key = (name, codec)
        if key not in self._refined:
            self._watch(name, weight)
            rounded = self.rounded(name, weight, codec)
            lossless = torch.equal(rounded.dequantize(), weight.float())
            self._refined[key] = (
                rounded if lossless else quantize(weight, codec, self.hessians.get(name))
            )
        return self._refined[key]

    def held(self, key: str, sources: dict[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What was made of the weights `sources` for `key` before, else now."""
        if key not in self._held:
            for name, weight in sources.items():
                self._watch(name, weight)
            self._held[key] = compute()
        return self._held[key]

    def _watch(self, name: str, weight: Tensor) -> None:
        # inference tensors cannot be changed, nor count changes
        if not weight.is_inference() and name not in self._sources:
            self._sources[name] = weight
            self._versions.append(weight._version)

    def stacked(self, names: tuple[str, ...], codec: Codec) -> QuantizedWeight:
        """The refined weights, one upon the other, in memory once: each becomes a view of it."""
        parts = [self._refined[name, codec] for name in names]
        if len(parts) == 1:
            return parts[0]
        if (names, codec) not in self._stacked:
            dtype = max((p.scale.dtype for p in parts), key=lambda d: d.itemsize)
            whole = QuantizedWeight(
                torch.cat([p.packed for p in parts]),
                torch.cat([p.scale.to(dtype) for p in parts]),
                _stacked_offsets(parts, dtype),
                codec.bits,
                codec.group_size,
                parts[0].in_features,
            )
            self._stacked[names, codec] = whole
            start = 0
            for name, part in zip(names, parts, strict=True):
                rows = slice(start, start := start + len(part.packed))
                offset = None if whole.offset is None else whole.offset[rows]
                self._refined[name, codec] = dataclasses.replace(
                    part, packed=whole.packed[rows], scale=whole.scale[rows], offset=offset
                )
        return self._stacked[names, codec]


def _stacked_offsets(parts: list[QuantizedWeight], dtype: torch.dtype) -> Tensor | None:
    offsets = [p.offset for p in parts if p.offset is not None]
    if not offsets:
        return None
    return torch.cat([o.to(dtype) if o.is_floating_point() else o for o in offsets])
