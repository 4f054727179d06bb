"""The CPU kernel of the quantised linear layer, side by side with torch's own layers.

Weights are cold, scales included: every function walks through `COPIES` copies of its weight,
together larger than the last cache. The baselines are torch's linear in fp32 and bf16 and its 4-bit
`_weight_int4pack_mm_for_cpu` in bf16 (its fp32 form is a slow fallback and no opponent). Outputs
are allocated by the call on every side.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm import quantized_linear as cpu
from ridgeline.cost_model import Gemm, Work, load_target
from ridgeline.ir.quantized_linear import dequantize, pack_codes
from ridgeline.tools.predicted import log_timings
from ridgeline.tools.timing import Timings, interleave

COPIES = 3
KERNEL = "ridgeline 4-bit bf16"


def _walk(*weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Copy after copy of the tensors that make up one weight."""
    copies = [weight, *(tuple(t.clone() for t in weight) for _ in range(COPIES - 1))]
    return itertools.cycle(copies).__next__


def rounds(
    m: int, n: int = 11008, k: int = 4096, *, group_size: int = 128, samples: int = 21
) -> tuple[Timings, dict[str, int]]:
    """Time x [m, k] in bf16 against a symmetric 4-bit weight [n, k], cold.

    Returns the timings (baseline "torch int4pack bf16") and the weight bytes that one call reads.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale = ((torch.rand(n, k // group_size, generator=generator) + 0.5) * 0.02).half()
    x = torch.randn(m, k, generator=generator)
    x16 = x.bfloat16()

    settings = {"bits": 4, "group_size": group_size, "in_features": k}
    weight = cpu.pack(pack_codes(codes, 4), scale, None, **settings)
    fp32 = dequantize(pack_codes(codes, 4), scale, None, **settings)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    # int4pack's law is scale * (code - 8) + zero, both bf16 [G, N, 2]
    factor = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    bytes_read = {
        KERNEL: weight.codes.nbytes + weight.scale.nbytes,
        "torch int4pack bf16": int4.nbytes + factor.nbytes,
        "torch bf16": fp32.nbytes // 2,
        "torch fp32": fp32.nbytes,
    }
    ours, theirs = _walk(weight.codes, weight.scale), _walk(int4, factor)
    w16, w32 = _walk(fp32.bfloat16()), _walk(fp32)
    int4mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def int4pack(x: Tensor, packed: Tensor, factor: Tensor) -> Tensor:
        return int4mm(x, packed, group_size, factor)

    kernel = str(cpu.kernel_spec(weight, activation=torch.bfloat16, multiply=torch.bfloat16))
    functions = {
        "torch int4pack bf16": lambda: int4pack(x16, *theirs()),
        "torch bf16": lambda: F.linear(x16, *w16()),
        "torch fp32": lambda: F.linear(x, *w32()),
        KERNEL: lambda: cpu.OP(x16, *ours(), None, None, None, None, kernel),
    }
    timings = interleave(
        functions, baseline="torch int4pack bf16", rounds=samples, seconds_per_sample=0.01
    )
    bf16 = torch.bfloat16
    plain = {"torch bf16": bf16, "torch fp32": torch.float32}
    works = {name: Work((Gemm(m, n, k, dtype=dtype),)) for name, dtype in plain.items()}
    ours_work = Gemm(m, n, k, dtype=bf16, weight_bits=4, group_size=group_size)
    works[KERNEL] = Work((ours_work,))
    for name, work in works.items():  # each walks through copies of its own
        title, cold = f"linear {m} x {k} -> {n}, cold", COPIES * bytes_read[name]
        log_timings(title, timings, {name: work}, load_target("cpu"), cold)
    return timings, bytes_read
