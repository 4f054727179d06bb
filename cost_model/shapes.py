"""Operator names, dtypes and shape parameters of `predict`, and what the laws need of them.

A *group* is a set of operators that share fitted constants ("gemm.bf16", "elementwise.fp32"): one
law, one dtype, one kind of kernel library. bf16 kernels are measured in CUDA graphs, fp16 ones in
traces of a serving engine, fp32 ones through torch's eager mode, so a dtype also says the harness.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.cost_model.elementwise import choose, functions, least
from ridgeline.cost_model.law_attention import pairs
from ridgeline.cost_model.law_collective import DIRECT_BYTES
from ridgeline.ir.errors import RidgelineError

GEMM_BITS = {
    "bf16": (16, 16), "fp16": (16, 16), "fp32": (32, 32), "fp8": (8, 8), "int8": (8, 8),
    "w8a16": (16, 8), "w4a16": (16, 4.25),
}  # fmt: skip
UNIT = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn",
    "int8": "int8", "w8a16": "float16", "w4a16": "float16",
}  # fmt: skip
# Inputs of a product that runs at another dtype's rate than its own: none of the kernels in front.
AS_ONE_KERNEL = {"quantized": 0.0, "whole": 0.0, "serial": 0.0}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
# Tensors of rows x width elements that a memory-bound operator reads and writes; `u` marks a
# unary form, whose second operand is a number.
STREAMS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("add", "div", "mul", "pow", "silu_mul"), (2, 1)),
    **dict.fromkeys(("addu", "divu", "mulu", "powu", "gelu", "relu", "tanh"), (1, 1)),
    **dict.fromkeys(("layernorm", "rmsnorm", "softmax", "rope"), (1, 1)),
    "quant_fp8": (1, 0.5),
}
_OWN = ("layernorm", "softmax", "rmsnorm", "rope", "silu_mul", "quant_fp8")
# Bytes on the wire per byte of payload, (p - 1)/p apart; and the passes over the ring.
COLLECTIVES = {
    "all_reduce": (2.0, 2), "all_gather": (1.0, 1), "reduce_scatter": (1.0, 1),
    "alltoall": (1.0, 1), "send_recv": (2.0, 1),
}  # fmt: skip
_GEMM = {"m": None, "n": None, "k": None, "batch": 1}
_ATTENTION = {
    "batch": None, "heads": None, "kv_heads": None, "head_dim": None, "q_len": 1, "kv_len": None,
    "window": 0,
}  # fmt: skip
PARAMETERS: Mapping[str, Mapping[str, int | None]] = {
    "gemm": _GEMM,
    "bmm": _GEMM,
    "attn_prefill": _ATTENTION,
    "attn_decode": _ATTENTION,
    **{op: {"rows": None, "width": None} for op in STREAMS},
    **{op: {"world": None, "per_node": None, "bytes": None} for op in COLLECTIVES},
}
_LAW = {"gemm": "gemm", "bmm": "gemm", "attn_prefill": "prefill", "attn_decode": "decode"}


class InvalidShape(RidgelineError):
    """An operator, dtype, shape or kind of machine that `predict` has no law for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Operators with shared constants: `law` of `laws.LAWS`, `key` in the calibration file."""

    law: str
    key: str


def dtypes_of(op: str) -> tuple[str, ...]:
    """The dtypes that `predict` takes for `op`."""
    return tuple(GEMM_BITS) if op in ("gemm", "bmm") else tuple(ITEMSIZE)


@functools.cache
def group_of(op: str, dtype: str) -> Group:
    law = _LAW.get(op) or ("stream" if op in STREAMS else "collective")
    if law == "gemm":
        return Group(law, f"{op if dtype == 'fp32' else 'gemm'}.{dtype}")
    if law in ("prefill", "decode"):
        return Group(law, law)
    if op in STREAMS and op not in _OWN:
        return Group(law, f"elementwise.{dtype}")
    if op in ("quant_fp8", "all_reduce"):
        return Group(law, op)
    return Group(law, f"{op}.{dtype}")


def law_inputs(op: str, dtype: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the law: `shape` (numbers or arrays) and the bytes that it implies."""
    s = dict(shape)
    if op in ("gemm", "bmm"):
        a, w = GEMM_BITS[dtype]
        m, n, k = s["m"], s["n"], s["k"]
        out = 16 if dtype != "fp32" else 32
        s["weights"] = s["batch"] * n * k * (w / 8)
        s["written"] = s["batch"] * m * n * (out / 8)
        s["bytes"] = s["batch"] * m * k * (a / 8) + s["weights"] + s["written"]
        s["quantized"] = float(dtype == "fp8")
        s["whole"] = float(dtype == "fp8")  # scaled products of CUTLASS, as engines call them
        s["serial"] = float(dtype in ("w8a16", "w4a16"))
    elif op in ("attn_prefill", "attn_decode"):
        q, kv, window = s["q_len"], s["kv_len"], s["window"]
        seen = choose(window > 0, least(kv, q - 1 + window), kv)
        read = s["heads"] * q + s["kv_heads"] * seen
        s["itemsize"] = float(ITEMSIZE[dtype])
        s["bytes"] = 2.0 * s["itemsize"] * s["batch"] * s["head_dim"] * read
        s["pairs"] = pairs(q, kv, window)
    elif op in STREAMS:
        s["bytes"] = s["rows"] * s["width"] * float(ITEMSIZE[dtype] * sum(STREAMS[op]))
        if op == "quant_fp8" and dtype == "fp32":  # not measured: as 16-bit rows of as many bytes
            s["width"] = 2 * s["width"]
        # Serving engines' own 16-bit kernels load element by element; torch's load 16 bytes.
        s["scalar"] = float((dtype != "fp32" and op in _OWN[2:]) or op == "quant_fp8")
    elif op in COLLECTIVES:
        wire, phases = COLLECTIVES[op]
        s["wire"], s["phases"] = wire * (s["world"] - 1.0) / s["world"], phases
        # bf16 is measured in a serving engine's graph, fp16 in NCCL's own benchmark.
        engine = op == "all_reduce" and dtype == "bf16"
        s["direct"] = engine * 1.0 * (s["bytes"] < DIRECT_BYTES) * (s["per_node"] == s["world"])
    return s


