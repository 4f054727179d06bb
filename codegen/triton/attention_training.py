"""`ridgeline::triton_attention_saved` and its backward: attention on GPUs, for training.

Law: `ridgeline.codegen.saved_attention`; kernels: `attention`, `attention_backward`.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ridgeline.codegen.saved_attention import register, row_dots
from ridgeline.codegen.triton import choose, require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, first_accepted
from ridgeline.codegen.triton.masks import mask_kind, mask_type
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.codegen.triton.problems import attention_kernel, compile_prefill, pointer


@functools.lru_cache(maxsize=1024)
def compile_attention_backward(
    head_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype,
    arch: str,
    causal: bool = False,
    mask: str = "none",
    mask_dtype: torch.dtype | None = None,
    capped: bool = False,
) -> Compiled:
    """The kernel for dk and dv, and as `Compiled.then` that for dq; no GPU is needed.

    mask, mask_dtype, capped: as of `compile_attention`, and it raises the same.
    """
    machine = architecture(arch)
    require_triton()
    from ridgeline.codegen.triton import attention_backward as kernels

    pointers = dict.fromkeys(("stats_ptr", "delta_ptr"), "*fp32")
    pointers |= dict.fromkeys(
        ("grad_ptr", "d_query_ptr", "d_key_ptr", "d_value_ptr"), pointer(dtype)
    )

    def accepted(kernel, keys: bool) -> Compiled:
        own = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}

        def build(config: Config) -> Compiled:
            return attention_kernel(
                kernel, own, config, arch, head_dim, value_dim, dtype, causal, mask,
                mask_type(mask, mask_dtype, dtype), False, capped,
            )  # fmt: skip

        return first_accepted(
            build,
            choose.backward_candidates(
                machine, head_dim=head_dim, value_dim=value_dim, dtype=dtype, keys=keys
            ),
        )

    then = accepted(kernels.attention_backward_queries, False)
    return replace(accepted(kernels.attention_backward_keys, True), then=then)


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
    """(out, in memory [B,Sq,H,Dv], stats) on the GPU that holds the tensors."""
    sinks = None if sinks is None else sinks.contiguous()
    config = compile_prefill(
        device_arch(query.device.index)[0],
        query.shape[-1],
        value.shape[-1],
        query.dtype,
        diagonal is not None,
        mask_kind(mask),
        mask_type(mask_kind(mask), None if mask is None else mask.dtype, query.dtype),
        None if sinks is None else sinks.dtype,
        soft_cap is not None,
    ).config
    from ridgeline.codegen.triton.attention import attention

    options = {"scale": scale, "diagonal": diagonal, "soft_cap": soft_cap}
    with torch.cuda.device(query.device):
        return attention(query, key, value, mask, sinks, **options, **config.launch())


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
    """(dq, dk, dv, delta) on the GPU that holds the tensors; the same numbers every time."""
    arch, _ = device_arch(query.device.index)
    compiled = compile_attention_backward(
        query.shape[-1],
        value.shape[-1],
        dtype=query.dtype,
        arch=arch,
        causal=diagonal is not None,
        mask=mask_kind(mask),
        mask_dtype=None if mask is None else mask.dtype,
        capped=soft_cap is not None,
    )
    assert compiled.then is not None
    from ridgeline.codegen.triton import attention_backward as kernels

    with torch.cuda.device(query.device):
        delta = row_dots(grad, out)
        found = kernels.attention_backward(
            grad.contiguous(), query, key, value, mask, stats, delta,
            scale=scale, diagonal=diagonal, soft_cap=soft_cap,
            keys=compiled.config.launch(), queries=compiled.then.config.launch(),
        )  # fmt: skip
    return *found, delta


OP = register("triton", "CUDA", attention_saved, attention_backward)
