"""Quantisation without data: round to nearest, clip search, half-quadratic splitting.

Round to nearest: the range of a group is the range of its weights; codes are nearest codes.
Clip search: argmin over p of sum_k v_k (ŵ-w)², the range scaled by p in {1, 0.98, .., 0.5}.
    v = 1 under "minimum"; v_k = w_k² where zero is a level of the grid, so that a group's outlier
    is not clipped for the sake of its many small weights: on real language models outliers carry
    the loudest activations, and clipping them by plain error costs more than it gains.
Half-quadratic ("minimum"): minimise sum_k |ŵ-w|^P over the offset at a fixed scale, with an
    auxiliary error e:
    e <- shrink(w - ŵ)              shrink(x) = sign(x) max(0, |x| - |x|^(P-1) / beta)
    offset <- mean_k(w - e - scale*code)         beta <- kappa * beta
Errors are measured in steps, so that the result follows the weight when it is multiplied by a
constant. Sources: HQQ (P = 0.7, beta = 10, kappa = 1.01, at most 20 rounds); v = w² is ggml's.
"""

import torch
from torch import Tensor

from ridgeline.passes.quantization.codec import Codec, QuantizedWeight
from ridgeline.passes.quantization.grid import (
    Grid,
    assemble,
    best_grid,
    better,
    checked,
    decode,
    encode,
    fits_half,
    nonzero,
    split_groups,
)

CLIPS = tuple(1 - 0.02 * i for i in range(26))

POWER = 0.7
BETA = 10.0
KAPPA = 1.01
ROUNDS = 20

# Weights searched at once: bounds the memory of the search, and keeps it near the caches of a CPU.
CHUNK = 2**20


def round_to_nearest(weight: Tensor, codec: Codec) -> QuantizedWeight:
    """`weight` [N,K] on the grid that its groups' ranges span: the floor for every other method.

    Bit-exact on what is on such a grid already: GGUF's Q4_1 with Codec(4, 32, "minimum"), Q4_0
    with Codec(4, 32, "symmetric"), Q8_0 with Codec(8, 32, "symmetric"), each dequantised to fp32,
    provided that a Q4_1 block's minimum is less than 2**14 of its steps away from zero.
    """
    return _search(weight, codec, clips=(1.0,), rounds=0)


def calibration_free(weight: Tensor, codec: Codec) -> QuantizedWeight:
    """The data-free default: clip search, then half-quadratic splitting where offsets are real.

    Per group the error sum_k v_k (ŵ-w)² is at most that of `round_to_nearest`: a step of the
    search replaces a group's grid only where it lowers that error.
    """
    return _search(weight, codec, clips=CLIPS, rounds=ROUNDS)


def _search(
    weight: Tensor, codec: Codec, *, clips: tuple[float, ...], rounds: int
) -> QuantizedWeight:
    weight = checked(weight)
    groups, mask = split_groups(weight, codec.group_size)
    dtype = torch.float16 if fits_half(groups, codec) else torch.float32
    parts = [
        _search_rows(rows, mask, codec, dtype, clips, rounds)
        for rows in groups.split(max(1, CHUNK // weight.shape[1]))
    ]
    codes, scale, offset = (torch.cat(part) for part in zip(*parts, strict=True))
    return assemble(codes, (scale, offset), codec, weight.shape[1], dtype)


def _search_rows(
    groups: Tensor,
    mask: Tensor,
    codec: Codec,
    dtype: torch.dtype,
    clips: tuple[float, ...],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of some rows' groups."""
    importance = mask.float()
    if codec.scheme != "minimum":
        peak = groups.abs().amax(-1, keepdim=True)
        importance = importance * (groups / nonzero(peak)).square()

    def weighted(error: Tensor) -> Tensor:
        return (error.square() * importance).sum(-1, keepdim=True)

    def loss(grid: Grid) -> Tensor:
        return weighted(decode(encode(groups, grid, codec), grid, codec) - groups)

    grid = best_grid(groups, codec, dtype, clips, weighted)
    if rounds and codec.scheme == "minimum":
        refined = half_quadratic(groups, mask, codec, grid, dtype, rounds)
        grid, _ = better(grid, loss(grid), refined, loss(refined))
    return encode(groups, grid, codec).to(torch.uint8), *grid


def half_quadratic(
    groups: Tensor, mask: Tensor, codec: Codec, grid: Grid, dtype: torch.dtype, rounds: int
) -> Grid:
    """The grid of least mean |ŵ-w| met while refining the "minimum" offsets of `grid`."""
    scale, offset = grid
    beta, count = BETA, mask.sum(-1, keepdim=True)
    best, least = grid, torch.full_like(scale, torch.inf)
    for _ in range(rounds):
        codes = encode(groups, (scale, offset), codec)
        error = groups - decode(codes, (scale, offset), codec)
        value = (error.abs() * mask).sum(-1, keepdim=True)
        if not bool((value < least).any()):
            break
        best, least = better(best, least, (scale, offset), value)
        steps = error / nonzero(scale)
        size = steps.abs()
        outlier = steps.sign() * (size - size.pow(POWER - 1) / beta).clamp_min(0) * scale
        residual = (groups - outlier - scale * codes) * mask
        offset = (residual.sum(-1, keepdim=True) / count).to(dtype).float()
        beta *= KAPPA
    return best
