"""A linear layer that learns signs and shifts.

Law, for a latent weight w [N,K] in groups of `group_size` along K, each with a scale s:

    ŵ = s p,   p = sum over terms of ±2**-e or 0,   the nearest such p to w / s, term by term
    s = <w, p> / <p, p>                             (least squares), p and s found in turns

2**-e is the nearest power to |r| where 2**-e 3/4 <= |r| < 2**-e 3/2; beyond the smallest power,
where 0 is nearer, the term is 0. s is rounded to fp16 where that costs no more than 2**-11 of it,
as `QuantizedWeight` stores it. The gradient passes ŵ straight to w.

The codes are those of codec "shift" of `ridgeline.ir.quantized_linear`, of which this layer holds
none: it rounds its latent weight at each call, and `frozen` packs the same ŵ, as it is before a
16-bit dtype of the layer rounds it.
Source: Elhoushi et al., DeepShift (2019), form Q; You et al., ShiftAddViT (2023). The scale is
ours: without it no weight above 1 can be held, and one power errs by 20.6 % instead of 19.2 %.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.ir.quantized_linear import pack_codes
from ridgeline.passes.quantization.codec import GROUP_STEP, Codec, QuantizedWeight
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.shift_add_vit.errors import ShiftAddError

ROUNDS = 3
"""Times that powers and scale are found in turns; from the third on the error hardly falls."""

BITS = {1: 5, 2: 8}
"""Bits of a code by number of terms: a sign and 15 or 7 shifts each, one of which means zero."""


def nearest_powers(ratio: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """(value, field) of the nearest of 0 and ±2**-e, 0 <= e < zero.

    ratio: any shape, fp32. field: uint8, the shift, or `zero` for the value 0; the sign apart.
    """
    size = ratio.abs()
    # |r| * 4/3 lies in [2**-e, 2**(1-e)) for the powers nearest to it: frexp's exponent is exact
    shift = 1 - torch.frexp(size * (4 / 3)).exponent
    smallest = 2.0 ** (1 - zero)
    nothing = size < smallest / 2
    shift = shift.clamp(0, zero - 1)
    value = torch.ldexp(torch.where(ratio < 0, -1.0, 1.0), -shift)
    value = value.masked_fill(nothing, 0.0)
    return value, shift.masked_fill(nothing, zero).to(torch.uint8)


def _fitted(w: Tensor, p: Tensor) -> Tensor:
    """The scales of groups [..., 1] that bring p nearest to w, as they are stored: in fp16 where
    that holds them, else as they are."""
    squares = (p * p).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (w * p).sum(-1, keepdim=True) / squares
    half = scale.half().float()
    return torch.where((half - scale).abs() <= scale.abs() * 2.0**-11, half, scale)


class ShiftLinear(nn.Module):
    """y = x ŵᵀ + bias with ŵ of signs and shifts, trained through a latent weight.

    weight [N,K]: the latent weight; bias [N] or None: parameters. terms: powers per weight, 1 or 2.
    group_size: weights along K that share a scale, a multiple of 32; None for whole rows.
    x [..., K] -> [..., N], x's dtype.
    Raises ShiftAddError for other numbers of terms, QuantizationError for other groups.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        terms: int = 1,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        if terms not in BITS:
            raise ShiftAddError(f"terms is {terms!r}; choose one of {list(BITS)}")
        self.out_features, self.in_features = weight.shape
        self.terms, self.bits = terms, BITS[terms]
        self.group_size = group_size or self.in_features + -self.in_features % GROUP_STEP
        self.codec = Codec(self.bits, self.group_size, "shift", terms=terms)
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear, *, terms: int = 1) -> "ShiftLinear":
        """The shift layer that starts from a trained linear layer."""
        return cls(linear.weight, linear.bias, terms=terms)

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ŵ [N,K], codes uint8 [N,K], scale fp32 [N,G]) of the latent weight as it is now."""
        wide = F.pad(self.weight.float(), (0, -self.in_features % self.group_size))
        w = wide.unflatten(1, (-1, self.group_size))
        tiny = torch.finfo(torch.float32).tiny
        scale = w.abs().amax(-1, keepdim=True)
        p, codes = self._powers(w / scale.clamp_min(tiny))
        scale = _fitted(w, p)
        for _ in range(ROUNDS - 1):
            p, codes = self._powers(w / scale.clamp_min(tiny))
            scale = _fitted(w, p)
        codes = codes.flatten(1)[:, : self.in_features]
        return (scale * p).flatten(1)[:, : self.in_features], codes, scale.squeeze(-1)

    def _powers(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        width = self.bits // self.terms
        zero = 2 ** (width - 1) - 1
        total = torch.zeros_like(ratio)
        codes = torch.zeros(ratio.shape, dtype=torch.uint8, device=ratio.device)
        for term in range(self.terms):
            value, field = nearest_powers(ratio - total, zero)
            codes |= (field | (value < 0).to(torch.uint8) << (width - 1)) << (term * width)
            total = total + value
        return total, codes

    @property
    def rounded(self) -> Tensor:
        """ŵ [N,K], weight's dtype, whose gradient goes to the latent weight."""
        exact = self.weight - self.weight.detach()  # 0, with the gradient
        return self.encode()[0].to(self.weight.dtype) + exact

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], x's dtype."""
        return F.linear(x, self.rounded, self.bias)

    def packed(self) -> QuantizedWeight:
        """ŵ as codes. Raises ShiftAddError where the latent weight is not finite."""
        if broken := int((~torch.isfinite(self.weight)).sum()):
            raise ShiftAddError(
                f"{broken} of the {self.weight.numel()} latent weights are infinite or NaN; the"
                " training diverged: lower the learning rate, and start again from a checkpoint"
            )
        _, codes, scale = self.encode()
        half = scale.half()
        return QuantizedWeight(
            pack_codes(codes, self.bits),
            half if bool((half.float() == scale).all()) else scale,
            None,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            codec_name="shift",
            terms=self.terms,
        )

    def frozen(self) -> QuantizedLinear:
        """The layer for inference: the same numbers, held as codes."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return QuantizedLinear(self.packed(), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.codec}"
