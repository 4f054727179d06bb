"""Observations and weights of a program that nobody has run: shapes and dtypes, no values.

A model on the meta device has no weights. What a rewrite costs follows from shapes; what it loses
does not, and where an error is asked for (which of two codecs is the more exact) a sample of
normally distributed numbers stands for weight [N,K] and input [rows,K], drawn from one seed:

    error = ‖X (W - Ŵ)ᵀ‖ / ‖X Wᵀ‖       X ~ N(0, 1), W ~ N(0, 0.02²), 16 rows each

Such errors order the codecs. They tell nothing of a model's outputs, nor of weights that lie on a
codec's grid already.
"""

import functools

import torch
from torch import Tensor, fx

from ridgeline.passes.observe import Values
from ridgeline.passes.quantization import Codec, QuantizedWeight, round_to_nearest
from ridgeline.passes.weights import WeightStore

ROWS = 16
WEIGHT_DEVIATION = 0.02
"""What transformers initialise weights with."""
REACH = 4.0
"""Of a value that nobody has seen: beyond four deviations lies nothing to speak of."""


class Unobserved:
    """In place of `observe.Observation`."""

    def __call__(self, node: fx.Node) -> Tensor:
        """Normally distributed rows of the width and dtype of a value."""
        value = node.meta["val"]
        return _drawn(value.shape[-1], 1.0, value.dtype)

    def finite(self, node: fx.Node) -> bool:
        """What is drawn is finite."""
        return True

    def values(self, node: fx.Node) -> Values:
        """Its range, likewise."""
        return Values(REACH, _drawn(256, 1.0, node.meta["val"].dtype).flatten())


class UnknownWeights(WeightStore):
    """In place of `WeightStore`: no weight is read, none can be made."""

    def values(self, weight: Tensor) -> Tensor:
        return _drawn(weight.shape[-1], WEIGHT_DEVIATION, weight.dtype)

    def broken(self, weight: Tensor) -> int:
        return 0

    def sketch(self, name: str, weight: Tensor, codec: Codec) -> tuple[Tensor, QuantizedWeight]:
        part = self.values(weight)
        return part, _coded(part.shape[-1], weight.dtype, codec)


@functools.lru_cache(maxsize=256)
def _drawn(width: int, deviation: float, dtype: torch.dtype) -> Tensor:
    seed = width if deviation == WEIGHT_DEVIATION else width + 1
    drawn = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed))
    return (drawn * deviation).to(dtype)


@functools.lru_cache(maxsize=256)
def _coded(width: int, dtype: torch.dtype, codec: Codec) -> QuantizedWeight:
    return round_to_nearest(_drawn(width, WEIGHT_DEVIATION, dtype), codec)
