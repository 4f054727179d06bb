"""RMSNorm and LayerNorm on this CPU: ridgeline's TVM kernels against Inductor's and eager torch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.cost_model import Target
from ridgeline.passes.norms import NORMS
from ridgeline.tools.bench_site import compare
from ridgeline.tools.timing import Timings

SHAPES = ((1, 576), (256, 576), (256, 4096), (4096, 4096))
EPS = 1e-6


class RMSNorm(nn.Module):
    """As Llama spells it, after the residual sum."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype), total


class LayerNorm(nn.LayerNorm):
    """torch's own, after the residual sum."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        total = x + residual
        return F.layer_norm(total, self.normalized_shape, self.weight, self.bias, EPS), total


def cases(rounds: int, target: Target) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of both norms of a residual sum; target: the CPU at hand."""
    for make in (RMSNorm, LayerNorm):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                title = f"residual + {make.__name__}, {list(shape)}, {dtype}"
                yield title, _case(make(shape[-1]).to(dtype).eval(), shape, dtype, rounds, target)


def _case(
    model: nn.Module, shape: tuple[int, int], dtype: torch.dtype, rounds: int, target: Target
) -> Timings:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    return compare(model, inputs, NORMS, rounds, target)
