"""The micro-benchmarks of `ridgeline calibrate`: one operation each, as a plan runs it on this CPU.

A case is a module of one `ridgeline::` operation (or torch's own linear layer, which 4 bits compete
with). It is captured, its kernel is put in place, and what the cost model counts for its graph is
the work that is predicted. Weights stay in the caches from call to call, as their sizes allow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Target, Work, work_of_graph
from ridgeline.cost_model.pointwise import gated_work, rotary_work
from ridgeline.ir.capture import capture
from ridgeline.passes.quantization import Codec, QuantizedWeight
from ridgeline.passes.quantization.layer import QuantizedLinear

MOST = 64
"""Cases at most."""
TORCH = "torch"
"""How the names of cases begin whose kernel is not ridgeline's."""
BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Case:
    """name: operation and shape. build: (function to time, its work)."""

    name: str
    build: Callable[[Target], tuple[Callable[[], object], Work]]


class _Call(nn.Module):
    """One operation with constants."""

    def __init__(self, function: Callable[..., Any], **constants: Any) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands, **self.constants)


def cases() -> Iterator[Case]:
    """All of them, fewer than MOST."""
    shapes = [(1, 576, 576), (1, 4096, 4096), (8, 1536, 576), (16, 2048, 2048), (64, 4096, 1024),
              (256, 1536, 576)]  # fmt: skip
    for dtype in (BF16, FP32):
        for m, n, k in shapes:
            yield _linear(m, n, k, dtype)
        # The products of 4-bit weights are formed in bf16 either way.
        for m, n, k in shapes if dtype == BF16 else shapes[:1]:
            yield _coded(m, n, k, dtype)
        for length in (16, 64, 256, 512, 1024):
            yield _attention(length, length, dtype)
        for length in (64, 256, 1024, 4096, 8192):
            yield _attention(1, length, dtype)
        for rows, size in ((1, 576), (64, 576), (64, 2048), (256, 4096)):
            yield _norm(rows, size, dtype)
        for rows, size in ((1, 1536), (64, 1536), (64, 11008)):
            yield _gate(rows, size, dtype)
        for positions in (1, 64, 512):
            yield _rotary(positions, dtype)
        for rows in (64, 4096):
            yield _rational(rows, dtype)


def nothing() -> Case:
    """An operation on one element, called as the others are."""
    return _case("one element", _Call(torch.neg), _drawn(FP32, (1,)))


def _drawn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _case(
    name: str,
    model: nn.Module,
    operands: list[Tensor],
    work: Callable[[Target], Work] | None = None,
) -> Case:
    def build(target: Target) -> tuple[Callable[[], object], Work]:
        with torch.no_grad():
            program = capture(model.eval(), operands, dynamic=False).program
        counted = work_of_graph(program.module.graph) if work is None else work(target)
        run = lower(program.module, program.inputs, target, "eager", False).run
        return (lambda: run(*operands)), counted

    return Case(f"{name}, {str(operands[0].dtype).removeprefix('torch.')}", build)


def _linear(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    x, weight = _drawn(dtype, (m, k), (n, k))
    return _case(f"{TORCH} linear {m} x {k} -> {n}", _Call(lambda x: F.linear(x, weight)), [x])


def _coded(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    codec = Codec(4, 32, "minimum")
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale, offset = (0.01 * torch.rand(n, codec.groups(k), generator=generator) for _ in range(2))
    weight = QuantizedWeight(packed, scale.half(), offset.half(), 4, 32, k)
    layer = QuantizedLinear(weight, None, None if dtype == BF16 else BF16)
    return _case(f"4-bit linear {m} x {k} -> {n}", layer, _drawn(dtype, (m, k)))


def _attention(q: int, kv: int, dtype: torch.dtype) -> Case:
    heads, size = (9, 3), 64
    operands = _drawn(dtype, (1, heads[0], q, size), *[(1, heads[1], kv, size)] * 2)
    constants = {"scale": size**-0.5, "diagonal": kv - q}
    name = "attention, decode" if q == 1 else "attention, causal"
    return _case(f"{name}, {kv} keys", _Call(torch.ops.ridgeline.attention, **constants), operands)


def _norm(rows: int, size: int, dtype: torch.dtype) -> Case:
    operands = _drawn(dtype, (rows, size), (rows, size), (size,))
    model = _Call(torch.ops.ridgeline.add_rms_norm, eps=EPS)
    return _case(f"RMSNorm of a sum {rows} x {size}", model, operands)


def _gate(rows: int, size: int, dtype: torch.dtype) -> Case:
    model = _Call(torch.ops.ridgeline.gated_activation, activation="silu")

    def work(target: Target) -> Work:
        return gated_work(rows * size, dtype, "silu", kind=target.kind, ours=True)

    return _case(f"gate {rows} x {size}", model, _drawn(dtype, *[(rows, size)] * 2), work)


def _rotary(positions: int, dtype: torch.dtype) -> Case:
    shapes = [(1, heads, positions, 64) for heads in (9, 3)]
    operands = _drawn(dtype, *shapes, *[(1, positions, 64)] * 2)
    model = _Call(torch.ops.ridgeline.rotary, interleaved=False)

    def work(target: Target) -> Work:
        sizes = [x.numel() for x in operands[:2]]
        angles = sum(x.nbytes for x in operands[2:])
        return rotary_work(sizes, angles, dtype, kind=target.kind, ours=True)

    return _case(f"rotary of {positions} positions", model, operands, work)


def _rational(rows: int, dtype: torch.dtype) -> Case:
    x, numerator, denominator = _drawn(dtype, (rows, 768), (8, 6), (8, 4))
    model = _Call(torch.ops.ridgeline.group_rational)
    return _case(f"group-rational {rows} x 768", model, [x, numerator, denominator])
