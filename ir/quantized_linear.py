"""A linear layer whose weight is held as small integer codes with one scale per group.

Law, with g = k // group_size (the last group may be shorter):

    ŵ[n,k] = scale[n,g] * (code[n,k] - 2**(bits-1))         scheme "symmetric", offset absent
    ŵ[n,k] = scale[n,g] * (code[n,k] - offset[n,g])         scheme "zero_point", offset integer
    ŵ[n,k] = scale[n,g] * code[n,k] + offset[n,g]           scheme "minimum", offset floating
    y[m,n] = sum_k x[m,k] ŵ[n,k] + bias[n]                  accumulated in fp32

Products are formed in the dtype `multiply`, to which x is rounded. With bf16 products and
`MANY_ROWS` rows or more a kernel may round ŵ to bf16 as well, and the reference does: the weight is
then decoded once for all rows, as for a plain matrix product.

The scheme is read off `offset`: None, an integer dtype or a floating dtype. "minimum" with group 32
is GGUF's Q4_1 and holds such a checkpoint without loss.
Storage: 4-bit codes are uint8 [N, ceil(K/2)], code 2j in the low nibble of byte j; 8-bit codes are
uint8 [N, K]. Source: MARLIN (symmetric, scale per group); HQQ and GGUF (zero point, minimum).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.op import Op

MANY_ROWS = 64
"""Rows from which decoding the whole weight first is the faster way: CPU kernels cross between 37
and 64 rows on Zen 4, for groups of 32 as of 128."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N,K] -> storage [N, ceil(K*bits/8)]; the inverse of `unpack_codes`."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """storage -> uint8 codes [N,K]."""
    if bits == 8:
        return packed
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(1)[:, :in_features]


def dequantize(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ŵ [N,K]: arithmetic in fp32, rounded once to `dtype`."""
    codes = unpack_codes(packed, bits, in_features).float()

    def per_column(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(group_size, dim=1)[:, :in_features]

    if offset is None:
        weight = per_column(scale) * (codes - 2 ** (bits - 1))
    elif offset.is_floating_point():
        weight = per_column(scale) * codes + per_column(offset)
    else:
        weight = per_column(scale) * (codes - per_column(offset))
    return weight.to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    multiply: torch.dtype | None = None,
) -> Tensor:
    """The law above in plain torch.

    x [..., K]; packed, scale [N, ceil(K/group_size)], offset as in the law; bias [N].
    multiply: the dtype in which products are formed (accumulation is fp32 always); None means
        x.dtype. Returns [..., N], x.dtype.
    """
    multiply = multiply or x.dtype
    weight = dequantize(
        packed, scale, offset, bits=bits, group_size=group_size, in_features=x.shape[-1]
    )
    if multiply == torch.bfloat16 and x.shape[:-1].numel() >= MANY_ROWS:
        weight = weight.to(multiply).float()
    y = x.to(multiply).float() @ weight.T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _fake(x, packed, scale, offset=None, bias=None, *, bits, group_size, multiply=None):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, packed, scale, offset, bias = inputs
    ctx.save_for_backward(packed, scale, offset)
    ctx.in_features, ctx.with_bias = x.shape[-1], bias is not None
    ctx.bits, ctx.group_size = keyword_only_inputs["bits"], keyword_only_inputs["group_size"]


def _backward(ctx, grad):
    """dx = dy ŵ: the codes are frozen, the gradient reaches the input and the bias."""
    packed, scale, offset = ctx.saved_tensors
    weight = dequantize(
        packed,
        scale,
        offset,
        bits=ctx.bits,
        group_size=ctx.group_size,
        in_features=ctx.in_features,
    )
    d_bias = grad.float().flatten(0, -2).sum(0).to(grad.dtype) if ctx.with_bias else None
    return (grad.float() @ weight).to(grad.dtype), None, None, None, d_bias


QUANTIZED_LINEAR = Op(
    schema=(
        "quantized_linear(Tensor x, Tensor packed, Tensor scale, Tensor? offset=None,"
        " Tensor? bias=None, *, int bits, int group_size, ScalarType? multiply=None) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