def flops(op: str, shape: Mapping[str, int]) -> float:
    """Of products of matrices; one an element for memory-bound operators, none on the network."""
    if op in ("gemm", "bmm"):
        return 2.0 * shape["batch"] * shape["m"] * shape["n"] * shape["k"]
    if op in ("attn_prefill", "attn_decode"):
        seen = float(pairs(shape["q_len"], shape["kv_len"], shape["window"]))
        return 4.0 * shape["batch"] * shape["heads"] * shape["head_dim"] * seen
    return float(shape["rows"] * shape["width"]) if op in STREAMS else 0.0


def weight_bytes(op: str, dtype: str, shape: Mapping[str, int]) -> float:
    """Of a linear layer's weights among the bytes; `bmm` multiplies activations."""
    if op != "gemm":
        return 0.0
    return shape["batch"] * shape["n"] * shape["k"] * GEMM_BITS[dtype][1] / 8


_TILES = ((128, 128), (256, 128), (128, 256), (64, 64), (128, 64))


def features(
    law: str, s: Mapping[str, Any], machine: Mapping[str, Any], parts: tuple[Any, Any, Any]
) -> tuple[Any, ...]:
    """Where a shape lies, for the residual: log2 sizes, waves of thread blocks and what the last
    of them leaves idle, what is left over of whole tiles, and which of the law's parts (seconds)
    is how much the largest. All are numbers, or all are arrays."""
    cores = machine["cores"]
    ceil, log2 = functions(s["bytes"])
    if law == "gemm":
        m, n, k, b = s["m"], s["n"], s["k"], s["batch"]
        out = [log2(m), log2(n), log2(k), log2(b), log2(m * n * b), log2(s["bytes"])]
        for rows, columns in _TILES:
            share = ceil(m / rows) * ceil(n / columns) * b / cores
            out += [share, ceil(share) / share]
        left = [m % 8, m % 16, m % 64, m % 128, n % 16, n % 32, n % 64, n % 128, k % 64]
        fixed, compute, memory = parts
        whole = fixed + compute + memory
        return (*out, *left, log2(whole), log2(fixed / whole), log2(compute / memory))
    if law in ("prefill", "decode"):
        b, h, kh, q, kv = s["batch"], s["heads"], s["kv_heads"], s["q_len"], s["kv_len"]
        blocks = b * (h * ceil(q / 128) if law == "prefill" else kh) / cores
        sizes = (b, h, h / kh, q, kv, s["head_dim"], s["bytes"], b * kh * kv)
        window = 1.0 * (s["window"] > 0)
        return (*map(log2, sizes), window, blocks, ceil(blocks) / blocks, q % 128)
    if law == "stream":
        rows, width = s["rows"], s["width"]
        last = ceil(rows / cores) * cores / rows
        return log2(rows), log2(width), log2(s["bytes"]), width % 1024, last
    across = 1.0 * (s["per_node"] < s["world"])
    sizes = (s["bytes"], s["world"], s["per_node"])
    return (*map(log2, sizes), across, s["direct"], s["wire"], s["phases"])
