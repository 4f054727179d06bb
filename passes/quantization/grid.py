"""The levels of a group: from a range to (scale, offset), from weights to codes and back.

Shapes: groups [N,G,g]; lo, hi, scale, offset [N,G,1]; all fp32, with scale and offset already
rounded to the dtype in which they are stored, so that codes answer to the stored values.
A grid is a pair (scale, offset); a symmetric grid's offset is the constant 2**(bits-1).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ridgeline.ir.quantized_linear import pack_codes
from ridgeline.passes.quantization.codec import Codec, QuantizationError, QuantizedWeight

Grid = tuple[Tensor, Tensor]

# Beyond this a difference of two weights could leave fp32.
LARGEST = 2.0**120
# An eighth of fp16's range: GPTQ's compensation may enlarge a group after the dtype is chosen.
LARGEST_HALF_SCALE = 8192.0


def checked(weight: Tensor) -> Tensor:
    """`weight` [N,K] as fp32, detached; an error where it is not a finite matrix."""
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise QuantizationError(
            f"expected a floating-point weight [N,K] with N,K > 0,"
            f" found {weight.dtype} {tuple(weight.shape)}"
        )
    weight = weight.detach().float()
    bad = ~(weight.abs() < LARGEST)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise QuantizationError(
            f"{int(bad.sum())} of {weight.numel()} weights are NaN, infinite or above 2**120, the"
            f" first at [{row},{column}]; leave this layer unquantised or repair the checkpoint"
        )
    return weight


def split_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[N,K] -> groups [N,G,g] and a mask [G,g] that is False where a short last group was filled.

    The filling repeats the row's last weight: minimum, maximum and peak stay what they were.
    """
    rows, columns = weight.shape
    count = -(-columns // group_size)
    index = torch.arange(count * group_size, device=weight.device)
    filled = weight[:, index.clamp_max(columns - 1)]
    return filled.view(rows, count, group_size), (index < columns).view(count, group_size)


def candidates(groups: Tensor, codec: Codec, dtype: torch.dtype, shrink: float) -> Iterator[Grid]:
    """The grids whose range is each group's own range times `shrink`.

    "symmetric" has two: the peak on the outermost level that both signs have (GGUF's Q8_0), and
    the peak on the one level that only one sign has, scale signed to suit (GGUF's Q4_0).
    """

    def stored(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    lo, hi = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if codec.scheme == "symmetric":
        peak = torch.where(hi >= -lo, hi, lo) * shrink
        middle = torch.full_like(peak, codec.middle)
        yield stored(peak.abs() / (codec.middle - 1)), middle
        yield stored(-peak / codec.middle), middle
    elif codec.scheme == "zero_point":
        lo, hi = lo.clamp_max(0) * shrink, hi.clamp_min(0) * shrink
        scale = stored((hi - lo) / codec.top)
        zero = (-lo / nonzero(scale)).round_().clamp_(0, codec.top)
        yield scale, zero
    else:
        margin = (hi - lo) * ((1 - shrink) / 2)
        yield stored((hi - lo - 2 * margin) / codec.top), stored(lo + margin)


def nonzero(scale: Tensor) -> Tensor:
    """A divisor for groups whose scale is 0 (all weights zero, or all equal under "minimum")."""
    return torch.where(scale == 0, 1.0, scale)


def encode(groups: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """The nearest codes, as fp32 integers of 0..2**bits-1."""
    scale, offset = grid
    if codec.scheme == "minimum":
        position = (groups - offset) / nonzero(scale)
    else:
        position = groups / nonzero(scale) + offset
    return position.round_().clamp_(0, codec.top)


def decode(codes: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """ŵ, by the same operations in the same order as the law's reference."""
    scale, offset = grid
    if codec.scheme == "minimum":
        return scale * codes + offset
    return scale * (codes - offset)


def best_grid(
    groups: Tensor,
    codec: Codec,
    dtype: torch.dtype,
    shrinks: Iterable[float],
    loss: Callable[[Tensor], Tensor],
) -> Grid:
    """Per group, the candidate of least loss; the earlier one on a tie.

    loss: error ŵ-w [N,G,g] -> [N,G,1].
    """
    best: Grid | None = None
    least = torch.empty(0)
    for shrink in shrinks:
        for grid in candidates(groups, codec, dtype, shrink):
            value = loss(decode(encode(groups, grid, codec), grid, codec) - groups)
            best, least = (grid, value) if best is None else better(best, least, grid, value)
    assert best is not None, "shrinks is never empty"
    return best


def better(best: Grid, least: Tensor, grid: Grid, value: Tensor) -> tuple[Grid, Tensor]:
    """Per group, `grid` where its loss is strictly less, else `best`; and the lesser loss."""
    wins = value < least
    chosen = tuple(torch.where(wins, new, old) for new, old in zip(grid, best, strict=True))
    return (chosen[0], chosen[1]), torch.where(wins, value, least)


def fits_half(groups: Tensor, codec: Codec) -> bool:
    """Whether fp16 can hold this weight's scales and minima; the rule stands in `codec`."""
    scale, offset = next(candidates(groups, codec, torch.float32, 1.0))
    error = (scale.half().float() - scale).abs()
    if bool(((scale > LARGEST_HALF_SCALE) | (error > 2.0**-11 * scale)).any()):
        return False
    if codec.scheme != "minimum":
        return True
    allowed = torch.where(scale == 0, 2.0**-11 * offset.abs(), scale / 16)
    return not bool(((offset.half().float() - offset).abs() > allowed).any())


def assemble(
    codes: Tensor, grid: Grid, codec: Codec, in_features: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Codes [N,G,g] and their grid, packed for storage with scales of `dtype`."""
    flat = codes.to(torch.uint8).flatten(1)[:, :in_features]
    scale, offset = (x.squeeze(-1) for x in grid)
    kept = {
        "symmetric": None,
        "zero_point": offset.to(torch.uint8),
        "minimum": offset.to(dtype),
    }[codec.scheme]
    return QuantizedWeight(
        packed=pack_codes(flat, codec.bits).contiguous(),
        scale=scale.to(dtype),
        offset=kept,
        bits=codec.bits,
        group_size=codec.group_size,
        in_features=in_features,
    )
