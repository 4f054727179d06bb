"""Which vector instructions the CPU kernels may use on this host."""

import functools
import os
import platform

import torch

from ridgeline.ir.errors import RidgelineError

ISAS = ("generic", "avx512", "avx512_bf16")
"""From least to most: any CPU; AVX-512 F/BW/DQ/VL; the same and `vdpbf16ps`."""

BYTE_TABLES = "avx512_vbmi"
"""Beside `ISAS`, as some CPUs of either AVX-512 kind have it: `vpermb` and `vpdpbusd`."""

_NEEDS = {
    "generic": (),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx512_bf16": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16"),
    BYTE_TABLES: ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vbmi", "avx512_vnni"),
}


@functools.cache
def executes(isa: str) -> bool:
    """Does this CPU have what `isa`, one of `ISAS` or `BYTE_TABLES`, needs?"""
    has = torch.cpu.get_capabilities()
    return all(has.get(flag) for flag in _NEEDS[isa])


def llvm_features() -> dict[str, bool]:
    """What the kernels' instruction sets need, by LLVM's names: does this CPU have it? Empty off
    x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    has = torch.cpu.get_capabilities()
    flags = dict.fromkeys(flag for needs in _NEEDS.values() for flag in needs)
    return {flag.replace("_", ""): bool(has.get(flag)) for flag in flags}


@functools.cache
def best_isa() -> str:
    """The most capable of `ISAS` that this CPU executes (AVX2 and Arm are "generic")."""
    return next(isa for isa in reversed(ISAS) if executes(isa))


def byte_table_isa() -> str:
    """`BYTE_TABLES` where this CPU has it and `RIDGELINE_ISA` asks for no less; or `host_isa()`."""
    isa = host_isa()
    return BYTE_TABLES if isa == best_isa() and executes(BYTE_TABLES) else isa


def host_isa() -> str:
    """The instruction set that kernels are built for: `RIDGELINE_ISA` if set, else `best_isa()`.

    Raises RidgelineError if `RIDGELINE_ISA` is unknown or more than this CPU has.
    """
    forced, best = os.environ.get("RIDGELINE_ISA"), best_isa()
    if forced is None:
        return best
    if forced not in ISAS:
        raise RidgelineError(f"RIDGELINE_ISA={forced!r} is unknown; choose one of {list(ISAS)}")
    if ISAS.index(forced) > ISAS.index(best):
        raise RidgelineError(
            f"RIDGELINE_ISA={forced!r} asks for instructions that this CPU lacks (it has {best!r});"
            " unset it or choose a lower one"
        )
    return forced


def quick_bf16() -> bool:
    """Is `vdpbf16ps` worth its conversions where products, not memory, take the time? It does the
    work of two fp32 multiplications, but CPUs with AMX issue it on one port, and those on two."""
    return host_isa() == "avx512_bf16" and not torch.cpu.get_capabilities().get("amx_bf16")
