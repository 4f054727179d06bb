"""Runs the parallel loops of TVM kernels on torch's own OpenMP threads.

TVM keeps a second pool of threads. Two pools that spin while they wait take each other's cores
when kernels alternate with torch operators, and TVM's ignores `torch.set_num_threads`. A compiled
TVM module calls parallel loops through a pointer, `__TVMBackendParallelLaunch`, which is taken from
a registry when the module is loaded. Here it is pointed at

    launch(lambda, data, _) = GOMP_parallel(member, (lambda, data), inside a team ? 1 : max threads)
    member((lambda, data))  = lambda(thread number, (null, number of threads), data)

over the very OpenMP library that torch has loaded (libgomp, or libomp with its GNU entry points).
The two functions are LLVM IR, compiled by TVM itself: no C++ compiler is needed.
Source: tvm/runtime/c_backend_api.h (TVMBackendParallelLaunch), libgomp's ABI (GOMP_parallel).
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import tvm
from tvm.script import tirx as T

_LOG = logging.getLogger(__name__)
_SLOT = b"__TVMBackendParallelLaunch"
_C_CALLS = 1
"""tvm's CallingConv::kCPackedFunc: set explicitly, it keeps a function's plain C arguments."""

_IR = """
declare void @llvm.trap()
declare void @ridgeline_member(ptr)
declare i32 @ridgeline_launch(ptr, ptr, i32)
define i32 @rl_member(ptr %job) {{
  %lambda = load ptr, ptr %job
  %data.at = getelementptr i8, ptr %job, i64 8
  %data = load ptr, ptr %data.at
  %env = alloca [16 x i8], align 8
  store ptr null, ptr %env
  %n.at = getelementptr i8, ptr %env, i64 8
  %n = call i32 inttoptr (i64 {omp_get_num_threads} to ptr)()
  store i32 %n, ptr %n.at
  %me = call i32 inttoptr (i64 {omp_get_thread_num} to ptr)()
  %rc = call i32 %lambda(i32 %me, ptr %env, ptr %data)
  %failed = icmp ne i32 %rc, 0
  br i1 %failed, label %trap, label %done
trap: ; an error cannot leave an OpenMP team, and the kernels' loop bodies have none to raise
  call void @llvm.trap()
  unreachable
done:
  ret i32 0
}}
define i32 @rl_launch(ptr %lambda, ptr %data) {{
  %job = alloca [16 x i8], align 8
  store ptr %lambda, ptr %job
  %data.at = getelementptr i8, ptr %job, i64 8
  store ptr %data, ptr %data.at
  %nested = call i32 inttoptr (i64 {omp_in_parallel} to ptr)()
  %inside = icmp ne i32 %nested, 0
  %most = call i32 inttoptr (i64 {omp_get_max_threads} to ptr)()
  %n = select i1 %inside, i32 1, i32 %most
  call void inttoptr (i64 {GOMP_parallel} to ptr)(ptr @ridgeline_member, ptr %job, i32 %n, i32 0)
  ret i32 0
}}
define i64 @rl_address() {{
  ret i64 ptrtoint (ptr @ridgeline_launch to i64)
}}
"""
_NEEDS = (
    "GOMP_parallel",
    "omp_get_max_threads",
    "omp_get_num_threads",
    "omp_get_thread_num",
    "omp_in_parallel",
)


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None, "a symbol that was found has an address"
    return address


@functools.cache
def _launcher(target: Any) -> tuple[Any, int] | None:
    """The module that holds `launch` (it must stay alive) and its address; None if impossible."""
    torch_library = ctypes.CDLL(torch._C.__file__)
    try:
        ir = _IR.format(**{name: _address(torch_library, name) for name in _NEEDS})
    except AttributeError as missing:
        _LOG.warning(
            "torch's OpenMP library has no GNU entry points (%s); CPU kernels run on TVM's own"
            " threads, which compete with torch's",
            missing,
        )
        return None

    @T.prim_func(s_tir=True)
    def member(job: T.handle):
        T.func_attr({"global_symbol": "ridgeline_member", "calling_conv": _C_CALLS})
        with T.attr(0, "pragma_import_llvm", ir):
            T.evaluate(T.call_extern("int32", "rl_member", job))

    @T.prim_func(s_tir=True)
    def launch(body: T.handle, data: T.handle, tasks: T.int32) -> T.int32:
        T.func_attr({"global_symbol": "ridgeline_launch", "calling_conv": _C_CALLS})
        with T.attr(0, "pragma_import_llvm", ir):
            T.evaluate(T.call_extern("int32", "rl_launch", body, data))

    @T.prim_func(s_tir=True)
    def address() -> T.int64:
        T.func_attr({"global_symbol": "address"})
        with T.attr(0, "pragma_import_llvm", ir):
            return T.call_extern("int64", "rl_address")

    functions = {"ridgeline_member": member, "ridgeline_launch": launch, "address": address}
    module = tvm.compile(tvm.IRModule(functions), target=target)
    return module, module["address"]()


@contextlib.contextmanager
def torch_threads(target: Any) -> Iterator[None]:
    """Modules loaded in this block run their parallel loops on torch's threads."""
    launcher = _launcher(target)
    if launcher is None:
        yield
        return
    from tvm_ffi import libinfo

    registry = ctypes.CDLL(libinfo.find_libtvm_ffi()).TVMFFIEnvModRegisterContextSymbol
    registry.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    own = _address(tvm.base._LOADED_LIBS["tvm_runtime"], _SLOT.decode().lstrip("_"))
    registry(_SLOT, launcher[1])
    try:
        yield
    finally:
        registry(_SLOT, own)
