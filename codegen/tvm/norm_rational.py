"""`ridgeline::layer_norm_rational` on the host CPU: a rational function ends the norm's kernel.

Law: `ridgeline.ir.norm_rational`. The kernel reads each coefficient from a table with one column
per element of a row, so that groups of any width fill whole vectors; the table is a few thousand
numbers, written anew in every call. Registered for the operation itself under torch's CPU key.
fp64 operands, and everything where TVM is not installed, run by the reference.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.tvm.group_rational import available, single
from ridgeline.codegen.tvm.isa import host_isa
from ridgeline.codegen.tvm.norm import DTYPES, PARALLEL_ELEMENTS
from ridgeline.codegen.tvm.runtime import compile_kernel, import_tvm
from ridgeline.ir.norm_rational import Operands, implement

_ABSENT = torch.zeros(1)


def _prim_func(*fields: Any) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import norm_kernel

    return norm_kernel.build(norm_kernel.Spec(*fields))


@functools.cache
def _kernel(*fields: Any) -> Callable[..., None]:
    return compile_kernel(_prim_func(*fields), host_isa())


def _fields(
    size: int,
    dtype: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    rational: tuple[int, int, str],
    parallel: bool,
) -> tuple[Any, ...]:
    """The fields of `norm_kernel.Spec`: LayerNorm of rows, without a residual."""
    parameters = (None if d is None else DTYPES[d] for d in (weight, bias))
    return (size, DTYPES[dtype], *parameters, False, True, 2, parallel, host_isa(), rational)


def source(
    size: int,
    *,
    dtype: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    m: int,
    n: int,
    form: str,
) -> str:
    """The TVMScript text of the kernel for rows of `size` elements, to read or to take away."""
    return _prim_func(*_fields(size, dtype, weight, bias, (m, max(n, 1), form), True)).script()


def table(numerator: Tensor, denominator: Tensor, size: int, form: str) -> Tensor:
    """Coefficients [1 or G, k] -> fp32 [m + 1 + n, size]: one column per channel."""
    a, b = single(numerator), single(denominator)
    groups = max(a.shape[0], b.shape[0])
    made = a.new_empty(a.shape[1] + b.shape[1], groups, size // groups)
    made[: a.shape[1]] = a.t().unsqueeze(-1)
    made[a.shape[1] :] = (b if form == "abs_sum" else b.abs()).t().unsqueeze(-1)
    return made.view(-1, size)


def _run(operands: Operands, eps: float, form: str) -> Tensor | None:
    x, weight, bias, numerator, denominator = operands
    narrow = {t.dtype for t in operands if t is not None} <= set(DTYPES)
    if not narrow or not x.numel() or not available():
        return None
    size = x.shape[-1]
    coefficients = table(numerator, denominator, size, form)
    rational = (numerator.shape[1] - 1, max(denominator.shape[1], 1), form)
    dtypes = (None if t is None else t.dtype for t in (weight, bias))
    parallel = torch.get_num_threads() > 1 and x.numel() >= PARALLEL_ELEMENTS
    kernel = _kernel(*_fields(size, x.dtype, *dtypes, rational, parallel))
    y = x.new_empty(x.shape)
    rows, out = x.contiguous().view(-1, size), y.view(-1, size)
    held = (_ABSENT if t is None else t.contiguous() for t in (weight, bias))
    kernel(rows, rows, *held, out, out, coefficients, eps, 0.0)
    return y


implement("CPU", _run)
