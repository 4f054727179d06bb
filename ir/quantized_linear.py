"""A linear layer whose weight is held as small integer codes: 4-bit, binary-coded or shift.

Law, with column j of the stored weight, group g = j // group_size (the last may be shorter) and
group row r = n // group_rows:

    y[m,n] = row_scale[n] sum_j x[m, permutation[j]] ŵ[n,j] + bias[n]       accumulated in fp32

    codec "uniform"   scheme read off offset: None, an integer dtype or a floating dtype
        ŵ[n,j] = scale[r,g] (code[n,j] - 2**(bits-1))                       "symmetric"
        ŵ[n,j] = scale[r,g] (code[n,j] - offset[r,g])                       "zero_point"
        ŵ[n,j] = scale[r,g] code[n,j] + offset[r,g]                         "minimum"
    codec "binary"    one plane per bit of the code, one α per plane; offset None or floating
        ŵ[n,j] = sum_i scale[r,g,i] (2 bit_i(code[n,j]) - 1) + offset[r,g]
    codec "shift"     the code is `terms` fields of bits/terms bits: the lowest bits are a right
        shift e, the top one the sign; a field whose e is all ones is the term zero
        ŵ[n,j] = scale[r,g] sum_t ±2**-e_t

Absent row_scale, permutation and bias are 1, the identity and 0. α (of "binary") is floating
[R,G,bits], or int8 [R,G,bits,T]: a sum of T signed powers of two, see `powers`. With group_rows = 1
groups are rows' own; group_size 1 and group_rows N is ShiftAddLLM's column-wise grouping,
group_size 8 and group_rows N/8 its block-wise one.

Products are formed in the dtype `multiply`, to which x is rounded. With bf16 products and
`MANY_ROWS` rows or more a kernel may round ŵ to bf16 as well, and the reference does: the weight is
then decoded once for all rows, as for a plain matrix product. With fp16 products a kernel may round
ŵ to fp16 there. `multiply` int16 means fixed point:
x is rounded to multiples of max|x| / FIXED_POINT_TOP, the maximum being that of a row of x over a
block of FIXED_POINT_BLOCK stored columns, so that four of them still add in 16 bits: what lookup
kernels compute with.

Storage: row n of `packed`, uint8 [N, ceil(K*bits/8)], is a little-endian string of bits of which
code j takes bits [j*bits, (j+1)*bits); of 4 bits, code 2j is the low nibble of byte j.
"minimum" with group 32 is GGUF's Q4_1 and holds such a checkpoint without loss.
Sources: MARLIN (symmetric, scale per group); HQQ and GGUF (zero point, minimum); ShiftAddLLM, after
LUT-GEMM (binary coding, powers of two); DeepShift and ShiftAddViT (shift layers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.op import Op

MANY_ROWS = 64
"""Rows from which decoding the whole weight first is the faster way: CPU kernels cross between 37
and 64 rows on Zen 4, for groups of 32 as of 128."""

FIXED_POINT_BLOCK, FIXED_POINT_TOP = 32, 8191
"""Columns that share a step of fixed-point activations, and the largest of them in steps: the sum
of four stays within 16 bits. Where groups of 1 or 8 columns are shared by rows, kernels multiply x
by alpha first and round that in place of x."""

POWER_BIAS = 64
"""int8 v stands for sign(v) 2**(|v| - POWER_BIAS), and 0 for 0."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N,K] -> storage [N, ceil(K*bits/8)]; the inverse of `unpack_codes`."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    string = ((codes.unsqueeze(-1) >> places) & 1).flatten(1)
    octets = F.pad(string, (0, -string.shape[1] % 8)).unflatten(1, (-1, 8))
    return (octets << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(
        -1, dtype=torch.uint8
    )


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """storage -> uint8 codes [N,K]."""
    if bits == 8:
        return packed
    if bits == 4:
        pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
        return pairs.flatten(1)[:, :in_features]
    octet = torch.arange(8, dtype=torch.uint8, device=packed.device)
    string = ((packed.unsqueeze(-1) >> octet) & 1).flatten(1)[:, : in_features * bits]
    places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (string.unflatten(1, (in_features, bits)) << places).sum(-1, dtype=torch.uint8)


def powers(terms: Tensor) -> Tensor:
    """α of "binary" as fp32 [R,G,bits]: floating α as they are, int8 [R,G,bits,T] as
    sum_t sign(v_t) 2**(|v_t| - POWER_BIAS), with 0 for v = 0 (exact: T <= 3 terms, no overflow)."""
    if terms.is_floating_point():
        return terms.float()
    wide = terms.to(torch.int32)
    return torch.ldexp(wide.sign().float(), wide.abs() - POWER_BIAS).sum(-1)


def shift_values(codes: Tensor, bits: int, terms: int) -> Tensor:
    """sum_t ±2**-e_t of uint8 codes, fp32 of their shape (exact)."""
    width = bits // terms
    zero, wide = 2 ** (width - 1) - 1, codes.to(torch.int32)
    total = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
    for term in range(terms):
        field = wide >> term * width
        shift, negative = field & zero, (field >> (width - 1)) & 1
        value = torch.ldexp((1 - 2 * negative).float(), -shift)
        total += value.masked_fill(shift == zero, 0.0)
    return total


def dequantize(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    codec: str = "uniform",
    group_rows: int = 1,
    terms: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ŵ [N,K], columns as stored: arithmetic in fp32, rounded once to `dtype`."""
    codes = unpack_codes(packed, bits, in_features)

    def per_weight(x: Tensor) -> Tensor:
        wide = x.float().repeat_interleave(group_size, dim=1)[:, :in_features]
        return wide.repeat_interleave(group_rows, dim=0)[: len(codes)] if group_rows > 1 else wide

    if codec == "shift":
        return (per_weight(scale) * shift_values(codes, bits, terms)).to(dtype)
    if codec == "binary":
        weight = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        for plane, alpha in enumerate(powers(scale).unbind(-1)):
            sign = ((codes >> plane) & 1).float() * 2 - 1
            weight += per_weight(alpha) * sign
        return (weight if offset is None else weight + per_weight(offset)).to(dtype)
    wide = codes.float()
    if offset is None:
        weight = per_weight(scale) * (wide - 2 ** (bits - 1))
    elif offset.is_floating_point():
        weight = per_weight(scale) * wide + per_weight(offset)
    else:
        weight = per_weight(scale) * (wide - per_weight(offset))
    return weight.to(dtype)


def fixed_point(x: Tensor) -> Tensor:
    """x [..., K] rounded as `multiply` int16 does, fp32."""
    wide = F.pad(x.float(), (0, -x.shape[-1] % FIXED_POINT_BLOCK))
    blocks = wide.unflatten(-1, (-1, FIXED_POINT_BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / FIXED_POINT_TOP
    rounded = (blocks / step.clamp_min(torch.finfo(torch.float32).tiny)).round() * step
    return rounded.flatten(-2)[..., : x.shape[-1]]


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    permutation: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    multiply: torch.dtype | None = None,
    codec: str = "uniform",
    group_rows: int = 1,
    terms: int = 1,
) -> Tensor:
    """The law above in plain torch.

    x [..., K]; packed, scale, offset as in the law; bias, row_scale [N]; permutation integer [K].
    multiply: the dtype in which products are formed (accumulation is fp32 always); None means
        x.dtype, int16 fixed point. Returns [..., N], x.dtype. A float64 x, which no kernel takes,
        is accumulated in float64: what evidence is made of.
    """
    multiply = multiply or x.dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize(
        packed,
        scale,
        offset,
        bits=bits,
        group_size=group_size,
        in_features=x.shape[-1],
        codec=codec,
        group_rows=group_rows,
        terms=terms,
    )
    if multiply == torch.bfloat16 and x.shape[:-1].numel() >= MANY_ROWS:
        weight = weight.to(multiply).float()
    read = x if permutation is None else x[..., permutation.long()]  # torch indexes by no int16
    rounded = fixed_point(read) if multiply == torch.int16 else read.to(multiply)
    y = rounded.to(wide) @ weight.to(wide).T
    if row_scale is not None:
        y = y * row_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def _fake(x, packed, scale, offset=None, bias=None, row_scale=None, permutation=None, **settings):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, packed, scale, offset, bias, row_scale, permutation = inputs
    ctx.save_for_backward(packed, scale, offset, row_scale, permutation)
    ctx.in_features, ctx.with_bias = x.shape[-1], bias is not None
    ctx.settings = {k: v for k, v in keyword_only_inputs.items() if k != "multiply"}


def _backward(ctx, grad):
    """dx = dy ŵ: the codes are frozen, the gradient reaches the input and the bias."""
    packed, scale, offset, row_scale, permutation = ctx.saved_tensors
    weight = dequantize(packed, scale, offset, in_features=ctx.in_features, **ctx.settings)
    wide = grad.float() if row_scale is None else grad.float() * row_scale.float()
    dx = wide @ weight
    if permutation is not None:
        dx = torch.zeros_like(dx).index_copy(-1, permutation.long(), dx)
    d_bias = grad.float().flatten(0, -2).sum(0).to(grad.dtype) if ctx.with_bias else None
    return dx.to(grad.dtype), None, None, None, d_bias, None, None


QUANTIZED_LINEAR = Op(
    schema=(
        "quantized_linear(Tensor x, Tensor packed, Tensor scale, Tensor? offset=None,"
        " Tensor? bias=None, Tensor? row_scale=None, Tensor? permutation=None, *, int bits,"
        " int group_size, ScalarType? multiply=None, str codec='uniform', int group_rows=1,"
        " int terms=1) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
