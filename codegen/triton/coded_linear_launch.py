"""`ridgeline::triton_coded_linear`: binary-coded and shift layers on GPUs, absent ones included.

Law: `ridgeline::quantized_linear` with codec "binary" or "shift", forward only. `words`, `scale`
and `offset` are held as `coded_storage` says, columns of x come in the order of the stored codes
(a permutation is applied to x in the graph, where it fuses with what made x), and `lift` is
`coded_storage.lift_of` the weight. Implemented for CUDA (and, under the same dispatch key, ROCm)
tensors; any other device raises UnsupportedProblem. Importing this module registers the operation
and needs no triton; calling it does.
"""

import functools
from dataclasses import replace

import torch

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import choose, require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.coded_storage import (
    packing_tile,
    product_dtype,
    product_form,
    shared_run,
)
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.ops import device_arch, elsewhere
from ridgeline.codegen.triton.problems import pointer, split_sum
from ridgeline.ir.op import LIBRARY

CODECS = ("binary", "shift")
_BITS = {"binary": (1, 2, 3, 4), "shift": (4, 5, 6, 8)}
_TERMS = {"binary": (0, 1, 2, 3), "shift": (1, 2)}

LEAST_SHARED_ROWS = 16
"""Rows that must share a narrow group: a block of the kernel lies within one."""


