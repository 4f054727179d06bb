"""`ridgeline::tvm_attention_saved` and its backward: attention on the host CPU, for training.

Law: `ridgeline.codegen.saved_attention`; kernels: `attention_kernel`, `attention_backward_kernel`.
fp16 operands are widened for the backward, and bf16 ones where that is no slower (`read_as`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.saved_attention import fake_saved, register, row_dots
from ridgeline.codegen.tvm.attention import (
    ABSENT,
    DTYPES,
    MASKS,
    PARALLEL_WORK,
    attention_out,
    expanded,
)
from ridgeline.codegen.tvm.isa import quick_bf16
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm, last_contiguous

LANES, KEYS = 16, 64
"""Lanes of a vector and keys of a tile, as the kernel has them."""


@functools.cache
def kernel(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    capped: bool,
    parallel: bool,
) -> Callable[..., None]:
    """The compiled backward for operands of `read_as(dtype)`; its module says what it takes."""
    kinds = dtype, mask, capped, parallel
    return compile_kernel(_prim_func(head_dim, value_dim, *kinds), host_isa())


def read_as(dtype: torch.dtype) -> torch.dtype:
    """bf16 where the CPU multiplies it faster than fp32; anything else is widened."""
    narrow = dtype == torch.bfloat16 and quick_bf16()
    return torch.bfloat16 if narrow else torch.float32


def source(
    head_dim: int, value_dim: int, *, dtype: torch.dtype, mask: torch.dtype | None, capped: bool
) -> str:
    """The TVMScript text of the backward for tensors of `dtype`, head dimensions multiples of 8.
    Raises UnsupportedProblem."""
    if dtype not in DTYPES or mask not in MASKS:
        raise UnsupportedProblem(
            f"expected dtype in {list(DTYPES)} and mask in {list(MASKS)}, found {dtype}, {mask}"
        )
    return _prim_func(head_dim, value_dim, dtype, mask, capped, True).script()


def _prim_func(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    capped: bool,
    parallel: bool,
) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm.attention_backward_kernel import build
    from ridgeline.codegen.tvm.attention_vectors import Spec

    kinds = DTYPES[read_as(dtype)], MASKS[mask], None, capped
    return build(Spec(head_dim, value_dim, *kinds, host_isa(), parallel))


def attention_saved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out as `tvm.attention.attention` gives it, stats). Raises UnsupportedProblem."""
    out, stats = fake_saved(query, key, value)
    options = {"scale": scale, "diagonal": diagonal, "soft_cap": soft_cap}
    attention_out(query, key, value, mask, sinks, **options, out=out, stats=stats)
    return out, stats


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    stats: Tensor,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta fp32 [B,H,Sq]) for grad [B,H,Sq,Dv] of `attention_saved`'s first output.

    The same numbers every time for one number of threads.
    """
    batch, heads, queries, head_dim = query.shape
    _, key_heads, length, value_dim = value.shape
    if not (query.numel() and key.numel() and value.numel()):
        return *(torch.zeros_like(x) for x in (query, key, value)), row_dots(grad, out)
    wide_dim, wide_value = (d + -d % 8 for d in (head_dim, value_dim))
    entries, mask_dtype = ABSENT, None
    if mask is not None:
        entries, mask_dtype = expanded(mask, (batch, heads, queries, length))
    threads = torch.get_num_threads()
    work = batch * heads * queries * length * (head_dim + value_dim)
    parallel = threads > 1 and work >= PARALLEL_WORK
    units = threads if parallel else 1
    chunks = _chunks(batch * key_heads, -(-length // KEYS), units)
    delta = stats.new_empty(chunks, batch, heads, queries)
    dq = stats.new_empty(chunks, batch, heads, queries, wide_dim + -wide_dim % LANES)
    read = {"dtype": read_as(query.dtype)}
    dk = stats.new_empty(batch, key_heads, length, wide_dim, **read)
    dv = stats.new_empty(batch, key_heads, length, wide_value, **read)
    kinds = query.dtype, mask_dtype, soft_cap is not None, parallel
    kernel(wide_dim, wide_value, *kinds)(
        _operand(query, wide_dim),
        _operand(key, wide_dim),
        _operand(value, wide_value),
        entries,
        _operand(grad.to(query.dtype), wide_value),
        _operand(out, wide_value),
        stats,
        delta,
        dq,
        dk,
        dv,
        scale if soft_cap is None else scale / soft_cap,
        length if diagonal is None else max(-queries, min(diagonal, length)),
        soft_cap or 0.0,
        units,
    )
    dq = dq[0] if chunks == 1 else dq.sum(0)
    return (
        dq[..., :head_dim].to(query.dtype).contiguous(),
        dk[..., :head_dim].to(key.dtype).contiguous(),
        dv[..., :value_dim].to(value.dtype).contiguous(),
        delta[0],
    )


def _operand(x: Tensor, width: int) -> Tensor:
    """x as the kernel reads it, of that width, last dimension contiguous."""
    x = x.to(read_as(x.dtype))
    x = F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x
    return last_contiguous(x)


def _chunks(items: int, tiles: int, threads: int) -> int:
    """Slices of dq, by which one key head's tiles are shared out: few heads leave threads idle."""
    even = items % threads == 0 or items >= 4 * threads
    return 1 if even else min(tiles, threads)


def _unit(mask: Tensor | None) -> float:
    """That of the statistics: scores are in units of log(2) but beside an additive mask."""
    return 1.0 if mask is not None and mask.is_floating_point() else math.log(2)


OP = register("tvm", "CPU", attention_saved, attention_backward, _unit)
