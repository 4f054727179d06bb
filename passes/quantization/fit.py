"""The levels of one group of weights, fitted to them in the metric of the layer's outputs.

Law, for the members w [rows, g] of a group, M [g,g] a positive semi-definite metric and v the
weight of a row:

    minimise over params and codes   sum_rows v (ŵ-w) M (ŵ-w)ᵀ,      ŵ = basis[code] params

Starts: the levels evenly spread over the members' range times p, for several p; for "binary" also
ShiftAddLLM's greedy one, b_i = sign(r), α_i = mean |r|, r <- r - α_i b_i, the means weighted by
diag M. Then alternately codes <- nearest levels, params <- least squares (P x P per group), rounded
to what storage holds. Rounding and nearest codes may each raise the loss, so the best iterate is
what is kept. The weighting is not optional: an unweighted fit clips the outliers that carry a real
model.
Source: ShiftAddLLM section 4, after greedy and alternating binary coding (LUT-GEMM, BCQ).
"""

import torch
from torch import Tensor

from ridgeline.passes.quantization.codec import Codec
from ridgeline.passes.quantization.levels import Levels, basis, stored

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
ROUNDS = 4


def fit(
    members: Tensor, metric: Tensor, codec: Codec, dtype: torch.dtype, row_weight: Tensor
) -> Tensor:
    """params fp32 [R,P] of R groups with members [R, rows, g], as stored in `dtype`.

    metric [g,g]; row_weight [R, rows].
    """
    table = basis(codec).to(members.device)
    best = members.new_zeros(len(members), table.shape[1])
    least = members.new_full((len(members),), torch.inf)

    def offer(params: Tensor) -> Tensor:
        """Keep `params` where they are the best so far; their codes [R, rows, g]."""
        nonlocal best, least
        codes, values = Levels(params @ table.T).nearest(members.flatten(1))
        error = values.view_as(members) - members
        loss = (((error @ metric) * error).sum(-1) * row_weight).sum(-1)
        wins = loss < least
        best, least = torch.where(wins.unsqueeze(1), params, best), torch.where(wins, loss, least)
        return codes.view_as(members)

    for params in _even(members, codec):
        offer(stored(params, codec, dtype))
    starts = [best, _greedy(members, metric, codec)] if codec.scheme == "binary" else [best]
    for params in starts:
        for _ in range(ROUNDS):
            codes = offer(stored(params, codec, dtype))
            params = least_squares(table[codes], metric, members @ metric, row_weight)
        offer(stored(params, codec, dtype))
    return best


def least_squares(signs: Tensor, metric: Tensor, pull: Tensor, row_weight: Tensor) -> Tensor:
    """params [R,P] of least loss for fixed codes.

    signs: basis[code] [R, rows, g, P]; pull: w M [R, rows, g]. The normal equations are damped by a
    millionth of their diagonal's mean, for groups whose planes are not independent.
    """
    weighted = signs * row_weight[..., None, None]
    normal = torch.einsum("rngp,gh,rnhq->rpq", weighted, metric, signs)
    right = torch.einsum("rngp,rng->rp", weighted, pull)
    mean = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(normal.shape[1], device=normal.device)
    return torch.linalg.solve(normal + 1e-6 * mean[:, None, None] * eye, right)


def _even(members: Tensor, codec: Codec):
    """params [R,P] of levels spread over the range times each clip."""
    low, high = members.amin((1, 2)), members.amax((1, 2))
    peak = torch.maximum(-low, high)
    places = 2.0 ** torch.arange(codec.bits, device=members.device)
    for clip in CLIPS:
        if codec.scheme == "shift":
            yield (peak * clip).unsqueeze(1)
        elif codec.scheme == "symmetric":
            side = torch.where(high >= -low, 1.0, -1.0)
            yield (peak * clip / (codec.middle - 1)).unsqueeze(1)
            yield (-side * peak * clip / codec.middle).unsqueeze(1)
        elif codec.scheme == "minimum":
            yield torch.stack([(high - low) * clip / codec.top, low * clip], 1)
        elif codec.centred:
            yield (peak * clip / codec.top).unsqueeze(1) * places
        else:
            alpha = ((high - low) * clip / (2 * codec.top)).unsqueeze(1) * places
            yield torch.cat([alpha, ((high + low) * clip / 2).unsqueeze(1)], 1)


def _greedy(members: Tensor, metric: Tensor, codec: Codec) -> Tensor:
    """ShiftAddLLM's start, smallest α first as the bits of a code are."""
    share = metric.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    share = share / (share.sum() * members.shape[1])
    offset = members.new_zeros(len(members), 0)
    rest = members
    if not codec.centred:
        offset = (members * share).sum((1, 2)).unsqueeze(1)
        rest = members - offset.unsqueeze(2)
    alphas = []
    for _ in range(codec.bits):
        alphas.append((rest.abs() * share).sum((1, 2)))
        rest = rest - alphas[-1][:, None, None] * torch.where(rest >= 0, 1.0, -1.0)
    return torch.cat([torch.stack(alphas[::-1], 1), offset], 1)
