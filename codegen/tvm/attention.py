"""`ridgeline::tvm_attention`: attention on the host CPU.

Law: `ridgeline.ir.attention`. Two kernels share the work: `attention_kernel`, whose vector lanes
are query rows, and `attention_decode_kernel` for few rows, whose lanes are positions in the head.
Each is compiled once per head dimensions, dtype, kind of mask and sinks, cap or none, and
instruction set; batch, heads, lengths and strides are values that it reads at run time, so a
growing cache compiles nothing.

The result lies in memory as [B,Sq,H,Dv], because what follows is nearly always
``transpose(1, 2).reshape(B, Sq, H * Dv)``, which is then free.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm.runtime import compile_kernel, host_isa, import_tvm
from ridgeline.ir.op import LIBRARY

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SINKS = {None: None, **DTYPES}
MASKS = {**SINKS, torch.bool: "uint8"}

DECODE_ROWS = 16
"""Query rows per key head (Sq H / Hk) up to which the decode kernel is the faster one."""

PARALLEL_WORK = 1 << 18
"""B H Sq Sk (D + Dv) from which a second thread earns its wake-up: about 10 us of one core."""

Role = Literal["decode", "tiled", "saved"]
"""Few rows; many; many, whose softmax statistics are kept for a backward."""

ABSENT = torch.zeros(1, 1, 1, 1)


def _prim_func(
    role: Role,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    sinks: torch.dtype | None,
    capped: bool,
    isa: str,
    parallel: bool,
) -> Any:
    import_tvm()
    from ridgeline.codegen.tvm import attention_decode_kernel, attention_kernel
    from ridgeline.codegen.tvm.attention_vectors import Spec

    known = dtype in DTYPES and mask in MASKS and sinks in SINKS
    if not known or head_dim % 8 or value_dim % 8:
        raise UnsupportedProblem(
            f"expected dtype in {list(DTYPES)}, mask in {list(MASKS)}, sinks in {list(SINKS)} and"
            f" head dimensions that are multiples of 8, found {dtype}, {mask}, {sinks},"
            f" {head_dim} and {value_dim}"
        )
    build = attention_decode_kernel.build if role == "decode" else attention_kernel.build
    names = DTYPES[dtype], MASKS[mask], SINKS[sinks]
    return build(Spec(head_dim, value_dim, *names, capped, isa, parallel, role == "saved"))


@functools.cache
def kernel(*specification: Any) -> Callable[..., None]:
    """The compiled kernel for `_prim_func`'s arguments; the kernels' modules say what it takes."""
    return compile_kernel(_prim_func(*specification), specification[-2])


@functools.cache
def host_kernel(
    role: Role,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    sinks: torch.dtype | None,
    capped: bool,
    parallel: bool,
) -> Callable[..., None]:
    """`kernel` for `host_isa()`, which is asked once: reading it costs as much as a small call."""
    return kernel(role, head_dim, value_dim, dtype, mask, sinks, capped, host_isa(), parallel)


def source(
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype,
    mask: torch.dtype | None = None,
    sinks: torch.dtype | None = None,
    capped: bool = False,
    role: Role = "tiled",
    isa: str | None = None,
    parallel: bool = True,
) -> str:
    """The TVMScript text of a kernel, to read or to take away.

    head_dim, value_dim (by default equal): multiples of 8. mask, sinks: their dtypes, None where
    absent. capped: do scores pass through a tanh? role: "decode" is for at most `DECODE_ROWS` query
    rows per key head.
    Raises UnsupportedProblem for what no kernel is built for.
    """
    kinds = dtype, mask, sinks, capped
    isa = isa or host_isa()
    return _prim_func(role, head_dim, value_dim or head_dim, *kinds, isa, parallel).script()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The law of `ridgeline.ir.attention.reference`, for fp32, bf16 and fp16 on the CPU.

    query [B,H,Sq,D], key [B,Hk,Sk,D], value [B,Hk,Sk,Dv]: any strides, but one of them is copied
    where its last dimension is not contiguous, and padded where it is no multiple of 8. sinks [H].
    Returns [B,H,Sq,Dv], in memory [B,Sq,H,Dv]. Raises UnsupportedProblem.
    """
    if not query.dim() == key.dim() == value.dim() == 4:
        raise _problem(query, key, value, mask, sinks)
    out = result(query, value.shape[3])
    options = {"scale": scale, "diagonal": diagonal, "soft_cap": soft_cap}
    attention_out(query, key, value, mask, sinks, **options, out=out)
    return out


def attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None,
    soft_cap: float | None = None,
    out: Tensor,
    stats: Tensor | None = None,
) -> None:
    """`attention` into `out`, for compiled graphs: no dispatcher, no allocation.

    out [B,H,Sq,Dv]: last dimension contiguous. stats: where to put
    what a backward needs, as `attention_kernel` has it.
    """
    batch, heads, queries, head_dim = query.shape
    _, key_heads, length, value_dim = value.shape
    if head_dim % 8 or value_dim % 8:
        _padded(query, key, value, mask, sinks, scale, diagonal, soft_cap, out, stats)
        return
    if not (batch and heads and queries and length):
        _check(query, key, value, mask, sinks)
        out.zero_()
        if stats is not None:
            stats[0], stats[1] = 0.0, torch.inf
        return
    if query.stride(3) != 1:
        query = query.contiguous()
    if key.stride(3) != 1:
        key = key.contiguous()
    if value.stride(3) != 1:
        value = value.contiguous()
    entries, mask_dtype = ABSENT, None
    if mask is not None:
        try:
            entries, mask_dtype = expanded(mask, (batch, heads, queries, length))
        except RuntimeError:
            raise _problem(query, key, value, mask, sinks) from None
    given = tuple(x for x in (stats, None if sinks is None else _plain(sinks)) if x is not None)
    if not key_heads or heads % key_heads:
        raise _problem(query, key, value, mask, sinks)
    rows = queries * heads // key_heads
    role = "saved" if stats is not None else "decode" if rows <= DECODE_ROWS else "tiled"
    # also gives this thread's OpenMP teams torch's setting, which its first call must do
    threads = torch.get_num_threads()
    parallel = (
        threads > 1 and batch * heads * queries * length * (head_dim + value_dim) >= PARALLEL_WORK
    )
    sinks_dtype = None if sinks is None else given[-1].dtype
    kinds = query.dtype, mask_dtype, sinks_dtype, soft_cap is not None
    run = host_kernel(role, head_dim, value_dim, *kinds, parallel)
    cap = 0.0
    if soft_cap is not None:
        scale, cap = scale / soft_cap, soft_cap
    reach = length if diagonal is None else max(-queries, min(diagonal, length))
    try:
        if role == "decode":
            run(query, key, value, entries, out, scale, reach, cap, *given)
        else:
            # 128 rows share a copied tile, where that leaves each thread two blocks or more
            large = batch * key_heads * (rows // 128) >= 2 * threads
            units = threads if parallel else 1
            blocks = 2 if large else 1, units
            run(query, key, value, entries, out, scale, reach, *blocks, cap, *given)
    except (ValueError, TypeError, RuntimeError):
        _check(query, key, value, mask, sinks)
        raise


def result(query: Tensor, value_dim: int) -> Tensor:
    """Room for the result, [B,H,Sq,Dv], in memory [B,Sq,H,Dv]."""
    batch, heads, queries, _ = query.shape
    row = heads * value_dim
    return query.new_empty_strided(
        (batch, heads, queries, value_dim), (queries * row, value_dim, row, 1)
    )


def expanded(mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, torch.dtype]:
    """The mask as the kernel reads it, strides 0 where it repeats, and its dtype."""
    dtype = mask.dtype
    if dtype == torch.bool:
        return mask.view(torch.uint8).expand(shape), dtype
    if dtype == torch.float64:
        mask, dtype = mask.float(), torch.float32
    return mask.expand(shape), dtype


def _plain(sinks: Tensor) -> Tensor:
    """The sinks as the kernel reads them: contiguous, and of a dtype that it knows."""
    return (sinks.float() if sinks.dtype == torch.float64 else sinks).contiguous()


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    diagonal: int | None,
    soft_cap: float | None,
    out: Tensor,
    stats: Tensor | None,
) -> None:
    """Head dimensions that are no multiple of 8: zeros add nothing to a product."""
    head_pad, value_dim = (0, -query.shape[3] % 8), value.shape[3]
    _check(query, key, value, mask, sinks)
    wider = result(query, value_dim + -value_dim % 8)
    attention_out(
        F.pad(query, head_pad),
        F.pad(key, head_pad),
        F.pad(value, (0, -value_dim % 8)),
        mask,
        sinks,
        scale=scale,
        diagonal=diagonal,
        soft_cap=soft_cap,
        out=wider,
        stats=stats,
    )
    out.copy_(wider[..., :value_dim])


