"""GPTQ: quantise column by column and let the columns still open absorb each error.

Law, with H = 2/n sum x xᵀ over calibration inputs, damped to H + damp*mean(diag H)*I = R Rᵀ,
R upper triangular, U = R⁻¹ (so H⁻¹ = Uᵀ U), for columns i in order:

    ŵ_i   <- nearest level to w_i
    w_j   <- w_j - (w_i - ŵ_i) U_ij / U_ii     for the columns j > i

which leaves sum_i ((w_i - ŵ_i) / U_ii)² as the output error tr((ŵ-w) H (ŵ-w)ᵀ). The grid of a
group is chosen when its first column is reached, from weights already compensated: over the range
times p in {1, 0.98, .., 0.3}, the p of least ‖(ŵ-w) R_gg‖². R_gg, the diagonal block of R, is the
inverse of U's, so that no triangular solve is left to do. Scales are rounded to the dtype in which
they are stored before any code is computed.
Source: GPTQ; damping 0.1 and the clip search in the Hessian's metric are MARLIN's. The reverse
Cholesky factor R replaces their Cholesky, inverse, Cholesky.
"""

import torch
from torch import Tensor

from ridgeline.passes.quantization.codec import Codec, QuantizationError, QuantizedWeight
from ridgeline.passes.quantization.grid import (
    Grid,
    assemble,
    best_grid,
    checked,
    decode,
    encode,
    fits_half,
    split_groups,
)

BLOCK = 128
CLIPS = tuple(1 - 0.02 * i for i in range(36))
# Each failed factorisation multiplies the damping by ten, at most so many times.
RETRIES = 3


def gptq(
    weight: Tensor,
    codec: Codec,
    hessian: Tensor,
    *,
    damp: float = 0.1,
    act_order: bool = False,
    clips: tuple[float, ...] = CLIPS,
) -> QuantizedWeight:
    """Quantise `weight` [N,K] against `hessian` [K,K] = 2/n sum x xᵀ.

    damp: share of mean(diag H) added to the diagonal.
    act_order: quantise columns by falling diag H. Groups stay runs of adjacent columns, so the
        storage needs no permutation; their grids are then chosen beforehand, from the original
        weights, by the output error (ŵ-w) H_gg (ŵ-w)ᵀ.
    clips: the shrink factors tried, 1.0 among them.
    Raises QuantizationError where the Hessian is not finite, not [K,K], or not positive
    semi-definite within 1000 times the damping.
    """
    weight = checked(weight)
    hessian = checked_hessian(hessian, weight)
    dtype = _scale_dtype(weight, codec)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        grid = _static_grid(weight, codec, hessian, dtype, clips)
    else:
        order, grid = torch.arange(weight.shape[1], device=weight.device), None
    factor, inverse = factorize(hessian[order][:, order], damp)
    codes, grid = _columns(weight, codec, order, factor, inverse, grid, clips, dtype)
    return assemble(codes, grid, codec, weight.shape[1], dtype)


