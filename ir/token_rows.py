"""Rows of tokens on their way to the ranks and back, as operations.

    token_rows    y[i] = x[start + i], 0 beyond x's last row         x [T, N] -> [rows, N]
    sum_parts     y[i] = sum_w parts[w n + i]                        parts [W n, N] -> [n, N]

`sum_parts` adds what W ranks have sent for the same n rows. It computes in fp32 (fp64 for fp64
inputs) and gives that: a chain of W - 1 sums in a narrow dtype rounds W - 1 times.
"""

import torch
from torch import Tensor

from ridgeline.ir.op import Op


def rows_reference(x: Tensor, start: int, rows: int) -> Tensor:
    """Rows [start, start + rows) of x [T, N], in memory of their own."""
    held = x[min(start, x.shape[0]) : start + rows]
    y = x.new_zeros(rows, x.shape[1]) if held.shape[0] < rows else x.new_empty(rows, x.shape[1])
    y[: held.shape[0]] = held
    return y


def sum_reference(parts: Tensor, world: int) -> Tensor:
    """parts [W n, N] -> [n, N], fp32 or wider."""
    return parts.view(world, -1, parts.shape[-1]).sum(0, dtype=wide(parts.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of that dtype are held in."""
    return torch.promote_types(dtype, torch.float32)


TOKEN_ROWS = Op(
    schema="token_rows(Tensor x, SymInt start, SymInt rows) -> Tensor",
    reference=rows_reference,
    fake=lambda x, start, rows: x.new_empty(rows, x.shape[1]),
)
SUM_PARTS = Op(
    schema="sum_parts(Tensor parts, int world) -> Tensor",
    reference=sum_reference,
    fake=lambda parts, world: parts.new_empty(
        parts.shape[0] // world, parts.shape[1], dtype=wide(parts.dtype)
    ),
)
