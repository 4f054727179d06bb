"""SwiGLU's gate and rotary embeddings on this CPU, as Llama of transformers spells them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.codegen.tvm.rotary import rotary
from ridgeline.cost_model import Target
from ridgeline.passes.gated import GATED
from ridgeline.tools.bench_site import compare
from ridgeline.tools.timing import Timings

GATES = ((1, 1536), (64, 11008), (2048, 5632))
"""[rows, features]"""
ROTATIONS = ((32, 32, 1, 64), (32, 8, 256, 128), (32, 32, 2048, 64))
"""(query heads, key heads, positions, features of a head)"""
DTYPES = (torch.float32, torch.bfloat16)


class Gate(nn.Module):
    """silu(gate) * up, both [rows, features]."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Rotate(nn.Module):
    """Queries and keys [1, heads, positions, features], in memory as projections leave them, turned
    by cos and sin [1, positions, features]."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def _half(x: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), dim=-1)


def _kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    turned = rotary(q, k, cos, sin, interleaved=False).transpose(1, 2)
    return turned.split((q.shape[1], k.shape[1]), 1)


def gates(rounds: int, target: Target) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of each size; target: the CPU at hand."""
    for dtype in DTYPES:
        for shape in GATES:
            inputs = _drawn(dtype, shape, shape)
            title = f"silu(gate) * up, {list(shape)}, {dtype}"
            yield title, compare(Gate(), inputs, GATED, rounds, target)


def rotations(rounds: int, target: Target) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of each size; target: the CPU at hand."""
    for dtype in DTYPES:
        for q, k, positions, features in ROTATIONS:
            heads = [(1, positions, heads, features) for heads in (q, k)]
            queries, keys, *angles = _drawn(dtype, *heads, *[(1, positions, features)] * 2)
            inputs = [queries.transpose(1, 2), keys.transpose(1, 2), *angles]
            title = f"rotary, {q} and {k} heads of {features}, {positions} positions, {dtype}"
            yield title, compare(Rotate(), inputs, _kernel, rounds, target)


def _drawn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
