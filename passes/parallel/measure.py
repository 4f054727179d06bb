"""What the rewrite is worth on this group: both forms of one site, timed on all ranks.

The transport decides, and no data sheet says what gloo does on a machine: small messages pay one
latency more than an all-reduce, large ones get the norm for 1 / W. So both forms run in turn, on
zeros-free data of the graph's sizes, and the slowest rank's median counts.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.token_rows import rows_reference, sum_reference, wide
from ridgeline.passes.parallel.agree import Ranks

functional = torch.ops._c10d_functional
EPS = 1e-6
ROUNDS = 5
"""Rounds of both forms, after one that is not counted."""
WIN = 0.9
"""The part of the time as it is that a shard must stay below: less cannot be told from noise."""


def seconds_of_forms(
    ranks: Ranks, tokens: int, size: int, dtype: torch.dtype, device: torch.device, by_parts: bool
) -> tuple[float, float]:
    """(all-reduce, add and norm of all rows; scattered, on a shard, and gathered), in seconds.

    tokens, size: of the residual; by_parts: the reduce-scatter is an all-to-all and a local sum.
    """
    generator = torch.Generator().manual_seed(0)
    rows = -(-tokens // ranks.world)
    partial = torch.randn(tokens, size, generator=generator).to(device, dtype)
    weight = torch.ones(size, device=device, dtype=dtype)
    residual = partial.flip(0)
    stream = rows_reference(residual, 0, rows).to(wide(dtype))
    group, world = ranks.name, ranks.world

    def whole() -> Tensor:
        y = functional.wait_tensor(functional.all_reduce(partial, "sum", group))
        return F.rms_norm(residual + y, (size,), weight, EPS)

    def sharded() -> Tensor:
        padded = rows_reference(partial, 0, rows * world)
        if by_parts:
            counts = [rows] * world
            sent = functional.all_to_all_single(padded, counts, counts, group)
            y = sum_reference(functional.wait_tensor(sent), world)
        else:
            sent = functional.reduce_scatter_tensor(padded, "sum", world, group)
            y = functional.wait_tensor(sent).to(stream.dtype)
        y = F.rms_norm(stream + y, (size,), weight.to(stream.dtype), EPS).to(dtype)
        return functional.wait_tensor(functional.all_gather_into_tensor(y, world, group))[:tokens]

    taken: dict[Callable[[], Tensor], list[float]] = {whole: [], sharded: []}
    for _ in range(ROUNDS + 1):
        for form, times in taken.items():
            ranks.largest([0.0])  # a barrier
            start = time.perf_counter()
            form()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    a, b = ranks.largest([statistics.median(times[1:]) for times in taken.values()])
    return a, b
