"""Binary-coded and shift layers, and binary attention, in Triton's interpreter: {case: error}.

A script, started by test_coded_linear.py in a process of its own: the interpreter is chosen by an
environment variable that Triton reads when a kernel is defined.
"""

import functools
import json
import sys
from typing import Any

import torch
from torch import Tensor

from ridgeline.codegen.triton.binary_attention import binary_attention
from ridgeline.codegen.triton.coded_linear import coded_linear
from ridgeline.codegen.triton.coded_storage import arranged, lift_of, pack, shared_run
from ridgeline.codegen.triton.linear_nodes import place_linear_node
from ridgeline.codegen.triton.quantized_linear import quantized_linear
from ridgeline.ir import quantized_linear as law
from ridgeline.ir.capture import capture
from ridgeline.passes.quantization.codec import QuantizedWeight
from ridgeline.passes.quantization.layer import QuantizedLinear

HALF, SINGLE = torch.float16, torch.float32
TILES = {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1}


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# tokens, N, K, bits, group size, group rows, powers, offset, dtype, splits
BINARY = {
    "one-bit-one-token": (1, 33, 75, 1, 32, 1, 0, False, HALF, 1),
    "two-bits-powers-split": (3, 33, 300, 2, 64, 1, 3, False, HALF, 2),
    "three-bits-offset": (5, 33, 260, 3, 128, 1, 0, True, HALF, 2),
    "four-bits-shared-rows": (2, 33, 130, 4, 96, 7, 1, True, HALF, 1),
    "one-group": (2, 20, 90, 3, 90, 1, 2, True, HALF, 1),
    "wide-tiles": (2, 33, 256, 2, 32, 1, 2, False, HALF, 1),
    "fp32": (3, 33, 140, 3, 64, 1, 2, True, SINGLE, 2),
    "many-rows": (65, 33, 75, 3, 32, 1, 3, True, HALF, 1),
    "columns": (3, 40, 75, 3, 1, 40, 3, False, HALF, 2),
    "columns-many-rows": (65, 40, 40, 2, 1, 40, 0, True, HALF, 1),
    "blocks": (3, 40, 75, 2, 8, 17, 2, True, HALF, 1),
    "blocks-fp32": (2, 40, 75, 2, 8, 17, 3, True, SINGLE, 1),
}
# tokens, N, K, bits, terms, group size, dtype, splits
SHIFT = {
    "four-bits": (1, 33, 300, 4, 1, 64, HALF, 2),
    "five-bits": (3, 33, 75, 5, 1, 75, HALF, 1),
    "six-bits": (3, 20, 130, 6, 1, 32, HALF, 1),
    "eight-bits": (3, 20, 75, 8, 1, 32, SINGLE, 1),
    "eight-bits-fp16": (3, 20, 75, 8, 1, 32, HALF, 1),
    "four-bits-two-terms": (3, 20, 75, 4, 2, 32, HALF, 1),
    "six-bits-two-terms": (17, 20, 256, 6, 2, 96, HALF, 1),
    "eight-bits-two-terms": (65, 20, 75, 8, 2, 32, HALF, 1),
}


