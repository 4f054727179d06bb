"""Lookup kernels of binary-coded weights, side by side with 4-bit kernels and torch's linear.

One row of x. Weights are cold, scales included: every function walks through copies of its weight
that together are larger than the last cache. Lookup kernels build their tables in the call. The
baseline is ridgeline's own 4-bit kernel with bf16 products; int4pack is torch's, in bf16. Groups
are of 128 (of 64 where K asks for it), scales fp16. Errors are max |y - y64| / max |y64|, with y64
the float64 product of the weight that the codes stand for.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm import quantized_linear as cpu
from ridgeline.ir.quantized_linear import dequantize, pack_codes
from ridgeline.tools.timing import Timings, interleave

SHAPES = ((11008, 4096), (1536, 576), (576, 1536))
"""(N, K): a layer of a 7B model, and both of a small model's."""

COLD_BYTES = 96 * 2**20
"""What the copies of one weight take together at least: three times a last cache of 32 MiB."""

BASELINE = "ridgeline 4-bit bf16"
BITS = (2, 3, 4)


def _walk(*weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Copy after copy of the tensors that make up one weight."""
    more = max(2, COLD_BYTES // sum(t.nbytes for t in weight))
    copies = [weight, *(tuple(t.clone() for t in weight) for _ in range(more))]
    return itertools.cycle(copies).__next__


class _Contenders:
    """functions, the weight bytes that a call of each reads, and its error."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k, self.group_size = n, k, 128 if k % 128 == 0 else 64
        self.generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, k, generator=self.generator)
        self.functions: dict[str, Callable[[], Tensor]] = {}
        self.bytes_read: dict[str, int] = {}
        self.errors: dict[str, float] = {}

    def add(
        self, name: str, run: Callable[..., Tensor], weight: tuple[Tensor, ...], exact: Tensor
    ) -> None:
        """run: of the tensors of `weight`; exact: the weight that they stand for."""
        expected = self.x.double() @ exact.double().T
        y = run(*weight).double()
        self.errors[name] = ((y - expected).abs().max() / expected.abs().max()).item()
        self.bytes_read[name] = sum(t.nbytes for t in weight)
        copies = _walk(*weight)
        self.functions[name] = lambda: run(*copies())

    def lookup(self, bits: int) -> None:
        """Binary-coded weights of so many planes, fixed-point products."""
        codes = self._codes(bits)
        scale = torch.rand(self.n, self.k // self.group_size, bits, generator=self.generator)
        scale = ((scale + 0.5) * 0.02 * 2.0 ** -torch.arange(bits)).half()
        settings = self._settings(bits) | {"codec": "binary"}
        held = cpu.pack(pack_codes(codes, bits), scale, None, **settings)
        kernel = str(cpu.kernel_spec(held, activation=torch.float32, multiply=torch.int16))
        exact = dequantize(pack_codes(codes, bits), scale, None, **settings)

        def run(codes: Tensor, scale: Tensor) -> Tensor:
            return cpu.OP(self.x, codes, scale, None, None, None, None, kernel)

        self.add(f"ridgeline {bits}-bit lookup", run, (held.codes, held.scale), exact)

    def four_bits(self) -> None:
        """ridgeline's and torch's kernels of the same 4-bit weight, and its fp32 form."""
        codes, x16 = self._codes(4), self.x.bfloat16()
        scale = torch.rand(self.n, self.k // self.group_size, generator=self.generator)
        scale = ((scale + 0.5) * 0.02).half()
        held = cpu.pack(pack_codes(codes, 4), scale, None, **self._settings(4))
        kernel = str(cpu.kernel_spec(held, activation=torch.bfloat16, multiply=torch.bfloat16))
        exact = dequantize(pack_codes(codes, 4), scale, None, **self._settings(4))
        int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        # int4pack's law is scale * (code - 8) + zero, both bf16 [G, N, 2]
        factor = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
        int4mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default

        def ours(codes: Tensor, scale: Tensor) -> Tensor:
            return cpu.OP(x16, codes, scale, None, None, None, None, kernel)

        self.add(BASELINE, ours, (held.codes, held.scale), exact)
        self.add(
            "torch int4pack bf16",
            lambda packed, factor: int4mm(x16, packed, self.group_size, factor),
            (int4, factor),
            exact,
        )
        self.add("torch fp32", lambda weight: F.linear(self.x, weight), (exact,), exact)

    def _codes(self, bits: int) -> Tensor:
        size = (self.n, self.k)
        return torch.randint(0, 2**bits, size, dtype=torch.uint8, generator=self.generator)

    def _settings(self, bits: int) -> dict[str, Any]:
        return {"bits": bits, "group_size": self.group_size, "in_features": self.k}


def rounds(
    n: int, k: int, *, samples: int = 21
) -> tuple[Timings, dict[str, int], dict[str, float]]:
    """Time one row of x [1, k] against weights [n, k] of 2 to 4 bits, cold.

    Returns the timings, and for each contender the weight bytes that a call reads and its error.
    """
    contenders = _Contenders(n, k)
    contenders.four_bits()
    for bits in BITS:
        contenders.lookup(bits)
    timings = interleave(
        contenders.functions, baseline=BASELINE, rounds=samples, seconds_per_sample=0.01
    )
    return timings, contenders.bytes_read, contenders.errors
