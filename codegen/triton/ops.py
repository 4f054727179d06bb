"""The Triton kernels as operations: `ridgeline::triton_attention`, `triton_quantized_linear`.

Laws and schemas are those of `ridgeline::attention` and `ridgeline::quantized_linear`, forward
only; `packed` of the latter is the GPU storage of `quantized_linear.pack` (int32), so that the
canonical uint8 storage cannot be taken for it. Implemented for CUDA (and, under the same dispatch
key, ROCm) tensors; any other device raises UnsupportedProblem. Importing this module registers
both and needs no triton; calling them does.
"""

import functools

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton.masks import mask_kind
from ridgeline.codegen.triton.problems import compile_attention, compile_quantized_linear
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import LIBRARY


@functools.cache
def device_arch(index: int) -> tuple[str, int]:
    """(architecture, multiprocessors) of CUDA or ROCm device `index`: ("sm_90", 132)."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _launch_attention(
    query, key, value, mask=None, sinks=None, *, scale, diagonal=None, soft_cap=None
):
    if not query.dtype == key.dtype == value.dtype:
        raise UnsupportedProblem(
            "triton_attention expects query, key and value of one dtype,"
            f" found {query.dtype}, {key.dtype} and {value.dtype}"
        )
    kind = mask_kind(mask)
    sinks = None if sinks is None else sinks.contiguous()
    arch, multiprocessors = device_arch(query.device.index)
    config = compile_attention(
        tuple(query.shape),
        tuple(key.shape),
        dtype=query.dtype,
        arch=arch,
        causal=diagonal is not None,
        mask=kind,
        mask_dtype=mask.dtype if kind == "added" else None,
        sinks_dtype=None if sinks is None else sinks.dtype,
        capped=soft_cap is not None,
        value_dim=value.shape[-1],
        multiprocessors=multiprocessors,
    )
    from ridgeline.codegen.triton.attention import attention
    from ridgeline.codegen.triton.attention_decode import attention_decode

    with torch.cuda.device(query.device):
        if config.then is None:
            launch = functools.partial(attention, **config.config.launch())
        else:
            launch = functools.partial(
                attention_decode, splits=config.config.splits, **config.config.launch()
            )
        options = {"scale": scale, "diagonal": diagonal, "soft_cap": soft_cap}
        out, _ = launch(query, key, value, mask, sinks, **options)
    # The decoding kernel writes rows in the order of [B,H,Sq], the same memory where Sq is 1.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _launch_quantized_linear(
    x, packed, scale, offset=None, bias=None, *, bits, group_size, multiply=None
):
    if packed.dtype != torch.int32:
        raise UnsupportedProblem(
            "triton_quantized_linear expects the GPU storage (int32) that"
            " ridgeline.codegen.triton.quantized_linear.pack makes of the canonical one,"
            f" found {packed.dtype}"
        )
    scheme = "symmetric"
    if offset is not None:
        scheme = "minimum" if offset.is_floating_point() else "zero_point"
    arch, multiprocessors = device_arch(x.device.index)
    config = compile_quantized_linear(
        x.numel() // x.shape[-1],
        packed.shape[0],
        x.shape[-1],
        bits=bits,
        group_size=group_size,
        scheme=scheme,
        dtype=x.dtype,
        arch=arch,
        multiply=multiply,
        scale_dtype=scale.dtype,
        offset_dtype=None if offset is None else offset.dtype,
        bias=bias is not None,
        bias_dtype=None if bias is None else bias.dtype,
        multiprocessors=multiprocessors,
    ).config
    from ridgeline.codegen.triton.quantized_linear import quantized_linear

    with torch.cuda.device(x.device):
        return quantized_linear(
            x, packed, scale, offset, bias,
            bits=bits, group_size=group_size, multiply=multiply,
            splits=config.splits, **config.launch(),
        )  # fmt: skip


def elsewhere(first: Tensor, *_arguments, **_options):
    """What the operations do on any other device: raise UnsupportedProblem."""
    raise UnsupportedProblem(
        f"the ridgeline::triton_* operations run on CUDA or ROCm tensors, found {first.device};"
        " use ridgeline::attention or ridgeline::quantized_linear there"
    )


def _fake_attention(
    query, key, value, mask=None, sinks=None, *, scale, diagonal=None, soft_cap=None
):
    return heads_side_by_side(query, (*query.shape[:-1], value.shape[-1]))


def _fake_quantized_linear(
    x, packed, scale, offset=None, bias=None, *, bits, group_size, multiply=None
):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


LIBRARY.define(
    "triton_attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None,"
    " Tensor? sinks=None, *, float scale, SymInt? diagonal=None, float? soft_cap=None) -> Tensor"
)
LIBRARY.define(
    "triton_quantized_linear(Tensor x, Tensor packed, Tensor scale, Tensor? offset=None,"
    " Tensor? bias=None, *, int bits, int group_size, ScalarType? multiply=None) -> Tensor"
)
for _name, _launch, _fake in (
    ("triton_attention", _launch_attention, _fake_attention),
    ("triton_quantized_linear", _launch_quantized_linear, _fake_quantized_linear),
):
    LIBRARY.impl(_name, elsewhere, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _launch, "CUDA")
    torch.library.register_fake(f"ridgeline::{_name}", _fake)
