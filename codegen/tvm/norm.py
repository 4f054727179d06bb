"""`ridgeline::tvm_norm`, `tvm_add_norm`: RMSNorm and LayerNorm of rows or of a sum, on the CPU.

Law: `norm_kernel`, which computes `ridgeline.ir.rms_norm` and `ridgeline.ir.layer_norm`. A kernel
is compiled once per row length, dtypes and form; the number of rows is a value that it reads at run
time.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.op import LIBRARY

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARALLEL_ELEMENTS = 1 << 15
"""Elements from which a second thread earns its wake-up: about 10 us of one core's work."""

_ABSENT = torch.zeros(1)
_NO_TABLE = torch.zeros(1, 1)


class NormKernel(NamedTuple):
    """What a kernel is specialised on besides the rows.

    dtypes by TVM's names, "none" for what is absent; `str` and `parse` are inverses, and the text
    is what the op carries, because it means the same in every process.
    """

    size: int
    dtype: str
    weight: str
    bias: str
    residual: bool
    center: bool

    def __str__(self) -> str:
        return " ".join(str(value) for value in self)

    @classmethod
    def parse(cls, text: str) -> "NormKernel":
        """Raises UnsupportedProblem where `text` is not what `str` writes."""
        words = text.split()
        known = {*DTYPES.values(), "none"}
        if (
            len(words) != len(cls._fields)
            or not words[0].isdecimal()
            or not known.issuperset(words[1:4])
            or not {"True", "False"}.issuperset(words[4:])
        ):
            raise UnsupportedProblem(
                f"expected a kernel as `norm_kernel` writes it ({' '.join(cls._fields)}),"
                f" found {text!r}"
            )
        return cls(int(words[0]), *words[1:4], *(word == "True" for word in words[4:]))


def norm_kernel(
    size: int,
    dtype: torch.dtype,
    *,
    weight: torch.dtype | None,
    bias: torch.dtype | None = None,
    residual: bool = False,
    center: bool = False,
) -> NormKernel:
    """The kernel for rows of `size` elements; raises UnsupportedProblem for other dtypes."""
    given = [dtype, *(d for d in (weight, bias) if d is not None)]
    if size < 1 or any(d not in DTYPES for d in given):
        raise UnsupportedProblem(
            f"expected rows of at least one element and dtypes out of {list(DTYPES)}, found"
            f" {size} elements and {given}"
        )
    names = (None if d is None else DTYPES[d] for d in (weight, bias))
    return NormKernel(size, DTYPES[dtype], *(n or "none" for n in names), residual, center)


def _prim_func(kernel: NormKernel, rank: int, parallel: bool) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import norm_kernel as script

    names = {name: None if name == "none" else name for name in (kernel.weight, kernel.bias)}
    return script.build(
        script.Spec(
            kernel.size,
            kernel.dtype,
            names[kernel.weight],
            names[kernel.bias],
            kernel.residual,
            kernel.center,
            rank,
            parallel,
            host_isa(),
        )
    )


def source(kernel: NormKernel) -> str:
    """The TVMScript text of a kernel, to read or to take away."""
    return _prim_func(kernel, 2, True).script()


class _Kernel:
    """The compiled forms of one `NormKernel`, each compiled when it is first needed."""

    __slots__ = ("forms", "lock", "parallel_from", "spec")

    def __init__(self, spec: NormKernel) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.parallel_from = -(-PARALLEL_ELEMENTS // spec.size)
        """Rows from which they are shared among threads."""
        self.forms: dict[tuple[int, bool], Callable[..., None]] = {}

    def form(self, rank: int, parallel: bool) -> Callable[..., None]:
        """(x, residual, weight, bias, y, sum, table, eps, shift) -> None on tensors of `rank`."""
        key = rank, parallel
        with self.lock:
            if key not in self.forms:
                self.forms[key] = compile_kernel(_prim_func(self.spec, *key), host_isa())
        return self.forms[key]


@functools.cache
def _kernel(text: str) -> _Kernel:
    return _Kernel(NormKernel.parse(text))


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shift: float, kernel: str
) -> Tensor:
    """y [..., N] from x [..., N] in x's dtype; weight and bias [N].

    kernel: `str(norm_kernel(...))`. Any strides: what is not contiguous is copied. Raises
    UnsupportedProblem if the tensors are not what `kernel` names.
    """
    (y,) = _empty(x, 1)
    parameters = [_contiguous(t) for t in (weight, bias) if t is not None]
    norm_out(_contiguous(x), *parameters, eps=eps, shift=shift, kernel=kernel, out=y)
    return y


def norm_out(
    x: Tensor, *parameters: Tensor, eps: float, shift: float, kernel: str, out: Tensor
) -> None:
    """`norm` into `out`, for compiled graphs: no dispatcher, no allocation.

    x, out: contiguous; parameters: of weight and bias those that `kernel` names.
    """
    _run(_kernel(kernel), x, x, parameters, out, out, eps, shift)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(norm of s, s) with s = x + residual in x's dtype; otherwise as `norm`."""
    parameters = [_contiguous(t) for t in (weight, bias) if t is not None]
    return add_norm_direct(
        _contiguous(x), _contiguous(residual), *parameters, eps=eps, shift=shift, kernel=kernel
    )


