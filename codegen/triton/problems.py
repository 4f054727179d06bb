"""The kernels of the two operations, compiled for an architecture: what a plan can list.

A problem names what the code depends on. Lengths, batch sizes and numbers of splits are runtime
arguments, so that one compiled kernel serves every length.
"""

import functools
from dataclasses import replace

import torch

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import choose, require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.masks import mask_type

_FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_INTEGERS = {torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32"}
_MASKS = {"none": 0, "boolean": 1, "added": 2}
_SCHEMES = {"symmetric": 0, "zero_point": 1, "minimum": 2}
_REDUCE = Config((), num_warps=4, num_stages=2)
REDUCE_BLOCK = 1024


def compile_attention(
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    arch: str,
    causal: bool = False,
    mask: str = "none",
    mask_dtype: torch.dtype | None = None,
    sinks_dtype: torch.dtype | None = None,
    capped: bool = False,
    value_dim: int | None = None,
    multiprocessors: int | None = None,
) -> Compiled:
    """The kernel that computes attention of these shapes on `arch`; no GPU is needed.

    query_shape [B,H,Sq,D], key_shape [B,Hk,Sk,D]; mask "none", "boolean" or "added" (then of
    mask_dtype, default `dtype`); sinks_dtype None: there are none; capped: scores
    pass through a tanh; multiprocessors: of the
    device, default the family's largest.
    Few rows per key head give the decoding kernel, cut along the keys, and its combination.
    Raises UnsupportedProblem, UnknownArchitecture, KernelRejected, BackendMissing.
    """
    batch, heads, query_length, head_dim = query_shape
    key_heads, key_length = key_shape[1:3]
    value_dim = value_dim or head_dim
    if heads % key_heads:
        raise UnsupportedProblem(f"expected H % Hk == 0, found H = {heads}, Hk = {key_heads}")
    if max(head_dim, value_dim) > 256:
        raise UnsupportedProblem(
            "the Triton attention kernels take head dimensions up to 256,"
            f" found {head_dim} and {value_dim}"
        )
    if mask not in _MASKS:
        raise UnsupportedProblem(f"expected a mask of {', '.join(_MASKS)}, found {mask!r}")
    _type_name(dtype)
    read = mask_type(mask, mask_dtype, dtype)
    problem = arch, head_dim, value_dim, dtype, causal, mask, read, sinks_dtype, capped
    if not choose.is_decode(query_length, heads, key_heads):
        return compile_prefill(*problem)
    rows = choose.padded(query_length * (heads // key_heads))
    part = _decode(rows, *problem)
    config = choose.split_decode(
        part.config,
        heads=batch * key_heads,
        key_length=key_length,
        multiprocessors=multiprocessors or architecture(arch).multiprocessors,
    )
    return replace(part, config=config)


def compile_quantized_linear(
    tokens: int,
    n: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    scheme: str,
    dtype: torch.dtype,
    arch: str,
    multiply: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    offset_dtype: torch.dtype | None = None,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
    multiprocessors: int | None = None,
) -> Compiled:
    """The kernel that computes x[tokens,k] ŵ[n,k]ᵀ on `arch`; no GPU is needed.

    bits 4 or 8; scheme "symmetric", "zero_point" or "minimum"; multiply as the operation's;
    scale, offset and bias dtypes default to `dtype` (the zero point to uint8). Small layers are
    cut along k; the sum of the parts follows as `Compiled.then`. Raises as `compile_attention`.
    """
    if bits not in (4, 8) or scheme not in _SCHEMES:
        raise UnsupportedProblem(
            f"expected 4 or 8 bits and a scheme of {', '.join(_SCHEMES)};"
            f" found {bits} bits, scheme {scheme!r}"
        )
    if group_size < k and group_size % 32:
        raise UnsupportedProblem(f"expected a group size divisible by 32, found {group_size}")
    require_triton()
    from ridgeline.codegen.triton.quantized_linear import packing_tile

    scale_dtype = scale_dtype or dtype
    if scheme == "zero_point":
        offset_dtype = offset_dtype or torch.uint8
        if offset_dtype not in _INTEGERS:
            raise UnsupportedProblem(
                f"expected a zero point of {_names(_INTEGERS)}, found {offset_dtype}"
            )
    elif offset_dtype is None:
        offset_dtype = scale_dtype
    tile = packing_tile(group_size, k)
    build = functools.partial(
        _linear,
        arch=arch,
        tokens=next((bound for bound in (16, 32, 64) if tokens <= bound), 128),
        tile=tile,
        bits=bits,
        scheme=scheme,
        dtype=dtype,
        compute=multiply or dtype,
        scale_dtype=scale_dtype,
        offset_dtype=offset_dtype,
        bias_dtype=(bias_dtype or dtype) if bias else None,
        aligned_n=n % 16 == 0,
        aligned_k=k % 16 == 0,
        ragged=k % tile != 0,
    )
    one_pass = build(split=False)
    config = choose.split_linear(
        one_pass.config,
        tokens=tokens,
        n=n,
        tiles=-(-k // tile),
        multiprocessors=multiprocessors or architecture(arch).multiprocessors,
    )
    if config.splits == 1:
        return one_pass
    part = build(split=True)
    return replace(part, config=replace(part.config, splits=config.splits))


@functools.lru_cache(maxsize=1024)
def compile_prefill(
    arch: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    causal: bool,
    mask: str,
    mask_type: torch.dtype,
    sinks_dtype: torch.dtype | None,
    capped: bool,
) -> Compiled:
    """`compile_attention` for many rows, or where a backward needs the statistics."""
    require_triton()
    from ridgeline.codegen.triton.attention import attention_forward

    pointers = {
        "sinks_ptr": pointer(sinks_dtype or dtype),
        "out_ptr": pointer(dtype),
        "stats_ptr": "*fp32",
    }
    candidates = choose.attention_candidates(
        architecture(arch),
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        masked=mask != "none",
    )
    return first_accepted(
        lambda config: attention_kernel(
            attention_forward, pointers, config, arch, head_dim, value_dim, dtype, causal, mask,
            mask_type, sinks_dtype is not None, capped,
        ),
        candidates,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _decode(
    rows: int,
    arch: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    causal: bool,
    mask: str,
    mask_type: torch.dtype,
    sinks_dtype: torch.dtype | None,
    capped: bool,
) -> Compiled:
    require_triton()
    from ridgeline.codegen.triton import attention_decode

    pointers = {"partial_ptr": "*fp32", "peak_ptr": "*fp32", "total_ptr": "*fp32"}
    part = first_accepted(
        lambda config: attention_kernel(
            attention_decode.attention_decode_part, pointers, config, arch, head_dim, value_dim,
            dtype, causal, mask, mask_type, sinks_dtype is not None, capped,
        ),
        choose.decode_candidates(architecture(arch), rows=rows),
    )  # fmt: skip
    combine = attention_decode.attention_decode_combine
    arguments = {
        **pointers,
        "sinks_ptr": pointer(sinks_dtype or torch.float32),
        "out_ptr": pointer(dtype),
        "lse_ptr": "*fp32",
    }
    then = cross_compile(
        combine,
        {**arguments, **dict.fromkeys(("rows", "parts", "heads", "query_length"), "i32")},
        {
            "SINKS": sinks_dtype is not None,
            "DV": value_dim,
            "BLOCK_DV": choose.padded(value_dim),
            "BLOCK_PARTS": choose.MOST_SPLITS,
        },
        _REDUCE,
        arch,
        aligned=arguments,
        matrix=False,
    )
    return replace(part, then=then)


def attention_kernel(
    kernel,
    pointers: dict[str, str],
    config: Config,
    arch: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    causal: bool,
    mask: str,
    mask_type: torch.dtype,
    sinks: bool,
    capped: bool,
) -> Compiled:
    """Any kernel of attention, for tensors whose last dimension is contiguous."""
    block_d, block_dv = choose.padded(head_dim), choose.padded(value_dim)
    constants = {
        "CAUSAL": causal,
        "MASK": _MASKS[mask],
        "SINKS": sinks,
        "CAPPED": capped,
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "UPCAST_DOT": False,
        **dict.fromkeys(("stride_qd", "stride_kd", "stride_vd", "stride_od", "stride_gd"), 1),
    }
    if mask == "none":
        constants |= {f"stride_mask_{axis}": 0 for axis in "bhmn"}
    else:
        constants["stride_mask_n"] = 1
    arguments = {name: "i32" for name in kernel.arg_names if name not in constants}
    for name in config.constexprs():
        del arguments[name]
    arguments |= dict.fromkeys(("scale", "soft_cap"), "fp32")
    arguments |= dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), pointer(dtype))
    arguments |= {"mask_ptr": pointer(mask_type), **pointers}
    aligned = {name for name in arguments if name.endswith("_ptr")}
    # Rows of whole 16-byte pieces: the caller's strides are multiples of the head dimension.
    if head_dim % 16 == 0 and value_dim % 16 == 0:
        aligned |= {name for name in arguments if name.startswith("stride") and "mask" not in name}
    present = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return cross_compile(
        kernel,
        arguments,
        present,
        config,
        arch,
        aligned=aligned,
        matrix=dtype != torch.float32,
        small=config.constexprs()["BLOCK_M"] < 64,
    )


@functools.lru_cache(maxsize=1024)
def _linear(
    *,
    arch: str,
    tokens: int,
    tile: int,
    bits: int,
    scheme: str,
    dtype: torch.dtype,
    compute: torch.dtype,
    scale_dtype: torch.dtype,
    offset_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    aligned_n: bool,
    aligned_k: bool,
    ragged: bool,
    split: bool,
) -> Compiled:
    import triton.language as tl

    from ridgeline.codegen.triton import quantized_linear

    kernel = quantized_linear.quantized_linear_forward
    constants = {
        "BITS": bits,
        "TILE": tile,
        "SCHEME": _SCHEMES[scheme],
        "BIAS": bias_dtype is not None,
        "RAGGED_K": ragged,
        "SPLIT": split,
        "COMPUTE": tl.dtype(_type_name(compute)),
        "UPCAST": False,
        "stride_xk": 1,
    }
    pointers = {
        "x_ptr": pointer(dtype),
        "words_ptr": "*u8",
        "scale_ptr": pointer(scale_dtype),
        "offset_ptr": pointer(offset_dtype),
        "bias_ptr": pointer(bias_dtype or scale_dtype),
        "out_ptr": "*fp32" if split else pointer(dtype),
    }
    aligned = {*pointers, "stride_wn"}
    aligned |= {"out_features"} if aligned_n else set()
    aligned |= {"in_features", "stride_xm"} if aligned_k else set()

    def build(config: Config) -> Compiled:
        absent = {**constants, **config.constexprs(), **pointers}
        integers = {name: "i32" for name in kernel.arg_names if name not in absent}
        return cross_compile(
            kernel,
            {**pointers, **integers},
            constants,
            config,
            arch,
            aligned=aligned,
            matrix=compute != torch.float32,
        )

    part = first_accepted(
        build, choose.linear_candidates(architecture(arch), tokens=tokens, compute=compute)
    )
    if not split:
        return part
    reduce = split_sum(arch, dtype=dtype, bias_dtype=bias_dtype, aligned_n=aligned_n)
    return replace(part, then=reduce)


def split_sum(
    arch: str, *, dtype: torch.dtype, bias_dtype: torch.dtype | None, aligned_n: bool
) -> Compiled:
    """The second pass of a linear layer with split columns; aligned_n: N divides by 16."""
    from ridgeline.codegen.triton.split_sum import quantized_linear_reduce

    return cross_compile(
        quantized_linear_reduce,
        {
            "workspace_ptr": "*fp32",
            "bias_ptr": pointer(bias_dtype or dtype),
            "out_ptr": pointer(dtype),
            **dict.fromkeys(("elements", "out_features", "splits"), "i32"),
        },
        {"BIAS": bias_dtype is not None, "BLOCK": REDUCE_BLOCK},
        _REDUCE,
        arch,
        aligned={"workspace_ptr", "bias_ptr", "out_ptr"}
        | ({"elements", "out_features"} if aligned_n else set()),
        matrix=False,
    )


def _type_name(dtype: torch.dtype) -> str:
    if dtype not in _FLOATS:
        raise UnsupportedProblem(
            f"the Triton kernels take {_names(_FLOATS)}, found {dtype};"
            " keep ridgeline's reference operation for it"
        )
    return _FLOATS[dtype]


def pointer(dtype: torch.dtype) -> str:
    """Triton's type of a pointer to `dtype`; raises UnsupportedProblem."""
    return "*" + (_INTEGERS[dtype] if dtype in _INTEGERS else _type_name(dtype))


def _names(dtypes: dict[torch.dtype, str]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
