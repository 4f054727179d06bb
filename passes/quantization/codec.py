"""What a quantised weight is: the request (`Codec`) and the result (`QuantizedWeight`).

Law (ridgeline.ir.quantized_linear), group g = k // group_size, the last group may be shorter:

    ŵ[n,k] = scale[n,g] * (code[n,k] - 2**(bits-1))       "symmetric"   offset None
    ŵ[n,k] = scale[n,g] * (code[n,k] - offset[n,g])       "zero_point"  offset uint8, 0..2**bits-1
    ŵ[n,k] = scale[n,g] * code[n,k] + offset[n,g]         "minimum"     offset floating

A symmetric scale may be negative: that puts the 2**(bits-1) extra level on the positive side, as
GGUF's Q4_0 does. Scale (and minimum) are fp16. They are fp32, both, where a group's scale is out of
fp16's range (above 8192, or so small that rounding it would cost more than 2**-11 of itself), or
where a group lies so far from zero that rounding its minimum would cost a sixteenth of a step.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ridgeline.ir import quantized_linear
from ridgeline.ir.errors import RidgelineError

Scheme = Literal["symmetric", "zero_point", "minimum"]
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


class QuantizationError(RidgelineError, ValueError):
    """A weight, a codec or a Hessian that cannot be quantised as asked."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a weight is to be held: bits per code, group length along K, and the scheme."""

    bits: int = 4
    group_size: int = 64
    scheme: Scheme = "zero_point"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", BITS),
            ("group_size", GROUP_SIZES),
            ("scheme", get_args(Scheme)),
        ):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                raise QuantizationError(f"codec {name} is {value!r}; choose one of {allowed}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric scheme."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Groups per row of K = `in_features` weights, a shorter last one counted."""
        return -(-in_features // self.group_size)

    def average_bits(self, in_features: int) -> float:
        """Bits stored per weight in a row of `in_features`, scales in fp16 and offsets counted."""
        per_group = {"symmetric": 16, "zero_point": 16 + 8, "minimum": 16 + 16}[self.scheme]
        code_bits = 8 * -(-in_features * self.bits // 8)
        return (code_bits + per_group * self.groups(in_features)) / in_features


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [N,K] as codes and one scale (and offset) per group; see the law above.

    packed: uint8 [N, ceil(K*bits/8)]; scale: fp16 or fp32 [N,G]; offset: None, uint8 [N,G], or
    [N,G] of the scale's dtype; in_features: K.
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int
    in_features: int

    def __post_init__(self) -> None:
        codec, rows = self.codec, self.packed.shape[0]
        storage = (rows, -(-self.in_features * self.bits // 8))
        groups = (rows, codec.groups(self.in_features))
        expected = [("packed", self.packed, storage, (torch.uint8,))]
        expected += [("scale", self.scale, groups, (torch.float16, torch.float32))]
        if self.offset is not None:
            expected += [("offset", self.offset, groups, (torch.uint8, self.scale.dtype))]
        for name, tensor, shape, dtypes in expected:
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                raise QuantizationError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; a {self.bits}-bit weight"
                    f" with K={self.in_features} and groups of {self.group_size} needs"
                    f" {' or '.join(map(str, dtypes))} {shape}"
                )

    @property
    def scheme(self) -> Scheme:
        """Read off the offset, as the law does."""
        if self.offset is None:
            return "symmetric"
        return "minimum" if self.offset.is_floating_point() else "zero_point"

    @property
    def codec(self) -> Codec:
        """The request that this weight answers."""
        return Codec(self.bits, self.group_size, self.scheme)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and offsets."""
        held = (self.packed, self.scale, self.offset)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def average_bits(self) -> float:
        """Bits per weight as stored, fp32 scales counted where they were needed."""
        return 8 * self.nbytes / (self.packed.shape[0] * self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ [N,K]: arithmetic in fp32, rounded once to `dtype`."""
        return quantized_linear.dequantize(
            self.packed,
            self.scale,
            self.offset,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            dtype=dtype,
        )
