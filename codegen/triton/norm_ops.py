"""RMSNorm and LayerNorm on GPUs: `ridgeline::triton_norm`, `triton_add_norm`, and their code.

Law: `norm`, which computes `ridgeline.ir.rms_norm` and `ridgeline.ir.layer_norm`. Implemented for
CUDA (and, under the same dispatch key, ROCm) tensors; any other device raises UnsupportedProblem.
Importing this module registers both and needs no triton; calling or compiling does.
"""

import functools

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import require_triton
from ridgeline.codegen.triton.arch import Arch, architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.ir.op import LIBRARY

MAX_SIZE = 16384
"""Elements of a row that one block holds in registers."""
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_TILE = 2048  # elements of a program where rows are short


@functools.lru_cache(maxsize=1024)
def compile_norm(
    size: int,
    *,
    dtype: torch.dtype,
    arch: str,
    weight: torch.dtype | None = None,
    bias: torch.dtype | None = None,
    residual: bool = False,
    center: bool = False,
    numerator: tuple[int, int] | None = None,
    denominator: tuple[int, int] | None = None,
    form: str = "abs_terms",
    coefficient_dtype: torch.dtype = torch.float32,
) -> Compiled:
    """The kernel for rows of `size` elements on `arch`, for any number of rows; no GPU is needed.

    weight, bias: their dtypes, None where absent. numerator, denominator: shapes of the
    coefficients of the rational function that follows, if one does. Raises UnsupportedProblem,
    UnknownArchitecture, KernelRejected, BackendMissing.
    """
    given = [dtype, coefficient_dtype, *(d for d in (weight, bias) if d is not None)]
    if not 0 < size <= MAX_SIZE or any(d not in _POINTERS for d in given):
        raise UnsupportedProblem(
            f"the Triton norm takes rows of 1 to {MAX_SIZE} elements and dtypes"
            f" {', '.join(map(str, _POINTERS))}; found {size} elements of {given}"
        )
    require_triton()
    from ridgeline.codegen.triton.norm import norm_forward
    from ridgeline.codegen.triton.rational_parts import rational_constants

    rows = _POINTERS[dtype]
    pointers = {
        "x_ptr": rows,
        "residual_ptr": rows,
        "weight_ptr": _POINTERS[weight or dtype],
        "bias_ptr": _POINTERS[bias or dtype],
        "numerator_ptr": _POINTERS[coefficient_dtype],
        "denominator_ptr": _POINTERS[coefficient_dtype],
        "y_ptr": rows,
        "sum_ptr": rows,
    }
    constants = {
        "SIZE": size,
        "RESIDUAL": residual,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "CENTER": center,
        **rational_constants(size, numerator, denominator, form),
    }
    return first_accepted(
        lambda config: cross_compile(
            norm_forward,
            {**pointers, "rows": "i32", "eps": "fp32", "shift": "fp32"},
            constants,
            config,
            arch,
            aligned=pointers,
            matrix=False,
        ),
        candidates(architecture(arch), size),
    )


def candidates(arch: Arch, size: int) -> tuple[Config, ...]:
    """Configurations for rows of `size`, best first: 8 or 16 elements per thread, so that 16-bit
    rows are read 16 bytes at a time; more warps where that spills."""
    block_n = 1 << (size - 1).bit_length()
    block_m = max(1, _TILE // block_n)
    least = max(1, block_m * block_n // (arch.warp_size * 16))
    most = 1024 // arch.warp_size
    warps = dict.fromkeys(min(most, least * factor) for factor in (1, 2, 4))
    return tuple(Config((("BLOCK_M", block_m), ("BLOCK_N", block_n)), w, 1) for w in warps)


def _launch(x, residual, weight, bias, eps: float, shift: float, center: bool):
    arch, _ = device_arch(x.device.index)
    config = compile_norm(
        x.shape[-1],
        dtype=x.dtype,
        arch=arch,
        weight=None if weight is None else weight.dtype,
        bias=None if bias is None else bias.dtype,
        residual=residual is not None,
        center=center,
    ).config
    from ridgeline.codegen.triton.norm import norm

    with torch.cuda.device(x.device):
        return norm(
            x, residual, weight, bias, eps=eps, shift=shift, center=center, **config.launch()
        )


def _norm(x, weight, bias, eps, shift, center):
    return _launch(x, None, weight, bias, eps, shift, center)[0]


def _add_norm(x, residual, weight, bias, eps, shift, center):
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise UnsupportedProblem(
            "triton_add_norm expects a residual of x's shape and dtype, found"
            f" {residual.dtype} {list(residual.shape)} and {x.dtype} {list(x.shape)}"
        )
    return _launch(x, residual, weight, bias, eps, shift, center)


def _elsewhere(x: Tensor, *_arguments):
    raise UnsupportedProblem(
        f"the ridgeline::triton_* operations run on CUDA or ROCm tensors, found {x.device};"
        " use ridgeline::rms_norm or ridgeline::layer_norm there"
    )


_OPTIONS = "Tensor? weight, Tensor? bias, float eps, float shift, bool center"
LIBRARY.define(f"triton_norm(Tensor x, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"triton_add_norm(Tensor x, Tensor residual, {_OPTIONS}) -> (Tensor, Tensor)")
for _name, _run in (("triton_norm", _norm), ("triton_add_norm", _add_norm)):
    LIBRARY.impl(_name, _elsewhere, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _run, "CUDA")


@torch.library.register_fake("ridgeline::triton_norm")
def _fake_norm(x, weight, bias, eps, shift, center):
    return x.new_empty(x.shape)


@torch.library.register_fake("ridgeline::triton_add_norm")
def _fake_add_norm(x, residual, weight, bias, eps, shift, center):
    return x.new_empty(x.shape), x.new_empty(x.shape)
