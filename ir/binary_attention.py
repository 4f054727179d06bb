"""Attention over binary Hamming codes: linear in the tokens, and made of additions.

Law, with b(x)[i] = +1 where x[i] > threshold[h,i] and -1 elsewhere, per head h and channel i:

    s[m,t]   = D + 1 + sum_i bq[m,i] bk[t,i] = 2 #{i: bq[m,i] = bk[t,i]} + 1        (always > 0)
    out[m,e] = sum_t s[m,t] v[t,e] / sum_t s[m,t]

The sum over i may be taken last, and then no product is left: with the masked sums
A1[i] = sum of v[t] over keys whose bit i is +1 and A0[i] over those whose bit is -1,

    sum_t s[m,t] v[t] = sum_t v[t] + 2 sum_i A(bit i of query m)[i]

which costs (N + M) D E additions instead of 2 N M D multiplications; the denominator is the same
with v = 1, and takes one division per query.

query [B,H,M,D], key [B,H,N,D], value [B,H,N,E] of any strides, thresholds [H,D], fp32. Sums are
fp32 (fp64 where an operand is), the result has value's dtype and its heads side by side in memory.
Thresholds are numbers of the model, so that no result depends on what else is in the batch. A NaN
is not above any threshold.

Gradient: that of the sums, exact for value; codes let it through straight where
|x - threshold| <= 1, as a clamp does. Thresholds are statistics and have none.
Source: You et al., ShiftAddViT (2023), section 4; Liu et al., EcoFormer (2022), whose bias of
D + 1 keeps the weights positive. The published code takes its threshold over the whole batch.
"""

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import Op


class BinaryAttentionError(RidgelineError, ValueError):
    """Operands that the law does not define."""


def check(
    query: Tensor, key: Tensor, value: Tensor, query_threshold: Tensor, key_threshold: Tensor
) -> None:
    """Raises BinaryAttentionError unless the operands fit each other and there is a key."""
    operands = (query, key, value)
    fits = all(x.dim() == 4 and x.is_floating_point() for x in operands)
    if fits:
        per_head = (query.shape[1], query.shape[3])
        fits = query.shape[:2] == key.shape[:2] == value.shape[:2]
        fits = fits and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2]
        fits = fits and all(tuple(t.shape) == per_head for t in (query_threshold, key_threshold))
    if not fits or not key.shape[2]:
        found = ", ".join(
            f"{x.dtype} {list(x.shape)}" for x in (*operands, query_threshold, key_threshold)
        )
        raise BinaryAttentionError(
            "binary_attention expects floating query [B,H,M,D], key [B,H,N,D], value [B,H,N,E] with"
            f" N >= 1 and thresholds [H,D]; found {found}"
        )


def _codes(x: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """±1 of x's shape."""
    above = x.to(dtype) > threshold.to(dtype).unsqueeze(-2)
    return above.to(dtype) * 2 - 1


def _accumulator(*operands: Tensor) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in operands)
    return torch.float64 if wide else torch.float32


def _with_ones(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., E] -> [..., E + 1]: numerator and denominator are one sum."""
    return torch.cat((value.to(dtype), value.new_ones((*value.shape[:-1], 1), dtype=dtype)), -1)


def reference(
    query: Tensor, key: Tensor, value: Tensor, query_threshold: Tensor, key_threshold: Tensor
) -> Tensor:
    """The law above in plain torch; raises BinaryAttentionError."""
    check(query, key, value, query_threshold, key_threshold)
    dtype = _accumulator(query, key, value)
    bq, bk = _codes(query, query_threshold, dtype), _codes(key, key_threshold, dtype)
    values = _with_ones(value, dtype)
    total = (query.shape[3] + 1) * values.sum(-2, keepdim=True)
    sums = total + bq @ (bk.transpose(-1, -2) @ values)
    out = _fake(query, key, value, query_threshold, key_threshold)
    return out.copy_(sums[..., :-1] / sums[..., -1:])


def _fake(query, key, value, query_threshold, key_threshold):
    return heads_side_by_side(value, (*query.shape[:-1], value.shape[-1]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """With G the gradient of numerator and denominator, in the same linear order:
    dbq = G KVᵀ, dKV = bqᵀ G, dbk = [v 1] dKVᵀ, d[v 1] = bk dKV + (D + 1) sum_m G."""
    query, key, value, query_threshold, key_threshold = ctx.saved_tensors
    dtype = _accumulator(query, key, value)
    bq, bk = _codes(query, query_threshold, dtype), _codes(key, key_threshold, dtype)
    values, size = _with_ones(value, dtype), query.shape[3] + 1
    kv = bk.transpose(-1, -2) @ values
    sums = size * values.sum(-2, keepdim=True) + bq @ kv
    top, bottom = sums[..., :-1], sums[..., -1:]
    d_top = grad.to(dtype) / bottom
    d_sums = torch.cat((d_top, -(d_top * top).sum(-1, keepdim=True) / bottom), -1)
    d_kv = bq.transpose(-1, -2) @ d_sums
    d_query = _straight(d_sums @ kv.transpose(-1, -2), query, query_threshold)
    d_key = _straight(values @ d_kv.transpose(-1, -2), key, key_threshold)
    d_value = (bk @ d_kv + size * d_sums.sum(-2, keepdim=True))[..., :-1].to(value.dtype)
    return d_query, d_key, d_value, None, None


def _straight(grad: Tensor, x: Tensor, threshold: Tensor) -> Tensor:
    """The gradient of the codes, let through within 1 of the threshold."""
    distance = x.to(grad.dtype) - threshold.to(grad.dtype).unsqueeze(-2)
    return (grad * (distance.abs() <= 1)).to(x.dtype)


BINARY_ATTENTION = Op(
    schema=(
        "binary_attention(Tensor query, Tensor key, Tensor value, Tensor query_threshold,"
        " Tensor key_threshold) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
