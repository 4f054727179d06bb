"""Inputs that expose a wrong rewrite, in float64.

Unequal scales, logits of several hundred, tiny values, equal rows, rows that a mask excludes
altogether, and tensors whose memory runs in another order than their dimensions.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError

Shape = tuple[int, ...]


class NoAdversary(RidgelineError):
    """A dtype for which no meaningful inputs can be drawn."""


def adversarial(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Named input sets: float64 for floating dtypes, complex128 for complex ones, bool for bool.
    Raises NoAdversary else."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float, then: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
        return [
            then(_random(shape, dtype, scale, generator))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    yield "normal", draw(1.0)
    yield "logits of several hundred", draw(12.0)
    yield "tiny", draw(1e-3)
    yield "equal rows", draw(1.0, _equal_rows)
    yield "rows fully masked", draw(1.0, _masked_rows)
    yield "memory in reverse order", draw(1.0, _reversed_memory)


def _random(shape: Shape, dtype: torch.dtype, scale: float, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.6
    if dtype.is_complex:
        return scale * torch.randn(shape, generator=generator, dtype=torch.complex128)
    if not dtype.is_floating_point:
        raise NoAdversary(f"no adversarial inputs are known for {dtype}")
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def _equal_rows(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x[..., :1, :].expand(x.shape).clone()


def _masked_rows(x: Tensor) -> Tensor:
    """Every third row of a boolean mask keeps nothing; other tensors stay."""
    if x.dtype == torch.bool and x.dim() >= 2:
        x[..., ::3, :] = False
    return x


def _reversed_memory(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)