def _problem(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> UnsupportedProblem:
    def described(x: Tensor | None) -> str:
        return "None" if x is None else f"{x.dtype} {list(x.shape)} on {x.device}"

    return UnsupportedProblem(
        "expected query [B,H,Sq,D], key [B,Hk,Sk,D], value [B,Hk,Sk,Dv] on the CPU with H a"
        f" multiple of Hk, of one dtype out of {list(DTYPES)}, a boolean or floating mask that"
        f" broadcasts to [B,H,Sq,Sk], and floating sinks [H]; found query {described(query)}, key"
        f" {described(key)}, value {described(value)}, mask {described(mask)}, sinks"
        f" {described(sinks)}"
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> None:
    """Raises UnsupportedProblem unless the arguments fit each other."""
    fits = (
        query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in DTYPES
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[1:3] == value.shape[1:3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
    )
    if fits and mask is not None:
        scores = (*query.shape[:3], key.shape[2])
        sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
        fits = mask.dim() <= 4 and all(own in (1, size) for own, size in sizes)
        fits = fits and (mask.dtype == torch.bool or mask.is_floating_point())
    if fits and sinks is not None:
        fits = sinks.shape == query.shape[1:2] and sinks.is_floating_point()
    if not fits:
        raise _problem(query, key, value, mask, sinks)


LIBRARY.define(
    "tvm_attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None,"
    " Tensor? sinks=None, *, float scale, SymInt? diagonal=None, float? soft_cap=None) -> Tensor"
)
LIBRARY.impl("tvm_attention", attention, "CPU")
OP = torch.ops.ridgeline.tvm_attention.default
OP.out = attention_out
OP.unmasked_out = lambda query, key, value, sinks, **rest: attention_out(
    query, key, value, None, sinks, **rest
)
"""Where code that Inductor writes finds it, in this process and in one that loads the code."""


@torch.library.register_fake("ridgeline::tvm_attention")
def _fake(query, key, value, mask=None, sinks=None, *, scale, diagonal=None, soft_cap=None):
    return result(query, value.shape[-1])


@functools.cache
def register_lowering() -> None:
    """Let Inductor call the kernel directly, without the dispatcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import ir, lowering

    @lowering.register_lowering(OP, type_promotion_kind=None)
    def lower(query, key, value, mask=None, sinks=None, *, scale, diagonal=None, soft_cap=None):
        batch, heads, queries, _ = query.get_size()
        dim = value.get_size()[3]
        row = heads * dim
        present = [x for x in (query, key, value, mask, sinks) if x is not None]
        name = "unmasked_out" if mask is None and sinks is not None else "out"
        call = ir.ExternKernelOut(
            layout=ir.FixedLayout(
                query.get_device(),
                query.get_dtype(),
                [batch, heads, queries, dim],
                [queries * row, dim, row, 1],
            ),
            inputs=[ir.ExternKernel.realize_input(x) for x in present],
            kwargs={"scale": scale, "diagonal": diagonal, "soft_cap": soft_cap},
            python_kernel_name=f"torch.ops.ridgeline.tvm_attention.default.{name}",
            op_overload=OP,
        )
        return ir.TensorBox.create(call)
