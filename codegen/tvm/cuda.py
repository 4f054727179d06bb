"""CUDA source that TVM generates for shift layers and binary attention: to read or to take away.

A GPU plan runs Triton's kernels; these state the same laws as ShiftAddViT computes them, by integer
shifts and by masked additions, built for an architecture with neither device nor CUDA toolkit here.
"""

import functools
from typing import Any

from ridgeline.codegen.tvm.runtime import import_tvm


@functools.lru_cache(maxsize=64)
def shift_linear_source(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    terms: int,
    group_size: int,
    arch: str,
    group_rows: int = 1,
) -> str:
    """CUDA C of `cuda_shift` for `arch` ("sm_80"); raises TvmMissingError."""
    import_tvm()
    from ridgeline.codegen.tvm import cuda_shift as kernel

    function = kernel.definition(
        out_features,
        in_features,
        bits=bits,
        terms=terms,
        group_size=group_size,
        group_rows=group_rows,
    )
    return _source(str(kernel.__doc__), kernel.scheduled(function), arch)


@functools.lru_cache(maxsize=64)
def binary_attention_source(heads: int, d: int, e: int, *, arch: str) -> str:
    """CUDA C of `cuda_binary_attention` for `arch`; raises TvmMissingError."""
    import_tvm()
    from ridgeline.codegen.tvm import cuda_binary_attention as kernel

    return _source(str(kernel.__doc__), kernel.scheduled(kernel.definitions(heads, d, e)), arch)


def _source(law: str, module: Any, arch: str) -> str:
    tvm = import_tvm()
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    text = tvm.compile(module, target=target).mod.imports[0].inspect_source("cuda")
    return f"/* Written by ridgeline with TVM {tvm.__version__} for {arch}.\n\n{law}*/\n{text}"
