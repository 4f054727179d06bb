"""The spellings of attention that are left in normal form, as patterns.

The softmax form is softmax(c Q Kᵀ + M) V, its factor c and mask M there or not; sinks are a last
column of the scores, whose weight is dropped (`ridgeline.ir.rules.sinks`). A soft cap is a tanh of
the scores over the cap.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.match import Pattern, trace

aten = torch.ops.aten


def masked(query: Tensor, key_t: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key_t * scale + mask, -1) @ value


def masked_unscaled(query: Tensor, key_t: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(query @ key_t + mask, -1) @ value


def unmasked(query: Tensor, key_t: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key_t * scale, -1) @ value


def unmasked_unscaled(query: Tensor, key_t: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key_t, -1) @ value


def _with_sinks(scores: Tensor, sinks: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1] @ value


def sinks_masked(
    query: Tensor, key_t: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    return _with_sinks(query @ key_t * scale + mask, sinks, value)


def sinks_masked_unscaled(
    query: Tensor, key_t: Tensor, value: Tensor, mask: Tensor, sinks: Tensor
) -> Tensor:
    return _with_sinks(query @ key_t + mask, sinks, value)


def sinks_unmasked(
    query: Tensor, key_t: Tensor, value: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    return _with_sinks(query @ key_t * scale, sinks, value)


def sinks_unmasked_unscaled(query: Tensor, key_t: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    return _with_sinks(query @ key_t, sinks, value)


def capped_masked(
    query: Tensor, key_t: Tensor, value: Tensor, scale: float, soft_cap: float, mask: Tensor
) -> Tensor:
    return torch.softmax(torch.tanh(query @ key_t * scale) * soft_cap + mask, -1) @ value


def capped_unmasked(
    query: Tensor, key_t: Tensor, value: Tensor, scale: float, soft_cap: float
) -> Tensor:
    return torch.softmax(torch.tanh(query @ key_t * scale) * soft_cap, -1) @ value


def sinks_capped_masked(
    query: Tensor,
    key_t: Tensor,
    value: Tensor,
    scale: float,
    soft_cap: float,
    mask: Tensor,
    sinks: Tensor,
) -> Tensor:
    return _with_sinks(torch.tanh(query @ key_t * scale) * soft_cap + mask, sinks, value)


def sinks_capped_unmasked(
    query: Tensor, key_t: Tensor, value: Tensor, scale: float, soft_cap: float, sinks: Tensor
) -> Tensor:
    return _with_sinks(torch.tanh(query @ key_t * scale) * soft_cap, sinks, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def sdpa_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def sdpa_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def sdpa_grouped(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def sdpa_causal_grouped(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def sdpa_masked_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The spellings left after normalisation, the most specific first."""
    q, k, v = torch.empty(2, 4, 6, 8), torch.empty(2, 4, 5, 8), torch.empty(2, 4, 5, 8)
    mask, scale = torch.empty(2, 1, 6, 5), 0.37
    sinks = torch.empty(2, 4, 6, 1)
    raw = {"query": q, "key_t": k.transpose(2, 3), "value": v}
    capped = {"scale": scale, "soft_cap": 5.5}
    whole = {"query": q, "key": k, "value": v}
    softmax, fused = aten.softmax.int, aten.scaled_dot_product_attention.default
    return (
        trace(masked, softmax, **raw, mask=mask, scale=scale),
        trace(unmasked, softmax, **raw, scale=scale),
        trace(masked_unscaled, softmax, **raw, mask=mask),
        trace(unmasked_unscaled, softmax, **raw),
        trace(sinks_masked, softmax, **raw, mask=mask, sinks=sinks, scale=scale),
        trace(sinks_unmasked, softmax, **raw, sinks=sinks, scale=scale),
        trace(sinks_masked_unscaled, softmax, **raw, mask=mask, sinks=sinks),
        trace(sinks_unmasked_unscaled, softmax, **raw, sinks=sinks),
        trace(capped_masked, softmax, **raw, **capped, mask=mask),
        trace(capped_unmasked, softmax, **raw, **capped),
        trace(sinks_capped_masked, softmax, **raw, **capped, mask=mask, sinks=sinks),
        trace(sinks_capped_unmasked, softmax, **raw, **capped, sinks=sinks),
        trace(sdpa_masked, fused, **whole, mask=mask, scale=scale),
        trace(sdpa_causal, fused, **whole, scale=scale),
        trace(sdpa, fused, **whole, scale=scale),
        trace(sdpa_masked_grouped, fused, **whole, mask=mask, scale=scale),
        trace(sdpa_causal_grouped, fused, **whole, scale=scale),
        trace(sdpa_grouped, fused, **whole, scale=scale),
    )
