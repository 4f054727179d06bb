"""Quantised weights, made once and shared by every graph of one `optimize`."""

import torch
from torch import Tensor, fx

from ridgeline.codegen.kernel import constant
from ridgeline.passes.quantization import Codec, QuantizedWeight, quantize, round_to_nearest


class WeightStore:
    """Weights by name and codec.

    hessians: weight name -> H [K,K] = 2/n Σ x xᵀ from calibration data; with it GPTQ is used,
    without it a calibration-free search.
    """

    def __init__(self, hessians: dict[str, Tensor] | None = None) -> None:
        self.hessians = hessians or {}
        self._sources: dict[str, tuple[Tensor, int]] = {}
        self._rounded: dict[tuple[str, Codec], QuantizedWeight] = {}
        self._refined: dict[tuple[str, Codec], QuantizedWeight] = {}

    def parameter(self, node: fx.Node, transposed: bool) -> Tensor:
        """The tensor [N,K] that a get_attr node stands for."""
        weight = constant(node).detach()
        return weight.T if transposed else weight

    def stale(self) -> bool:
        """Has a weight been changed in place since it was quantised?"""
        return any(w._version != version for w, version in self._sources.values())

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
            if not weight.is_inference():  # such tensors cannot be changed, nor count changes
                self._sources[name] = (weight, weight._version)
            rounded = self.rounded(name, weight, codec)
            lossless = torch.equal(rounded.dequantize(), weight.float())
            self._refined[key] = (
                rounded if lossless else quantize(weight, codec, self.hessians.get(name))
            )
        return self._refined[key]
