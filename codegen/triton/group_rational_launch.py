"""`ridgeline::group_rational` and its backward on GPUs, and compiled for absent ones.

Law and operands: `ridgeline.ir.group_rational`. The kernels are registered for the operation
itself, under torch's CUDA key (which ROCm shares), as autograd calls the backward of the operation
alone. fp64 operands, and everything where Triton is not installed (said once as a warning), run by
the reference.
"""

import functools
import logging
from dataclasses import replace

import torch
from torch import Tensor

from ridgeline.codegen.errors import BackendMissing, UnsupportedProblem
from ridgeline.codegen.triton import require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.ir.group_rational import (
    FORMS,
    backward_reference,
    check_attributes,
    group_count,
    reference,
)
from ridgeline.ir.op import LIBRARY

_LOG = logging.getLogger(__name__)

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_ELEMENTS = (8, 4, 2, 1)
"""Elements of a tile per thread, from most to least; the first that spills nothing is taken."""
_WARPS = 4


def block_columns(width: int, dtype: torch.dtype) -> int:
    """Columns of a tile: a power of two that divides the group's width and makes 16-byte loads.

    Where there is none, one that covers the group (or a part of 64) with some lanes idle.
    """
    whole = min(64, width & -width)
    if whole * dtype.itemsize >= 16:
        return whole
    return min(64, 1 << (width - 1).bit_length())


def _candidates(width: int, dtype: torch.dtype, arch: str) -> tuple[Config, ...]:
    columns, threads = block_columns(width, dtype), _WARPS * architecture(arch).warp_size
    return tuple(
        Config((("BLOCK_M", threads * own // columns), ("BLOCK_C", columns)), _WARPS, 1)
        for own in _ELEMENTS
    )


@functools.lru_cache(maxsize=1024)
def compile_group_rational(
    width: int,
    *,
    groups: int,
    m: int,
    n: int,
    dtype: torch.dtype,
    arch: str,
    form: str = "abs_terms",
    sign0: int = 1,
    numerators: int | None = None,
    denominators: int | None = None,
    backward: bool = False,
    coefficient_dtype: torch.dtype = torch.float32,
    stride_aligned: bool = True,
) -> Compiled:
    """The kernel for groups of `width` channels on `arch`; no GPU is needed.

    m, n: degrees, n >= 1. numerators, denominators: rows of the coefficients, 1 or `groups` (the
    default). stride_aligned: rows start on 16 elements. The backward's sum of the chunks follows
    as `Compiled.then`. Raises UnsupportedProblem, UnknownArchitecture, KernelRejected,
    BackendMissing.
    """
    check_attributes(form, sign0)
    if not {dtype, coefficient_dtype} <= set(_TYPES) or n < 1:
        raise UnsupportedProblem(
            f"the Triton kernels of group_rational take {', '.join(map(str, _TYPES))} and a"
            f" denominator of degree 1 or more; found {dtype} with coefficients of"
            f" {coefficient_dtype} and degree {n}"
        )
    require_triton()
    from ridgeline.codegen.triton import group_rational as kernels

    kernel = kernels.group_rational_forward
    if backward:
        kernel = kernels.group_rational_backward_part
    constants = {
        "M": m,
        "N": n,
        "FORM": FORMS.index(form),
        "SIGN0": sign0,
        "SHARED_A": numerators == 1 or groups == 1,
        "SHARED_B": denominators == 1 or groups == 1,
        "WIDTH": width,
        "GROUPS": groups,
        "BLOCK": kernels.REDUCE_BLOCK,
    }
    data, coefficients = "*" + _TYPES[dtype], "*" + _TYPES[coefficient_dtype]
    integers = ("rows", "stride_grad", "stride_x", "steps", "chunks")
    types = {
        **dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "dx_ptr"), data),
        **dict.fromkeys(("numerator_ptr", "denominator_ptr"), coefficients),
        **dict.fromkeys(("d_numerator_ptr", "d_denominator_ptr"), coefficients),
        "partial_ptr": "*fp32",
        **dict.fromkeys(integers, "i32"),
    }

    def build(kernel, config: Config) -> Compiled:
        names = kernel.arg_names
        arguments = {name: types[name] for name in names if name in types}
        aligned = {name for name in arguments if name.endswith("_ptr")}
        if stride_aligned:
            aligned |= {name for name in arguments if name.startswith("stride")}
        return cross_compile(
            kernel,
            arguments,
            {name: value for name, value in constants.items() if name in names},
            config,
            arch,
            aligned=aligned,
            matrix=False,
        )

    compiled = first_accepted(functools.partial(build, kernel), _candidates(width, dtype, arch))
    if not backward:
        return compiled
    return replace(compiled, then=build(kernels.group_rational_backward_sum, Config((), _WARPS, 1)))


@functools.cache
def available() -> bool:
    try:
        require_triton()
    except BackendMissing as missing:
        _LOG.warning("group_rational runs by its reference on the GPU: %s", missing)
        return False
    return True


def single(coefficients: Tensor) -> Tensor:
    """Coefficients as the kernels read them: contiguous; a missing denominator as b_1 = 0."""
    if not coefficients.shape[1]:
        return coefficients.new_zeros(coefficients.shape[0], 1)
    return coefficients.contiguous()


def _launch(
    x: Tensor, a: Tensor, b: Tensor, form: str, sign0: int, backward: bool
) -> dict[str, int] | None:
    """The launch configuration; None where the reference is to run."""
    check_attributes(form, sign0)
    groups = group_count(x, a, b)
    if not {x.dtype, a.dtype, b.dtype} <= set(_TYPES) or not available():
        return None
    arch, _ = device_arch(x.device.index)
    compiled = compile_group_rational(
        x.shape[-1] // groups,
        groups=groups,
        m=a.shape[1] - 1,
        n=max(b.shape[1], 1),
        dtype=x.dtype,
        arch=arch,
        form=form,
        sign0=sign0 if backward else 1,
        numerators=a.shape[0],
        denominators=b.shape[0],
        backward=backward,
        stride_aligned=x.shape[-1] % 16 == 0,
    )
    return compiled.config.launch()


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, form: str = "abs_terms", sign0: int = 1
) -> Tensor:
    """The law of `ridgeline.ir.group_rational.reference` on the GPU that holds x."""
    config = _launch(x, numerator, denominator, form, sign0, False)
    if config is None:
        return reference(x, numerator, denominator, form=form, sign0=sign0)
    from ridgeline.codegen.triton import group_rational as kernels

    with torch.cuda.device(x.device):
        a, b = single(numerator), single(denominator)
        return kernels.group_rational(x, a, b, form=form, **config)


def group_rational_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = "abs_terms",
    sign0: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The law of `ridgeline.ir.group_rational.backward_reference` on the GPU that holds x."""
    config = None
    if grad.dtype == x.dtype:
        config = _launch(x, numerator, denominator, form, sign0, True)
    if config is None:
        return backward_reference(grad, x, numerator, denominator, form=form, sign0=sign0)
    from ridgeline.codegen.triton import group_rational as kernels

    with torch.cuda.device(x.device):
        a, b = single(numerator), single(denominator)
        dx, da, db = kernels.group_rational_backward(
            grad, x, a, b, form=form, sign0=sign0, **config
        )
    return dx, da, db[:, : denominator.shape[1]]


LIBRARY.impl("group_rational", group_rational, "CUDA")
LIBRARY.impl("group_rational_backward", group_rational_backward, "CUDA")