def add_norm_direct(
    x: Tensor, residual: Tensor, *parameters: Tensor, eps: float, shift: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """`add_norm` of contiguous tensors, for compiled graphs: no dispatcher."""
    y, total = _empty(x, 2)
    _run(_kernel(kernel), x, residual, parameters, y, total, eps, shift)
    return y, total


_allocate = torch._C._dynamo.guards._empty_strided_cpu
"""What Inductor's own code allocates with: 0.6 us, where `torch.empty` takes 1.9 us."""


def _empty(like: Tensor, count: int) -> list[Tensor]:
    """Contiguous room of the shape and dtype of `like`, `count` times."""
    shape, dtype = like.shape, like.dtype
    if len(shape) == 3:
        batch, rows, size = shape
        sizes, strides = (batch, rows, size), (rows * size, size, 1)
    elif len(shape) == 2:
        rows, size = shape
        sizes, strides = (rows, size), (size, 1)
    else:
        return [like.new_empty(shape) for _ in range(count)]
    return [_allocate(sizes, strides, dtype) for _ in range(count)]


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _run(
    entry: _Kernel,
    x: Tensor,
    residual: Tensor,
    parameters: tuple[Tensor, ...] | list[Tensor],
    y: Tensor,
    total: Tensor,
    eps: float,
    shift: float,
) -> None:
    spec, shape = entry.spec, x.shape
    weight = bias = _ABSENT
    if spec.weight != "none":
        weight = parameters[0]
    if spec.bias != "none":
        bias = parameters[-1]
    rank = len(shape)
    if rank != 2 and rank != 3:
        x, residual, y, total = (t.view(-1, spec.size) for t in (x, residual, y, total))
        shape, rank = x.shape, 2
    rows = shape[0] if rank == 2 else shape[0] * shape[1]
    if not rows:
        return
    form = rank, rows >= entry.parallel_from
    run = entry.forms.get(form) or entry.form(*form)
    torch.get_num_threads()  # a thread's first call gives its OpenMP region torch's setting
    try:
        run(x, residual, weight, bias, y, total, _NO_TABLE, eps, shift)
    except (TypeError, ValueError) as mismatch:
        raise UnsupportedProblem(
            f"expected tensors for the kernel {str(spec)!r}, found others: {mismatch}"
        ) from mismatch


LIBRARY.define(
    "tvm_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float shift, str kernel) -> Tensor"
)
LIBRARY.define(
    "tvm_add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float shift,"
    " str kernel) -> (Tensor, Tensor)"
)
LIBRARY.impl("tvm_norm", norm, "CPU")
LIBRARY.impl("tvm_add_norm", add_norm, "CPU")
NORM = torch.ops.ridgeline.tvm_norm.default
ADD_NORM = torch.ops.ridgeline.tvm_add_norm.default
NORM.out = norm_out
ADD_NORM.direct = add_norm_direct
"""Where code that Inductor writes finds them, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_norm")
def _fake_norm(x, weight, bias, eps, shift, kernel):
    return x.new_empty(x.shape)


@torch.library.register_fake("ridgeline::tvm_add_norm")
def _fake_add_norm(x, residual, weight, bias, eps, shift, kernel):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernels directly, without the dispatcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    def contiguous(*tensors):
        present = (ir.ExternKernel.realize_input(t) for t in tensors if t is not None)
        return [ir.ExternKernel.require_contiguous(t) for t in present]

    def rows(x):
        return ir.FixedLayout(x.get_device(), x.get_dtype(), x.get_size())

    @lowering.register_lowering(NORM, type_promotion_kind=None)
    def lower_norm(x, weight, bias, eps, shift, kernel):
        inputs = contiguous(x, weight, bias)
        call = ir.ExternKernelOut(
            layout=rows(x),
            inputs=inputs,
            kwargs={"eps": eps, "shift": shift, "kernel": kernel},
            python_kernel_name="torch.ops.ridgeline.tvm_norm.default.out",
            op_overload=NORM,
        )
        return ir.TensorBox.create(call)

    class AddNorm(ir.ExternKernelAlloc):
        def apply_constraint(self):
            """The inputs are contiguous already."""

    @lowering.register_lowering(ADD_NORM, type_promotion_kind=None)
    def lower_add_norm(x, residual, weight, bias, eps, shift, kernel):
        inputs = contiguous(x, residual, weight, bias)
        call = AddNorm(
            layout=ir.MultiOutputLayout(device=x.get_device()),
            inputs=inputs,
            kwargs={"eps": eps, "shift": shift, "kernel": kernel},
            python_kernel_name="torch.ops.ridgeline.tvm_add_norm.default.direct",
            op_overload=ADD_NORM,
        )
        call.outputs = [ir.MultiOutput(rows(x), call, [(tuple, i)]) for i in range(2)]
        return tuple(ir.TensorBox.create(output) for output in call.outputs)
