"""A codec as a matrix: the levels of a group are linear in its few parameters.

    level[c] = sum_p basis[c,p] params[p]         c = 0 .. 2**bits - 1

    "symmetric"  params (scale)            basis  c - 2**(bits-1)
    "minimum"    params (scale, offset)    basis  c, 1
    "binary"     params (α_1 .. α_q)       basis  2 bit_i(c) - 1; and 1 for an offset
    "shift"      params (scale)            basis  sum_t ±2**-e_t(c)

so that fitting, error feedback, refitting and distillation are written once for all of them. An
integer zero point is no linear parameter, so "zero_point" is not among them.

Parameters are kept as they will be stored: fp16 (fp32 where fp16's range does not hold them), or
α as sums of T signed powers of two, each the nearest to what the earlier ones left: with 1, 2 or 3
of them α is off by some 15, 3 or 0.5 %. Source: ShiftAddLLM, section 4; LUT-GEMM.
"""

import torch
from torch import Tensor

from ridgeline.ir.quantized_linear import POWER_BIAS, pack_codes, powers, shift_values
from ridgeline.passes.quantization.codec import Codec, QuantizationError, QuantizedWeight

LINEAR = ("symmetric", "minimum", "binary", "shift")
"""The schemes whose levels are linear in their parameters."""

LARGEST_HALF = 8192.0
"""An eighth of fp16's range: feedback may enlarge a group after the dtype is chosen."""


def basis(codec: Codec) -> Tensor:
    """fp32 [2**bits, P] of the law; raises QuantizationError for "zero_point"."""
    codes = torch.arange(2**codec.bits)
    one = torch.ones(len(codes), 1)
    if codec.scheme == "binary":
        signs = ((codes.unsqueeze(1) >> torch.arange(codec.bits)) & 1).float() * 2 - 1
        return signs if codec.centred else torch.cat([signs, one], 1)
    if codec.scheme == "minimum":
        return torch.cat([codes.float().unsqueeze(1), one], 1)
    if codec.scheme == "symmetric":
        return (codes - codec.middle).float().unsqueeze(1)
    if codec.scheme == "shift":
        return shift_values(codes.to(torch.uint8), codec.bits, codec.terms).unsqueeze(1)
    raise QuantizationError(
        f"scheme {codec.scheme!r} has an integer zero point; its levels are not linear in it"
    )


def to_powers(alpha: Tensor, terms: int) -> Tensor:
    """fp32 [...] -> int8 [..., terms], as `ridgeline.ir.quantized_linear.powers` reads them."""
    found, rest = [], alpha.float()
    for _ in range(terms):
        mantissa, exponent = torch.frexp(rest)  # |mantissa| in [0.5, 1): 2**exponent is above
        exponent = exponent - (mantissa.abs() < 0.75).int()
        code = (exponent + POWER_BIAS).clamp(1, 127) * rest.sign().int()
        found.append(code.to(torch.int8))
        rest = rest - powers(found[-1].unsqueeze(-1))
    return torch.stack(found, -1)


def scale_dtype(weight: Tensor) -> torch.dtype:
    """fp16, or fp32 for a weight whose scales fp16 might not hold to 2**-11 of themselves."""
    peak = weight.abs().amax(1)
    small = (peak > 0) & (peak < 2.0**-6)
    return torch.float32 if bool(((peak > LARGEST_HALF) | small).any()) else torch.float16


def stored(params: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    """`params` [..., P] rounded to what storage holds, fp32."""
    if codec.scheme != "binary" or not codec.terms:
        return params.to(dtype).float()
    alpha, offset = params[..., : codec.bits], params[..., codec.bits :]
    return torch.cat([powers(to_powers(alpha, codec.terms)), offset.to(dtype).float()], -1)


class Levels:
    """The levels [R, 2**bits] of R groups, sorted once for many searches."""

    def __init__(self, levels: Tensor) -> None:
        self.ordered, self.order = levels.sort(1)
        self.between = (self.ordered[:, 1:] + self.ordered[:, :-1]) / 2

    def nearest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int64, their levels), [R,m] as `target`, of what lies nearest to it."""
        place = torch.searchsorted(self.between, target.contiguous())
        return self.order.gather(1, place), self.ordered.gather(1, place)


def assemble(
    codes: Tensor,
    params: Tensor,
    codec: Codec,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """codes uint8 [N,K] (columns as grouped) and params [R,G,P] -> the artefact."""
    if not bool(params.to(dtype).isfinite().all()):
        raise QuantizationError(
            "compensation drove a scale out of its dtype's range; raise `damp`, or check that the"
            " Hessian belongs to this weight"
        )
    count = codec.bits if codec.scheme == "binary" else 1
    scale, rest = params[..., :count], params[..., count:]
    if codec.scheme == "binary":
        scale = to_powers(scale, codec.terms) if codec.terms else scale.to(dtype)
    else:
        scale = scale.squeeze(-1).to(dtype)
    return QuantizedWeight(
        packed=pack_codes(codes, codec.bits).contiguous(),
        scale=scale.contiguous(),
        offset=rest.squeeze(-1).to(dtype).contiguous() if rest.shape[-1] else None,
        bits=codec.bits,
        group_size=codec.group_size,
        in_features=codes.shape[1],
        codec_name=codec.codec,
        group_rows=codec.group_rows,
        terms=codec.terms if codec.scheme == "shift" else 1,
        row_scale=row_scale,
        permutation=order,
    )
