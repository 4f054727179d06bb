"""Quantised and stacked weights, made once and shared by every graph of one `optimize`."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import constant
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.quantization import (
    Codec,
    QuantizationError,
    QuantizedWeight,
    descend,
    quantize,
    round_to_nearest,
)
from ridgeline.passes.quantization.descent import Factors, factors_of

SKETCHED_ROWS = 64
"""Rows that are encoded to learn what a codec costs, where encoding takes an optimisation."""

_VERSION = operator.attrgetter("_version")


class WeightStore:
    """Weights by name and codec.

    hessians: weight name -> H [K,K] = 2/n Σ x xᵀ from calibration data, against which codes are
    found; without it, by a calibration-free search.
    """

    def __init__(self, hessians: Mapping[str, Tensor] | None = None) -> None:
        self.hessians = hessians or {}
        self._sources: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._sketched: dict[tuple[str, Codec], tuple[Tensor, QuantizedWeight]] = {}
        self._refined: dict[tuple[str, Codec], QuantizedWeight] = {}
        self._stacked: dict[tuple[tuple[str, ...], Codec], QuantizedWeight] = {}
        self._held: dict[str, Tensor] = {}
        # Of the last Hessian only: codecs, and layers of one input, come one after the other.
        self._factors: tuple[Tensor, Factors] | None = None
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

    def values(self, weight: Tensor) -> Tensor:
        """The numbers of a weight by which its error is told."""
        return weight

    def broken(self, weight: Tensor) -> int:
        """How many of its numbers are infinite or NaN."""
        return int((~torch.isfinite(weight)).sum())

    def stale(self) -> bool:
        """Has a weight been changed in place since it was folded?"""
        return list(map(_VERSION, self._sources.values())) != self._versions

    def sketch(self, name: str, weight: Tensor, codec: Codec) -> tuple[Tensor, QuantizedWeight]:
        """What the chooser weighs: rows of `weight`, and how `codec` holds them.

        Uniform codes: all rows, rounded to nearest. Others, whose codes are found by an
        optimisation: its first step, which is nearly all of it, for up to `SKETCHED_ROWS` rows
        spread over the weight.
        """
        key = (name, codec)
        if key not in self._sketched:
            if codec.codec == "uniform":
                part, coded = weight, round_to_nearest(weight, codec)
            else:
                part = weight
                if codec.group_rows == 1:
                    part = weight[:: -(-len(weight) // SKETCHED_ROWS)]
                coded = self._encoded(name, part, codec, rounds=0)
            self._sketched[key] = part, coded
        return self._sketched[key]

    def refined(self, name: str, weight: Tensor, codec: Codec) -> QuantizedWeight:
        """The best that can be had: lossless as it is, else against data, or by a search."""
        key = (name, codec)
        if key not in self._refined:
            self._watch(name, weight)
            if codec.codec == "uniform" and _lossless(self.sketch(name, weight, codec)[1], weight):
                self._refined[key] = self.sketch(name, weight, codec)[1]
            elif codec.codec == "uniform":
                self._refined[key] = quantize(weight, codec, self.hessians.get(name))
            else:
                self._refined[key] = self._encoded(name, weight, codec)
        return self._refined[key]

    def _encoded(self, name: str, weight: Tensor, codec: Codec, **options: Any) -> QuantizedWeight:
        """`weight` in a codec that is fitted to the layer's inputs."""
        hessian = self.hessians.get(name)
        if hessian is None:
            return quantize(weight, codec)  # which says what it needs
        if self._factors is None or self._factors[0] is not hessian:
            self._factors = hessian, factors_of(hessian)
        return descend(weight, codec, hessian, factors=self._factors[1], **options)

    def held(self, key: str, sources: dict[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What was made of the weights `sources` for `key` before, else now."""
        if key not in self._held:
            for name, weight in sources.items():
                self._watch(name, weight)
            self._held[key] = compute()
        return self._held[key]

    def watch_coded(self, graph: fx.Graph) -> None:
        """Watch the operands of layers that are held as codes: kernels lay them out once."""
        for node in graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload):
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    self._watch(str(operand.target), constant(operand))

    def _watch(self, name: str, weight: Tensor) -> None:
        # inference tensors cannot be changed, nor count changes
        if not weight.is_inference() and name not in self._sources:
            self._sources[name] = weight
            self._versions.append(weight._version)

    def stacked(self, names: tuple[str, ...], codec: Codec) -> QuantizedWeight:
        """The refined weights, one upon the other, in memory once: each becomes a view of it."""
        self._factors = None
        parts = [self._refined[name, codec] for name in names]
        if len(parts) == 1:
            return parts[0]
        if (names, codec) not in self._stacked:
            whole = _stack(parts)
            self._stacked[names, codec] = whole
            start = 0
            for name, part in zip(names, parts, strict=True):
                stop = start + len(part.packed)
                self._refined[name, codec] = whole.rows(start, stop)
                start = stop
        return self._stacked[names, codec]


def _lossless(coded: QuantizedWeight, weight: Tensor) -> bool:
    return torch.equal(coded.dequantize(), weight.float())


def _stack(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """One upon the other; their permutation is one, being that of their input."""
    widest = max((p.scale.dtype for p in parts), key=lambda dtype: dtype.itemsize)

    def joined(name: str) -> Tensor | None:
        tensors = [t for p in parts if (t := getattr(p, name)) is not None]
        if not tensors:
            return None
        if len(tensors) != len(parts):
            raise QuantizationError(f"{name} is held by some of the stacked weights and not by all")
        if name in ("scale", "offset") and tensors[0].is_floating_point():
            return torch.cat([t.to(widest) for t in tensors])
        dtype = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
        return torch.cat([t.to(dtype) for t in tensors])

    for part in parts[1:]:
        one, other = parts[0].permutation, part.permutation
        same = one is other or (one is not None and other is not None and torch.equal(one, other))
        if not same or part.settings != parts[0].settings or part.group_rows > 1:
            raise QuantizationError(
                "weights to be stacked need one codec, one permutation and groups of one row each"
            )
    fields = {n: joined(n) for n in ("packed", "scale", "offset", "row_scale")}
    return dataclasses.replace(parts[0], **fields)
