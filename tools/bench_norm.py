"""RMSNorm and LayerNorm on this CPU: ridgeline's TVM kernels against Inductor's and eager torch.

Both compiled forms are graphs of one site, lowered and called in the same way and allocating their
results at each call, so that what differs is the kernel and how it is called.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.codegen.inductor import compile_graph
from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Setting
from ridgeline.passes.norms import NORMS
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore
from ridgeline.tools.timing import Timings, interleave

BASELINE = "inductor"
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
    program = capture(model, inputs).program
    module = normalize(program.module)
    inductor = compile_graph(module, program.inputs, dynamic=False)
    setting = Setting(target, False, 0.0, _unobserved, WeightStore())
    candidates, _ = propose((NORMS,), module, setting)
    ours = lower(apply(module, candidates[:1]), program.inputs, target, "inductor", False).run

    def calls(run: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: run(*inputs)

    functions = {"eager": calls(model), BASELINE: calls(inductor), "ridgeline": calls(ours)}
    return interleave(functions, baseline=BASELINE, rounds=rounds)


def _unobserved(node: Any) -> Tensor:
    raise AssertionError(f"{node}: a norm is rewritten without looking at values")
