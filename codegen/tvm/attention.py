"""`ridgeline::tvm_attention`: attention on the host CPU, by the kernels of `attention_kernel`.

Law: `ridgeline.ir.attention`. A kernel is compiled per head dimensions, heads per key head, dtype,
kind of mask and instruction set; batch and lengths are runtime values, so decoding with a growing
cache compiles nothing. The output is laid out [B,Sq,H,Dv] in memory and returned as its
[B,H,Sq,Dv] view, so that the transpose which follows attention in every model copies nothing.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa
from ridgeline.ir.op import LIBRARY

_LANES = 16
DECODE_ROWS = 16
"""Up to this many query rows per key head, keys are read where they lie, without transposing."""


@functools.cache
def kernel(
    head_dim: int,
    value_dim: int,
    group: int,
    dtype: str,
    mask: str | None,
    causal: bool,
    isa: str,
    decode: bool,
) -> Callable[..., None]:
    """The compiled kernel: (query, key, value, mask, out, scale, diagonal[, splits])."""
    return compile_kernel(
        _function(head_dim, value_dim, group, dtype, mask, causal, isa, decode), isa
    )


def source(
    head_dim: int,
    value_dim: int,
    *,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
    mask: str | None = None,
    causal: bool = False,
    isa: str | None = None,
    decode: bool = False,
) -> str:
    """The TVMScript text of a kernel, to read or to take away; mask None, "uint8" or "float32"."""
    isa = isa or host_isa()
    name = "bfloat16" if dtype == torch.bfloat16 and isa == "avx512_bf16" else "float32"
    return _function(head_dim, value_dim, group, name, mask, causal, isa, decode).script()


def _function(head_dim, value_dim, group, dtype, mask, causal, isa, decode):
    from ridgeline.codegen.tvm import attention_decode_kernel, attention_kernel

    spec = attention_kernel.Spec(head_dim, value_dim, group, dtype, mask, causal, isa)
    return (attention_decode_kernel if decode else attention_kernel).build(spec)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
) -> Tensor:
    """See `ridgeline.ir.attention.reference`; float32, bfloat16 or float16 tensors on the CPU."""
    batch, heads, length, _ = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((batch, length, heads, value_dim)).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    isa = host_isa()
    pairs = query.dtype == torch.bfloat16 and isa == "avx512_bf16"
    decode = length * (heads // kv_heads) <= DECODE_ROWS
    if not pairs and query.dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    query, key = (_ready(x, _LANES if decode else 2) for x in (query, key))
    value = _ready(value, _LANES)
    exact = value.shape[3] == value_dim and out.dtype == value.dtype
    result = (
        out if exact else value.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    )
    kind, mask = _mask(mask, (batch, heads, length, keys))
    run = kernel(
        query.shape[3],
        value.shape[3],
        heads // kv_heads,
        "bfloat16" if pairs else "float32",
        kind,
        diagonal is not None,
        isa,
        decode,
    )
    words, halves = (torch.int32, torch.int16) if pairs else (torch.float32, torch.float32)
    run(
        query.view(words) if pairs and not decode else _as(query, halves),
        key.view(words) if pairs and not decode else _as(key, halves),
        _as(value, halves),
        mask,
        _as(result, halves),
        scale,
        diagonal or 0,
        *((_splits(batch * kv_heads, keys),) if decode else ()),
    )
    if not exact:
        out.copy_(result[..., :value_dim])
    return out


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)


def _ready(x: Tensor, multiple: int) -> Tensor:
    """Last dimension contiguous and padded to a multiple; bf16 rows on 4-byte boundaries."""
    if x.shape[3] % multiple:
        return F.pad(x, (0, -x.shape[3] % multiple))
    odd = (
        x.element_size() == 2 and (x.storage_offset() | x.stride(0) | x.stride(1) | x.stride(2)) & 1
    )
    return x.contiguous() if x.stride(3) != 1 or odd else x


_NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)


def mask_kind(dtype: torch.dtype) -> str:
    """How the kernels read a mask: "uint8" (boolean) or "float32" (added)."""
    return "uint8" if dtype == torch.bool else "float32"


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[str | None, Tensor]:
    """(kind, mask as [B,H,Sq,Sk] with a contiguous last dimension, other strides maybe 0)."""
    if mask is None:
        return None, _NO_MASK
    kind = mask_kind(mask.dtype)
    wide = mask.view(torch.uint8) if kind == "uint8" else mask.float()
    if wide.shape[-1] != shape[-1] or wide.stride(-1) != 1:
        wide = wide.expand(*wide.shape[:-1], shape[-1]).contiguous()
    return kind, wide.expand(shape)


def _splits(tasks: int, keys: int) -> int:
    """Parts into which a decoding step cuts the keys, so that every thread has equal work."""
    threads = torch.get_num_threads()
    return 1 if tasks % threads == 0 else max(1, min(2 * threads, keys // 128))


def _fake(query, key, value, mask=None, *, scale, diagonal=None):
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)


LIBRARY.define(
    "tvm_attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, *,"
    " float scale, SymInt? diagonal=None) -> Tensor"
)
LIBRARY.impl("tvm_attention", attention, "CPU")
torch.library.register_fake("ridgeline::tvm_attention", _fake)
