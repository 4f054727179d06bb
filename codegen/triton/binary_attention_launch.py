"""`ridgeline::triton_binary_attention`: attention over binary codes on GPUs, absent ones included.

Law and operands: `ridgeline::binary_attention`, forward only. Implemented for CUDA (and, under the
same dispatch key, ROCm) tensors; any other device raises UnsupportedProblem. Importing this module
registers the operation and needs no triton; calling it does.
"""

import functools
from dataclasses import replace

import torch

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import choose, require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.ops import device_arch, elsewhere
from ridgeline.codegen.triton.problems import pointer, split_sum
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import LIBRARY

# BLOCK_T (keys), BLOCK_M (queries), warps, stages; best first, none tuned on a device.
_TILES = ((64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1))
MOST_CHUNKS = 16
"""Of the keys: more would cost more in adding their sums than they gain."""
LARGEST = 128
"""Channels of a head: the sums KV of one head live in the registers of one block."""


def compile_binary_attention(
    query_shape: tuple[int, int, int, int],
    value_shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    arch: str,
    value_dtype: torch.dtype | None = None,
    multiprocessors: int | None = None,
) -> Compiled:
    """The kernels for query [B,H,M,D] and value [B,H,N,E] on `arch`; no GPU is needed.

    dtype: of query and key; value_dtype: default `dtype`. The sum over the keys comes first, then
    (`Compiled.then`) the sum of its chunks where there are several, then the queries.
    Raises UnsupportedProblem, UnknownArchitecture, KernelRejected, BackendMissing.
    """
    (batch, heads, _, d), (keys, e) = query_shape, value_shape[2:]
    if max(d, e) > LARGEST:
        raise UnsupportedProblem(
            f"the Triton kernel of binary attention takes heads of up to {LARGEST} channels, found"
            f" {d} and {e}; keep ridgeline's reference operation for it"
        )
    pointer(dtype)
    first = _kernels(arch, d, e, dtype, value_dtype or dtype)
    chunks = choose.splits(
        batch * heads,
        -(-keys // first.config.constexprs()["BLOCK_T"]),
        multiprocessors or architecture(arch).multiprocessors,
        least_steps=4,
    )
    chunks = min(chunks, MOST_CHUNKS)
    if chunks == 1:
        return first
    total = split_sum(arch, dtype=torch.float32, bias_dtype=None, aligned_n=(d * e) % 16 == 0)
    config = replace(first.config, splits=chunks)
    return replace(first, config=config, then=replace(total, then=first.then))


@functools.lru_cache(maxsize=256)
def _kernels(arch: str, d: int, e: int, dtype: torch.dtype, value_dtype: torch.dtype) -> Compiled:
    require_triton()
    from ridgeline.codegen.triton import binary_attention as kernels

    constants = {
        "D": d,
        "E": e,
        "BLOCK_D": choose.padded(d),
        "BLOCK_E": choose.padded(e),
        "UPCAST": False,
        **dict.fromkeys(("stride_kd", "stride_ve", "stride_qd"), 1),
    }
    types = {
        **dict.fromkeys(("query_ptr", "key_ptr"), pointer(dtype)),
        **dict.fromkeys(("value_ptr", "out_ptr"), pointer(value_dtype)),
        **dict.fromkeys(("threshold_ptr", "sums_ptr"), "*fp32"),
    }

    def build(kernel, config: Config) -> Compiled:
        names = kernel.arg_names
        sizes = {name: size for name, size in config.blocks if name in names}
        own = Config(tuple(sizes.items()), config.num_warps, config.num_stages)
        present = {name: value for name, value in constants.items() if name in names}
        arguments = {n: types.get(n, "i32") for n in names if n not in present and n not in sizes}
        aligned = {name for name in arguments if name.endswith("_ptr")}
        if d % 16 == 0 and e % 16 == 0:
            aligned |= {name for name in arguments if name.startswith("stride")}
        rows = sizes.get("BLOCK_M", constants["BLOCK_D"])
        return cross_compile(
            kernel, arguments, present, own, arch, aligned=aligned, small=rows < 64
        )

    def both(config: Config) -> Compiled:
        queries = build(kernels.binary_attention_queries, config)
        return replace(build(kernels.binary_attention_keys, config), config=config, then=queries)

    candidates = (
        Config((("BLOCK_T", t), ("BLOCK_M", m)), warps, stages) for t, m, warps, stages in _TILES
    )
    return first_accepted(both, candidates)


def _launch(query, key, value, query_threshold, key_threshold):
    if query.dtype != key.dtype:
        raise UnsupportedProblem(
            "triton_binary_attention expects query and key of one dtype, found"
            f" {query.dtype} and {key.dtype}"
        )
    arch, multiprocessors = device_arch(query.device.index)
    config = compile_binary_attention(
        tuple(query.shape),
        tuple(value.shape),
        dtype=query.dtype,
        arch=arch,
        value_dtype=value.dtype,
        multiprocessors=multiprocessors,
    ).config
    from ridgeline.codegen.triton.binary_attention import binary_attention

    with torch.cuda.device(query.device):
        return binary_attention(
            query, key, value, query_threshold, key_threshold,
            splits=config.splits, **config.launch(),
        )  # fmt: skip


def _fake(query, key, value, query_threshold, key_threshold):
    return heads_side_by_side(value, (*query.shape[:-1], value.shape[-1]))


LIBRARY.define(
    "triton_binary_attention(Tensor query, Tensor key, Tensor value, Tensor query_threshold,"
    " Tensor key_threshold) -> Tensor"
)
LIBRARY.impl("triton_binary_attention", elsewhere, "CompositeExplicitAutograd")
LIBRARY.impl("triton_binary_attention", _launch, "CUDA")
torch.library.register_fake("ridgeline::triton_binary_attention", _fake)
