"""What a quantised weight is: the request (`Codec`) and the result (`QuantizedWeight`).

Law: ridgeline.ir.quantized_linear. The schemes are

    "symmetric"   scale[n,g] (code - 2**(bits-1))                          uniform, offset None
    "zero_point"  scale[n,g] (code - offset[n,g])                          uniform, offset uint8
    "minimum"     scale[n,g] code + offset[n,g]                            uniform, offset floating
    "binary"      sum_i α[r,g,i] (2 bit_i(code) - 1) (+ offset[r,g])       one α per plane and group
    "shift"       scale[r,g] sum_t ±2**-e_t                            one code per sign and shift

A symmetric scale may be negative: that puts the 2**(bits-1) extra level on the positive side, as
GGUF's Q4_0 does. Scale (and minimum) are fp16. They are fp32, both, where a group's scale is out of
fp16's range (above 8192, or so small that rounding it would cost more than 2**-11 of itself), or
where a group lies so far from zero that rounding its minimum would cost a sixteenth of a step.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ridgeline.cost_model import Gemm
from ridgeline.ir import quantized_linear
from ridgeline.ir.errors import RidgelineError

Scheme = Literal["symmetric", "zero_point", "minimum", "binary", "shift"]
UNIFORM: tuple[Scheme, ...] = ("symmetric", "zero_point", "minimum")
BITS: dict[Scheme, tuple[int, ...]] = {
    "symmetric": (3, 4, 8),
    "zero_point": (3, 4, 8),
    "minimum": (3, 4, 8),
    "binary": (1, 2, 3, 4),
    "shift": (4, 5, 6, 8),
}
GROUP_STEP = 32
"""Group sizes are multiples of it: what the kernels of every back end can take."""
LARGEST_TERMS = 3


class QuantizationError(RidgelineError, ValueError):
    """A weight, a codec or a Hessian that cannot be quantised as asked."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a weight is to be held.

    bits: per code. group_size: weights along K that share their scales; scheme: as above.
    group_rows: rows that share them; only "binary" knows more than one, and only there group_size
        may be 1 (column-wise) or 8 (block-wise).
    terms: of "binary", signed powers of two per α, 0 for fp16 α; of "shift", powers of two per
        weight (bits / terms bits each).
    centred: of "binary", whether the levels of a group lie about zero (no offset).
    act_order: whether columns are permuted by how much the inputs excite them before they are
        grouped; row_scale: whether rows are normalised first, which shared groups need.
    """

    bits: int = 4
    group_size: int = 64
    scheme: Scheme = "zero_point"
    group_rows: int = 1
    terms: int = 0
    centred: bool = True
    act_order: bool = False
    row_scale: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise QuantizationError(
                f"codec scheme is {self.scheme!r}; choose one of {get_args(Scheme)}"
            )
        allowed = BITS[self.scheme]
        if self.bits not in allowed or type(self.bits) is not int:
            raise QuantizationError(
                f"codec bits is {self.bits!r}; with scheme {self.scheme!r} choose one of {allowed}"
            )
        shared = self.scheme == "binary" and self.group_size in (1, 8)
        whole = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if not whole or not (shared or (self.group_size > 0 and self.group_size % GROUP_STEP == 0)):
            raise QuantizationError(
                f"codec group_size is {self.group_size!r}; choose a multiple of {GROUP_STEP}, or"
                " with scheme 'binary' 1 or 8 beside group_rows"
            )
        if self.group_rows < 1 or (self.group_rows > 1 and self.scheme != "binary"):
            raise QuantizationError(
                f"codec group_rows is {self.group_rows!r}; choose 1, or more with scheme 'binary'"
            )
        least, most = {"binary": (0, LARGEST_TERMS), "shift": (1, 2)}.get(self.scheme, (0, 0))
        if not least <= self.terms <= most or (self.scheme == "shift" and self.bits % self.terms):
            raise QuantizationError(
                f"codec terms is {self.terms!r}; with scheme {self.scheme!r} choose {least} to"
                f" {most}" + (", a divisor of bits" if self.scheme == "shift" else "")
            )

    @property
    def codec(self) -> str:
        """The op's name of the law."""
        return "uniform" if self.scheme in UNIFORM else self.scheme

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

    @property
    def bits_per_group(self) -> int:
        """Bits of the scales and offset of one group."""
        alpha = 8 * self.terms if self.scheme == "binary" and self.terms else 16
        return {
            "symmetric": 16,
            "zero_point": 16 + 8,
            "minimum": 16 + 16,
            "binary": alpha * self.bits + (0 if self.centred else 16),
            "shift": 16,
        }[self.scheme]

    def average_bits(self, in_features: int, out_features: int = 1) -> float:
        """Bits stored per weight [N,K], scales in fp16 and all that stands beside the codes
        counted: offsets, row scales (fp16) and the permutation (16 bits a column)."""
        rows = -(-out_features // self.group_rows)
        total = out_features * 8 * -(-in_features * self.bits // 8)
        total += rows * self.groups(in_features) * self.bits_per_group
        total += 16 * out_features * self.row_scale + 16 * in_features * self.act_order
        return total / (out_features * in_features)

    def gemm(
        self,
        m: int,
        n: int,
        k: int,
        dtype: torch.dtype,
        *,
        stored: torch.dtype | None = None,
        bias: bool = False,
    ) -> Gemm:
        """The work of x [m,k] times a weight [n,k] held so; dtype: of the products, stored: of x
        where that is another."""
        return Gemm(
            m=m,
            n=n,
            k=k,
            dtype=dtype,
            weight_bits=self.bits,
            group_size=self.group_size,
            scheme=self.scheme,
            stored=stored,
            bias=bias,
            group_rows=self.group_rows,
            terms=self.terms,
            centred=self.centred,
            beside_bytes=2 * n * self.row_scale + 2 * k * self.act_order,
        )

    def __str__(self) -> str:
        parts = [f"{self.bits}-bit {self.scheme} g{self.group_size}"]
        if self.group_rows > 1:
            parts.append(f"of {self.group_rows} rows")
        if self.terms:
            parts.append(f"{self.terms} power{'s' * (self.terms > 1)} of two")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [N,K] as codes and the scales of its groups; see the law.

    packed: uint8 [N, ceil(K*bits/8)]; scale: fp16 or fp32 [R,G], of "binary" [R,G,bits] or int8
    [R,G,bits,T]; offset: None, uint8 [R,G], or floating [R,G]; row_scale: None or floating [N];
    permutation: None or int16/int32/int64 [K]; in_features: K; R = ceil(N / group_rows).
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int
    in_features: int
    codec_name: str = "uniform"
    group_rows: int = 1
    terms: int = 1
    row_scale: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        n, k, halves = len(self.packed), self.in_features, (torch.float16, torch.float32)
        groups = (-(-n // self.group_rows), -(-k // self.group_size))
        scale_shapes: list[tuple[int, ...]] = [groups]
        scale_dtypes = halves
        if self.codec_name == "binary":
            scale_shapes = [(*groups, self.bits)]
            if self.scale.dtype == torch.int8:
                scale_shapes = [(*groups, self.bits, t) for t in (1, 2, 3)]
                scale_dtypes = (torch.int8,)
        expected = [("packed", self.packed, [(n, -(-k * self.bits // 8))], (torch.uint8,))]
        expected += [("scale", self.scale, scale_shapes, scale_dtypes)]
        if self.offset is not None:
            uniform = self.codec_name == "uniform"
            kinds = (torch.uint8, self.scale.dtype) if uniform else halves
            expected += [("offset", self.offset, [groups], kinds)]
        if self.row_scale is not None:
            expected += [("row_scale", self.row_scale, [(n,)], halves)]
        if self.permutation is not None:
            kinds = (torch.int16, torch.int32, torch.int64)
            expected += [("permutation", self.permutation, [(k,)], kinds)]
        for name, tensor, shapes, dtypes in expected:
            if tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes:
                raise QuantizationError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; a {self.bits}-bit"
                    f" {self.codec_name} weight with K={k} and groups of {self.group_size} needs"
                    f" {' or '.join(map(str, dtypes))} {' or '.join(map(str, shapes))}"
                )

    @property
    def scheme(self) -> Scheme:
        """Read off the codec and the offset, as the law does."""
        if self.codec_name != "uniform":
            return self.codec_name  # pyright: ignore[reportReturnType]
        if self.offset is None:
            return "symmetric"
        return "minimum" if self.offset.is_floating_point() else "zero_point"

    @property
    def codec(self) -> Codec:
        """The request that this weight answers."""
        powers = self.scale.shape[-1] if self.scale.dtype == torch.int8 else 0
        return Codec(
            self.bits,
            self.group_size,
            self.scheme,
            group_rows=self.group_rows,
            terms=self.terms if self.scheme == "shift" else powers,
            centred=self.scheme != "binary" or self.offset is None,
            act_order=self.permutation is not None,
            row_scale=self.row_scale is not None,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `ridgeline::quantized_linear`, but for `multiply`."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "codec": self.codec_name,
            "group_rows": self.group_rows,
            "terms": self.terms,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by the op's names."""
        names = ("packed", "scale", "offset", "row_scale", "permutation")
        held = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and all that stands beside them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def average_bits(self) -> float:
        """Bits per weight as stored, fp32 scales counted where they were needed."""
        return 8 * self.nbytes / (self.packed.shape[0] * self.in_features)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows [start, stop) as views; groups must be rows' own (group_rows 1)."""
        kept = {n: t[start:stop] for n, t in self.tensors.items() if n != "permutation"}
        return dataclasses.replace(self, **kept)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N,K] that it stands for, row scale applied and columns in the order of the
        layer's inputs: arithmetic in fp32, rounded once to `dtype`."""
        weight = quantized_linear.dequantize(
            self.packed, self.scale, self.offset, in_features=self.in_features, **self.settings
        )
        if self.row_scale is not None:
            weight = weight * self.row_scale.float().unsqueeze(1)
        if self.permutation is not None:
            order = self.permutation.long()
            weight = torch.empty_like(weight).index_copy(1, order, weight)
        return weight.to(dtype)
