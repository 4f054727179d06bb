"""`ridgeline::group_rational` and its backward on the host CPU: law and operands as in `ir`.

The kernels are registered for the operation itself, under torch's CPU key, and not as operations of
their own as for inference-only ones: training calls the backward from autograd, which knows the
operation alone. Each is compiled once per group width and count, degrees, form, dtype and
instruction set; rows and strides are values that it reads at run time.

fp64 operands, and everything where TVM is not installed (said once as a warning), run by the
reference.
"""

import functools
import logging
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.isa import host_isa
from ridgeline.codegen.tvm.runtime import (
    TvmMissingError,
    compile_kernel,
    import_tvm,
    last_contiguous,
)
from ridgeline.ir.group_rational import (
    backward_reference,
    check_attributes,
    group_count,
    reference,
)
from ridgeline.ir.op import LIBRARY

_LOG = logging.getLogger(__name__)

_X86 = platform.machine().lower() in ("x86_64", "amd64")

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARALLEL_ELEMENTS = 1 << 15
"""Elements of x from which a second thread earns its wake-up."""

STREAMED_BYTES = 8 << 20
"""Bytes of y or dx from which a later reader finds it in no cache of a core anyway."""

MAPPED_BYTES = 32 << 20
"""Bytes from which glibc maps each block anew (its largest M_MMAP_THRESHOLD): the system has just
zeroed its lines in the caches, and stores past them take 1.3 to 1.5 times as long as into them."""

_ISA = 9
"""Where the fields of `group_rational_units.Spec` name the instruction set."""


@functools.cache
def available() -> bool:
    try:
        import_tvm()
    except TvmMissingError as missing:
        _LOG.warning("group_rational runs by its reference on the CPU: %s", missing)
        return False
    return True


def _prim_func(backward: bool, *fields: Any) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import group_rational_kernel as kernels
    from ridgeline.codegen.tvm.group_rational_units import Spec

    build = kernels.build_backward if backward else kernels.build_forward
    return build(Spec(*fields))


@functools.cache
def kernel(backward: bool, *fields: Any) -> Callable[..., None]:
    """The compiled kernel for the fields of `group_rational_units.Spec`."""
    return compile_kernel(_prim_func(backward, *fields), fields[_ISA])


@functools.cache
def _workspace(fields: tuple[Any, ...]) -> tuple[int, int]:
    """(rows of a chunk, sums of a chunk)."""
    from ridgeline.codegen.tvm.group_rational_units import Spec, padded

    spec = Spec(*fields)
    return spec.chunk, padded(spec)


def source(
    channels: int,
    *,
    groups: int,
    m: int,
    n: int,
    dtype: torch.dtype,
    form: str = "abs_terms",
    sign0: int = 1,
    numerators: int | None = None,
    denominators: int | None = None,
    backward: bool = False,
    isa: str | None = None,
) -> str:
    """The TVMScript text of a kernel, to read or to take away.

    numerators, denominators: rows of the coefficients, 1 or `groups` (the default).
    Raises UnsupportedProblem for a dtype that no kernel is built for.
    """
    if dtype not in DTYPES:
        raise UnsupportedProblem(f"expected a dtype of {list(DTYPES)}, found {dtype}")
    rows = (groups if numerators is None else numerators, denominators or groups)
    fields = (channels // groups, groups, m, max(n, 1), *rows, form, sign0, DTYPES[dtype])
    return _prim_func(backward, *fields, isa or host_isa(), True).script()


def _fields(x: Tensor, a: Tensor, b: Tensor, form: str, sign0: int) -> tuple[Any, ...] | None:
    """What the kernel is specialised on; None where the reference is to run."""
    check_attributes(form, sign0)
    groups = group_count(x, a, b)
    narrow = x.dtype in DTYPES and torch.float64 not in (a.dtype, b.dtype)
    if not narrow or not x.numel() or not available():
        return None
    parallel = torch.get_num_threads() > 1 and x.numel() >= PARALLEL_ELEMENTS
    shapes = (x.shape[-1] // groups, groups, a.shape[1] - 1, max(b.shape[1], 1))
    rows = (a.shape[0], b.shape[0])
    return (*shapes, *rows, form, sign0, DTYPES[x.dtype], host_isa(), parallel)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, C], last dimension contiguous; copied only where no view has that shape."""
    return last_contiguous(x.reshape(-1, x.shape[-1]))


def single(coefficients: Tensor) -> Tensor:
    """Coefficients in fp32; a missing denominator as b_1 = 0."""
    if not coefficients.shape[1]:
        coefficients = coefficients.new_zeros(coefficients.shape[0], 1)
    return coefficients.float().contiguous()


def _streamed(result: Tensor, fields: tuple[Any, ...]) -> bool:
    """Is y or dx, contiguous, to go past the caches? Whole vectors in groups fill its rows."""
    whole = result.dtype == torch.float32 and fields[0] % 16 == 0
    aligned = result.data_ptr() % 64 == 0
    return whole and aligned and STREAMED_BYTES <= result.nbytes < MAPPED_BYTES and _X86


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, *, form: str = "abs_terms", sign0: int = 1
) -> Tensor:
    """The law of `ridgeline.ir.group_rational.reference` on the CPU."""
    # The forward has no sign: one kernel serves both values.
    fields = _fields(x, numerator, denominator, form, sign0)
    if fields is None:
        return reference(x, numerator, denominator, form=form, sign0=sign0)
    y = x.new_empty(x.shape)
    run = kernel(False, *fields[:7], 1, *fields[8:], _streamed(y, fields))
    run(_rows(x), single(numerator), single(denominator), y.view(-1, x.shape[-1]))
    return y


def group_rational_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = "abs_terms",
    sign0: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The law of `ridgeline.ir.group_rational.backward_reference` on the CPU."""
    fields = _fields(x, numerator, denominator, form, sign0)
    if fields is None or grad.dtype != x.dtype:
        return backward_reference(grad, x, numerator, denominator, form=form, sign0=sign0)
    a, b = single(numerator), single(denominator)
    rows = _rows(x)
    chunk, sums = _workspace(fields)
    dx = x.new_empty(x.shape)
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    partial = a.new_empty(-(-rows.shape[0] // chunk), sums)
    run = kernel(True, *fields, _streamed(dx, fields))
    run(_rows(grad), rows, a, b, dx.view(rows.shape), da, db, partial)
    db = db[:, : denominator.shape[1]]
    return dx, da.to(numerator.dtype), db.to(denominator.dtype)


LIBRARY.impl("group_rational", group_rational, "CPU")
LIBRARY.impl("group_rational_backward", group_rational_backward, "CPU")