def factorize(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(R, U) as in the law, fp32 [K,K], computed in fp64.

    A column that calibration never excited has a zero diagonal; damping alone carries it, and its
    weights are rounded to nearest, since nothing is known of what would compensate them.
    """
    if not damp > 0:
        raise QuantizationError(f"damp is {damp!r}; expected a positive share, such as 0.1")
    diagonal = hessian.diagonal().double()
    live = diagonal > 0
    if not bool(live.any()):
        raise QuantizationError(
            "the Hessian has no positive diagonal entry: the layer saw no input other than zero;"
            " calibrate with inputs that reach it, or quantise it without a Hessian"
        )
    mean = diagonal[live].mean()
    reverse = hessian.double().flip(0, 1)
    for attempt in range(RETRIES + 1):
        damped = reverse.clone()
        damped.diagonal().add_(damp * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper = lower.flip(0, 1)
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
            return upper.float(), inverse.float()
    raise QuantizationError(
        f"the Hessian is not positive definite even with {damp * 10**RETRIES:g} times its mean"
        " diagonal added; expected 2/n sum x xᵀ, which is positive semi-definite. Recompute it, or"
        " quantise without a Hessian"
    )


def checked_hessian(hessian: Tensor, weight: Tensor) -> Tensor:
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise QuantizationError(
            f"a weight with K={columns} needs a Hessian [{columns},{columns}],"
            f" found {tuple(hessian.shape)}"
        )
    if not bool(hessian.isfinite().all()):
        raise QuantizationError("the Hessian holds NaN or infinity; look at the calibration inputs")
    return hessian.to(weight.device)


def _columns(
    weight: Tensor,
    codec: Codec,
    order: Tensor,
    factor: Tensor,
    inverse: Tensor,
    grid: Grid | None,
    clips: tuple[float, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Grid]:
    """The loop of the law: codes [N,G,g] and the grid, given or found on the way."""
    rows, columns = weight.shape
    size, count = codec.group_size, codec.groups(columns)
    codes = weight.new_zeros(rows, count * size)
    found = grid or (weight.new_zeros(rows, count, 1), weight.new_zeros(rows, count, 1))
    work, places = weight[:, order], order.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # Inside the block an error reaches the next column at once; beyond it, by one matmul.
        block, errors = work[:, start:stop].clone(), weight.new_zeros(rows, stop - start)
        for i in range(stop - start):
            at, column = start + i, places[start + i]
            group = column // size
            if grid is None and column % size == 0:
                members = block[:, i : i + size].unsqueeze(1)
                chosen = _conditional_grid(members, factor, at, codec, dtype, clips)
                for whole, part in zip(found, chosen, strict=True):
                    whole[:, group] = part[:, 0]
            current = block[:, i : i + 1]
            levels = found[0][:, group], found[1][:, group]
            code = encode(current, levels, codec)
            codes[:, column] = code[:, 0]
            error = (current - decode(code, levels, codec)) / inverse[at, at]
            block[:, i + 1 :] -= error * inverse[at, at + 1 : stop]
            errors[:, i] = error[:, 0]
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    if not bool(found[0].isfinite().all()):
        raise QuantizationError(
            "compensation drove a scale out of fp16's range; raise `damp`, or check that the"
            " Hessian belongs to this weight"
        )
    return codes.view(rows, count, size), found


def _conditional_grid(
    members: Tensor, factor: Tensor, at: int, codec: Codec, dtype: torch.dtype, clips
) -> Grid:
    """The grid of one group [N,1,g], its earlier columns settled and the later ones free."""
    stop = at + members.shape[-1]
    metric = factor[at:stop, at:stop]

    def loss(error: Tensor) -> Tensor:
        return (error @ metric).square().sum(-1, keepdim=True)

    return best_grid(members, codec, dtype, clips, loss)


def _static_grid(
    weight: Tensor, codec: Codec, hessian: Tensor, dtype: torch.dtype, clips: tuple[float, ...]
) -> Grid:
    """The grids of all groups from the original weights, for an order that mixes the groups."""
    groups, mask = split_groups(weight, codec.group_size)
    index = torch.arange(mask.numel(), device=weight.device).clamp_max(weight.shape[1] - 1)
    index = index.view_as(mask)
    blocks = hessian[index.unsqueeze(2), index.unsqueeze(1)]

    def loss(error: Tensor) -> Tensor:
        error = error * mask
        weighted = torch.einsum("ngi,gij->ngj", error, blocks)
        return (weighted * error).sum(-1, keepdim=True)

    return best_grid(groups, codec, dtype, clips, loss)


def _scale_dtype(weight: Tensor, codec: Codec) -> torch.dtype:
    groups, _ = split_groups(weight, codec.group_size)
    return torch.float16 if fits_half(groups, codec) else torch.float32