def compile_coded_linear(
    tokens: int,
    n: int,
    k: int,
    *,
    codec: str,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    arch: str,
    terms: int = 1,
    group_rows: int = 1,
    multiply: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    offset_dtype: torch.dtype | None = None,
    row_scale_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    multiprocessors: int | None = None,
) -> Compiled:
    """The kernel that computes x[tokens,k] ŵ[n,k]ᵀ on `arch`; no GPU is needed.

    terms: of a "shift" code, or of "binary" the powers of two per α, 0 where α is floating (of
    scale_dtype, default `dtype`); offset, row_scale and bias are absent where their dtype is None.
    Small layers are cut along k; the sum of the parts follows as `Compiled.then`.
    Raises UnsupportedProblem, UnknownArchitecture, KernelRejected, BackendMissing.
    """
    if codec not in CODECS or bits not in _BITS[codec] or terms not in _TERMS[codec]:
        raise UnsupportedProblem(
            f"expected codec 'binary' with bits of {_BITS['binary']} and up to 3 powers of two, or"
            f" 'shift' with bits of {_BITS['shift']} and 1 or 2 terms; found {codec!r} with"
            f" {bits} bits and {terms} terms"
        )
    run = shared_run(group_size, k)
    if codec == "shift" and (not run or bits % terms):
        raise UnsupportedProblem(
            "expected shift codes in groups of a multiple of 32 columns and bits divisible by"
            f" terms, found groups of {group_size} and {bits} bits of {terms} terms"
        )
    if not run and group_rows < LEAST_SHARED_ROWS:
        raise UnsupportedProblem(
            f"expected groups of a multiple of 32 columns, or ones that {LEAST_SHARED_ROWS} rows or"
            f" more share; found {group_size} columns and {group_rows} rows"
        )
    pointer(multiply or dtype)
    compute = product_dtype(multiply or dtype, codec=codec, bits=bits, terms=terms)
    require_triton()
    build = functools.partial(
        _kernel,
        arch=arch,
        tokens=next((bound for bound in (16, 32, 64) if tokens <= bound), 128),
        tile=packing_tile(k),
        run=run,
        codec=codec,
        bits=bits,
        terms=terms,
        form=product_form(codec, compute, tokens=tokens, run=run),
        dtype=dtype,
        compute=compute,
        scale_dtype=torch.int8 if codec == "binary" and terms else scale_dtype or dtype,
        offset_dtype=offset_dtype,
        row_scale_dtype=row_scale_dtype,
        bias_dtype=bias_dtype,
        own_rows=group_rows == 1,
        own_columns=group_size == 1,
        aligned_n=n % 16 == 0,
        aligned_k=k % 16 == 0,
        ragged=k % packing_tile(k) != 0,
    )
    one_pass = build(split=False)
    config = choose.split_linear(
        one_pass.config,
        tokens=tokens,
        n=n,
        tiles=-(-k // packing_tile(k)),
        multiprocessors=multiprocessors or architecture(arch).multiprocessors,
        least_tiles=512 // packing_tile(k),
    )
    if config.splits == 1:
        return one_pass
    part = build(split=True)
    return replace(part, config=replace(part.config, splits=config.splits))


@functools.lru_cache(maxsize=1024)
def _kernel(
    *,
    arch: str,
    tokens: int,
    tile: int,
    run: int,
    codec: str,
    bits: int,
    terms: int,
    form: int,
    dtype: torch.dtype,
    compute: torch.dtype,
    scale_dtype: torch.dtype,
    offset_dtype: torch.dtype | None,
    row_scale_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    own_rows: bool,
    own_columns: bool,
    aligned_n: bool,
    aligned_k: bool,
    ragged: bool,
    split: bool,
) -> Compiled:
    import triton.language as tl

    from ridgeline.codegen.triton.coded_linear import coded_linear_forward as kernel

    constants = {
        "CODEC": CODECS.index(codec),
        "BITS": bits,
        "TERMS": terms,
        "FORM": form,
        "TILE": tile,
        "RUN": run,
        "OFFSET": offset_dtype is not None,
        "ROW_SCALE": row_scale_dtype is not None,
        "BIAS": bias_dtype is not None,
        "RAGGED_K": ragged,
        "SPLIT": split,
        "COMPUTE": tl.dtype(pointer(compute)[1:]),
        "UPCAST": False,
        "stride_xk": 1,
    }
    # As Triton's launcher does with an argument of 1; `arranged` leaves one stride of 1.
    constants |= {"group_rows": 1} if own_rows else {}
    constants |= {"group_size": 1} if own_columns else {}
    constants |= dict.fromkeys(("stride_sr", "stride_or") if run else ("stride_sg", "stride_og"), 1)
    pointers = {
        "x_ptr": pointer(dtype),
        "words_ptr": "*u8",
        "scale_ptr": pointer(scale_dtype),
        "offset_ptr": pointer(offset_dtype or scale_dtype),
        "row_scale_ptr": pointer(row_scale_dtype or dtype),
        "bias_ptr": pointer(bias_dtype or dtype),
        "out_ptr": "*fp32" if split else pointer(dtype),
    }
    aligned = {*pointers, "stride_row"}
    if aligned_n:
        aligned |= {"out_features"}
        # Rows last: every other stride is a multiple of N.
        aligned |= {"stride_sg", "stride_sp", "stride_st", "stride_og"} if own_rows else set()
    if aligned_k:
        aligned |= {"in_features", "stride_xm"}
        aligned |= {"stride_sr", "stride_sp", "stride_st", "stride_or"} if own_columns else set()

    def build(config: Config) -> Compiled:
        absent = {**constants, **config.constexprs(), **pointers}
        others = {name: "i32" for name in kernel.arg_names if name not in absent}
        others |= dict.fromkeys(("lift", "unlift"), "fp32")
        return cross_compile(
            kernel,
            {**pointers, **others},
            constants,
            config,
            arch,
            aligned=aligned - set(constants),
            matrix=compute != torch.float32,
        )

    part = first_accepted(
        build, choose.linear_candidates(architecture(arch), tokens=tokens, compute=compute)
    )
    if not split:
        return part
    then = split_sum(arch, dtype=dtype, bias_dtype=bias_dtype, aligned_n=aligned_n)
    return replace(part, then=then)


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _launch(
    x, words, scale, offset=None, bias=None, row_scale=None, *, codec, bits, group_size,
    group_rows=1, terms=1, lift=1.0, multiply=None,
):  # fmt: skip
    powers = 0 if scale.is_floating_point() else scale.shape[3]
    arch, multiprocessors = device_arch(x.device.index)
    config = compile_coded_linear(
        x.numel() // x.shape[-1],
        words.shape[2],
        x.shape[-1],
        codec=codec,
        bits=bits,
        group_size=group_size,
        dtype=x.dtype,
        arch=arch,
        terms=powers if codec == "binary" else terms,
        group_rows=group_rows,
        multiply=multiply,
        scale_dtype=scale.dtype,
        offset_dtype=_dtype(offset),
        row_scale_dtype=_dtype(row_scale),
        bias_dtype=_dtype(bias),
        multiprocessors=multiprocessors,
    ).config
    from ridgeline.codegen.triton.coded_linear import coded_linear

    with torch.cuda.device(x.device):
        return coded_linear(
            x, words, scale, offset, bias, row_scale, codec=codec, bits=bits,
            group_size=group_size, group_rows=group_rows, terms=terms, lift=lift,
            multiply=multiply, splits=config.splits, **config.launch(),
        )  # fmt: skip


def _fake(x, words, *_operands, **_settings):
    return x.new_empty((*x.shape[:-1], words.shape[2]))


LIBRARY.define(
    "triton_coded_linear(Tensor x, Tensor words, Tensor scale, Tensor? offset=None,"
    " Tensor? bias=None, Tensor? row_scale=None, *, str codec, int bits, int group_size,"
    " int group_rows=1, int terms=1, float lift=1.0, ScalarType? multiply=None) -> Tensor"
)
LIBRARY.impl("triton_coded_linear", elsewhere, "CompositeExplicitAutograd")
LIBRARY.impl("triton_coded_linear", _launch, "CUDA")
torch.library.register_fake("ridgeline::triton_coded_linear", _fake)
