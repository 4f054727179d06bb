"""A linear layer that holds a quantised weight: what a reparameterised model is made of.

Law: `ridgeline.ir.quantized_linear`. The layer runs on any device by the op's reference and, once
its model is compiled by `ridgeline.optimize`, by the kernels of the target. Its buffers are the
op's operands, so that a `state_dict` holds the very artefact whose size and accuracy are reported.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.quantization.codec import QuantizedWeight

OPERANDS = ("packed", "scale", "offset", "row_scale", "permutation")


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[m]` in every place in `model` where module m stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves second names out
            if child in new:
                setattr(parent, name, new[child])


class QuantizedLinear(nn.Module):
    """y = x Ŵᵀ + bias with Ŵ [N,K] held as codes.

    Buffers packed, scale, offset, row_scale, permutation as in `QuantizedWeight`, absent ones
    None; `bias` [N] is a parameter or None. multiply: as in the op, None for x's own dtype.
    x [..., K] -> [..., N] in x's dtype.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        multiply: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(weight.packed), weight.in_features
        self.settings, self.multiply = weight.settings, multiply
        held = weight.tensors
        for name in OPERANDS:
            self.register_buffer(name, held.get(name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, sharing this layer's buffers."""
        settings = dict(self.settings)
        return QuantizedWeight(
            self.packed,
            self.scale,
            self.offset,
            codec_name=settings.pop("codec"),
            in_features=self.in_features,
            row_scale=self.row_scale,
            permutation=self.permutation,
            **settings,
        )

    @property
    def weight(self) -> Tensor:
        """Ŵ [N,K], for code that reads a linear layer's weight or asks for its dtype or device."""
        return self.quantized.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """`to`, `half`, `cuda`: codes and scales move, and keep their dtypes."""
        held = {name: getattr(self, name) for name in OPERANDS}
        super()._apply(fn, recurse)
        for name, tensor in held.items():
            now = getattr(self, name)
            if tensor is not None and now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], x's dtype."""
        return QUANTIZED_LINEAR.overload(
            x,
            self.packed,
            self.scale,
            self.offset,
            self.bias,
            self.row_scale,
            self.permutation,
            multiply=self.multiply,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantized.codec}"