def layer_error(
    codes: Tensor, scale: Tensor, offset: Tensor | None, x: Tensor, splits: int, **settings: Any
) -> float:
    """Of the kernel against the law in float64, with a row scale, a bias and an outlier in x."""
    (n, k), bits, group = codes.shape, settings["bits"], settings["group_size"]
    row_scale, bias = torch.rand(n).half(), torch.randn(n)
    row_scale[0] = 0
    x[0, k // 2] = 60000.0 if x.dtype == HALF else 1e20
    x[-1, 0] = 0
    weight = law.dequantize(
        law.pack_codes(codes, bits), scale, offset, in_features=k, **settings
    ).double()
    expected = (x.double() @ weight.T) * row_scale.double() + bias.double()
    if x.dtype == HALF:  # y must stay below fp16's largest number
        expected, bias, row_scale = (t / 64 for t in (expected, bias, row_scale))
    narrow = not shared_run(group, k)
    lift = lift_of(scale, offset) if settings["codec"] == "binary" else 1.0
    found = coded_linear(
        x,
        pack(codes, codec=settings["codec"], bits=bits),
        arranged(scale, narrow=narrow),
        None if offset is None else arranged(offset, narrow=narrow),
        bias,
        row_scale,
        lift=lift,
        splits=splits,
        **settings,
        **TILES,
    )
    # Row by row: the outlier must not hide what becomes of the others.
    return max(relative(*rows) for rows in zip(found, expected, strict=True))


def layer_errors() -> dict[str, float]:
    errors = {}
    for name, (tokens, n, k, bits, group, rows, powers, shifted, dtype, splits) in BINARY.items():
        shape = (-(-n // rows), -(-k // group), bits)
        scale = 0.02 * torch.rand(shape).to(dtype)
        if powers:
            signs = torch.randint(-1, 2, (*shape, powers))  # a third of the terms are zero
            scale = (torch.randint(44, 60, (*shape, powers)) * signs).to(torch.int8)
        scale[0, 0] = 0
        offset = 0.01 * torch.randn(shape[:2]).half() if shifted else None
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        x = torch.randn(tokens, 2 * k).to(dtype)[:, ::2]
        errors[f"binary-{name}"] = layer_error(
            codes, scale, offset, x, splits,
            codec="binary", bits=bits, group_size=group, group_rows=rows,
        )  # fmt: skip
    for name, (tokens, n, k, bits, terms, group, dtype, splits) in SHIFT.items():
        scale = 0.1 * torch.rand(n, -(-k // group)).to(dtype)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        x = torch.randn(tokens, k).to(dtype)
        errors[f"shift-{name}"] = layer_error(
            codes, scale, None, x, splits, codec="shift", bits=bits, group_size=group, terms=terms
        )
    return errors


# heads, M, N, D, E, dtype, chunks
ATTENTION = {
    "square": (2, 32, 32, 16, 16, HALF, 1),
    "ragged": (3, 37, 70, 24, 40, HALF, 3),
    "one-query-one-key": (2, 1, 1, 5, 3, SINGLE, 1),
    "fp32": (2, 20, 70, 32, 16, SINGLE, 2),
    "large-values": (1, 20, 70, 17, 16, SINGLE, 1),
}


def attention_errors() -> dict[str, float]:
    errors = {}
    for name, (heads, m, n, d, e, dtype, chunks) in ATTENTION.items():
        query = torch.randn(2, m, heads, d).to(dtype).transpose(1, 2)
        key = torch.randn(2, heads, d, n).to(dtype).transpose(2, 3)
        value = torch.randn(2, n, heads, e).to(dtype).transpose(1, 2)
        limits = torch.randn(2, heads, d).to(dtype).float()
        query[0, 0, 0] = limits[0, 0].to(dtype)  # not above its threshold
        key[0, 0, 0, 0] = torch.nan  # nor is this
        if name == "large-values":
            value = value * 1e30
        codes = [
            (x > limit.unsqueeze(-2)).double() * 2 - 1
            for x, limit in zip((query, key), limits, strict=True)
        ]
        scores = d + 1 + codes[0] @ codes[1].transpose(-1, -2)
        expected = scores @ value.double() / scores.sum(-1, keepdim=True)
        found = binary_attention(
            query, key, value, *limits,
            block_t=16, block_m=16, num_warps=4, num_stages=1, splits=chunks,
        )  # fmt: skip
        errors[f"attention-{name}"] = relative(found, expected)
    return errors


# codec settings, scale's trailing shape, offset ("integer", "floating" or None)
PLACED = {
    "uniform-symmetric": ({"bits": 4, "group_size": 32, "group_rows": 3}, (), None),
    "uniform-minimum": ({"bits": 4, "group_size": 32}, (), "floating"),
    "uniform-zero-point": ({"bits": 8, "group_size": 64, "group_rows": 5}, (), "integer"),
    "binary": ({"bits": 3, "group_size": 32, "codec": "binary"}, (3, 2), "floating"),
    "binary-narrow": (
        {"bits": 2, "group_size": 8, "group_rows": 20, "codec": "binary"}, (2,), "floating"
    ),
    "shift": ({"bits": 5, "group_size": 32, "codec": "shift"}, (), None),
}  # fmt: skip


def placed_errors() -> dict[str, float]:
    """Whole nodes with a permutation and a row scale, as they are put in a graph."""
    errors, n, k = {}, 33, 75
    launchers = {
        torch.ops.ridgeline.triton_quantized_linear.default: quantized_linear,
        torch.ops.ridgeline.triton_coded_linear.default: coded_linear,
    }
    for name, (settings, trailing, kind) in PLACED.items():
        bits = settings["bits"]
        shape = -(-n // settings.get("group_rows", 1)), -(-k // settings["group_size"])
        scale = torch.rand(*shape, *trailing).half()
        if len(trailing) == 2:
            scale = torch.randint(50, 60, (*shape, *trailing)).to(torch.int8)
        offset = None if kind is None else torch.randn(shape).half()
        if kind == "integer":
            offset = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        weight = QuantizedWeight(
            law.pack_codes(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits),
            scale,
            offset,
            in_features=k,
            row_scale=torch.rand(n).half(),
            permutation=torch.randperm(k).to(torch.int16),
            codec_name=settings.get("codec", "uniform"),
            **{key: value for key, value in settings.items() if key != "codec"},
        )
        layer = QuantizedLinear(weight, torch.randn(n))
        x = torch.randn(2, 3, k)
        module = capture(layer, (x,)).program.module
        (node,) = module.graph.find_nodes(op="call_function", target=law.QUANTIZED_LINEAR.overload)
        place_linear_node(node, module)
        node.target = functools.partial(launchers[node.target], **TILES)
        node.target.__name__ = "interpreted"
        module.graph.eliminate_dead_code()
        module.recompile()
        expected = x.double() @ weight.dequantize().double().T + layer.bias.double()
        errors[f"placed-{name}"] = relative(module(x)[0].detach(), expected)
    return errors


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        json.dump(layer_errors() | attention_errors() | placed_errors(), sys.stdout)
