"""`ridgeline::linear_rational` on GPUs, and compiled for absent ones.

Law and operands: `ridgeline.ir.linear_rational`. Registered for the operation itself under torch's
CUDA key, which ROCm shares; what the kernel does not take, and everything where Triton is not
installed, runs by the reference.
"""

import functools

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import choose, require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.group_rational_launch import available, single
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.codegen.triton.problems import pointer
from ridgeline.ir.group_rational import FORMS
from ridgeline.ir.linear_rational import LINEAR_RATIONAL, SIDES, check

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_IN_L2 = 8


def compile_linear_rational(
    tokens: int,
    n: int,
    k: int,
    *,
    dtype: torch.dtype,
    arch: str,
    numerator: tuple[int, int],
    denominator: tuple[int, int],
    form: str = FORMS[0],
    side: str = SIDES[0],
    bias: torch.dtype | None = None,
    coefficient_dtype: torch.dtype = torch.float32,
    multiprocessors: int | None = None,
) -> Compiled:
    """The kernel for x[tokens,k] and a weight [n,k] of `dtype` on `arch`; no GPU is needed.

    numerator, denominator: shapes of the coefficients, the denominator of degree 1 or more; bias:
    its dtype, None without one; multiprocessors: of the device, default the family's largest.
    Raises UnsupportedProblem, UnknownArchitecture, KernelRejected, BackendMissing.
    """
    given = {dtype, coefficient_dtype, *(() if bias is None else (bias,))}
    if not given <= set(_DTYPES) or denominator[1] < 1 or side not in SIDES or not n * k:
        raise UnsupportedProblem(
            f"the Triton kernel of linear_rational takes {', '.join(map(str, _DTYPES))}, a side of"
            f" {' or '.join(SIDES)}, a denominator of degree 1 or more and a weight that is not"
            f" empty; found {', '.join(sorted(map(str, given)))}, {side!r}, degree"
            f" {denominator[1]} and a weight of [{n}, {k}]"
        )
    groups = max(numerator[0], denominator[0])
    candidates = choose.rational_candidates(
        architecture(arch),
        tokens=tokens,
        n=n,
        width=k // groups if side == "input" and groups > 1 else 0,
        item=dtype.itemsize,
        multiprocessors=multiprocessors or architecture(arch).multiprocessors,
    )
    channels = n if side == "output" else k
    problem = (dtype, arch, channels, numerator, denominator, form, side, bias, coefficient_dtype)
    return first_accepted(
        lambda config: _compiled(
            config, *problem, n % 16 == 0, k % 16 == 0, k % config.constexprs()["BLOCK_K"] != 0
        ),
        candidates,
    )


@functools.lru_cache(maxsize=1024)
def _compiled(
    config: Config,
    dtype: torch.dtype,
    arch: str,
    channels: int,
    numerator: tuple[int, int],
    denominator: tuple[int, int],
    form: str,
    side: str,
    bias: torch.dtype | None,
    coefficient_dtype: torch.dtype,
    aligned_n: bool,
    aligned_k: bool,
    ragged: bool,
) -> Compiled:
    require_triton()
    from ridgeline.codegen.triton.linear_rational import linear_rational_forward
    from ridgeline.codegen.triton.rational_parts import rational_constants

    pointers = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), pointer(dtype)),
        **dict.fromkeys(("numerator_ptr", "denominator_ptr"), pointer(coefficient_dtype)),
        "bias_ptr": pointer(bias or dtype),
    }
    integers = ("tokens", "out_features", "in_features", "stride_x", "stride_w")
    aligned = {*pointers, *(("out_features",) if aligned_n else ())}
    aligned |= {"in_features", "stride_x", "stride_w"} if aligned_k else set()
    return cross_compile(
        linear_rational_forward,
        {**pointers, **dict.fromkeys(integers, "i32")},
        {
            "OUTPUT": side == "output",
            "BIAS": bias is not None,
            "RAGGED_K": ragged,
            **rational_constants(channels, numerator, denominator, form),
            "GROUP": _ROWS_IN_L2,
            "UPCAST": False,
        },
        config,
        arch,
        aligned=aligned,
        matrix=dtype != torch.float32,
        small=config.constexprs()["BLOCK_M"] < 64,
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = FORMS[0],
    side: str = SIDES[0],
) -> Tensor | None:
    """None where the kernel does not take the operands."""
    check(x, weight, bias, numerator, denominator, form, side)
    coefficients = {numerator.dtype, denominator.dtype}
    given = {x.dtype, weight.dtype, *coefficients, *(() if bias is None else (bias.dtype,))}
    fits = given <= set(_DTYPES) and x.dtype == weight.dtype and len(coefficients) == 1
    if not fits or not x.numel() * weight.numel() or not available():
        return None
    from ridgeline.codegen.triton.linear_rational import linear_rational

    a, b = single(numerator), single(denominator)
    arch, multiprocessors = device_arch(x.device.index)
    config = compile_linear_rational(
        x.numel() // x.shape[-1],
        *weight.shape,
        dtype=x.dtype,
        arch=arch,
        numerator=tuple(a.shape),  # pyright: ignore[reportArgumentType]
        denominator=tuple(b.shape),  # pyright: ignore[reportArgumentType]
        form=form,
        side=side,
        bias=None if bias is None else bias.dtype,
        coefficient_dtype=a.dtype,
        multiprocessors=multiprocessors,
    ).config
    with torch.cuda.device(x.device):
        return linear_rational(x, weight, bias, a, b, form=form, side=side, **config.launch())


LINEAR_RATIONAL.implement("CUDA", _launch)
