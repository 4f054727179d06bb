"""Runs the kernels in Triton's interpreter and prints {case: relative error} as JSON.

A script, started by test_interpreted.py in a process of its own: the interpreter is chosen by an
environment variable that Triton reads when a kernel is defined.
"""

import json
import sys

import torch
from torch import Tensor

from ridgeline.codegen.triton.attention import attention
from ridgeline.codegen.triton.attention_backward import attention_backward
from ridgeline.codegen.triton.attention_decode import attention_decode
from ridgeline.codegen.triton.norm import norm
from ridgeline.codegen.triton.quantized_linear import pack, quantized_linear, unpack
from ridgeline.ir import attention as attention_law
from ridgeline.ir import layer_norm as layer_law
from ridgeline.ir import quantized_linear as linear_law
from ridgeline.ir import rms_norm as rms_law

TILES = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
HALF, SINGLE = torch.float16, torch.float32


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# heads, key heads, Sq, Sk, D, Dv, dtype, diagonal, mask
ATTENTION = {
    "grouped-ragged-causal": (4, 2, 37, 50, 64, 64, HALF, 13, None),
    "top-left-longer-keys": (2, 1, 40, 70, 32, 32, SINGLE, 0, None),
    "empty-rows": (2, 2, 40, 24, 16, 16, HALF, -16, None),
    "padded-dims": (2, 2, 33, 65, 40, 24, SINGLE, None, None),
    "boolean-row-mask": (2, 1, 35, 67, 32, 32, HALF, None, "boolean"),
    "dead-rows-mask": (2, 2, 35, 67, 32, 32, SINGLE, None, "dead"),
    "bias-mask": (2, 2, 35, 67, 32, 32, HALF, 32, "bias"),
    "finfo-min-mask": (2, 2, 35, 67, 32, 32, SINGLE, None, "minimum"),
    "one-key": (2, 2, 3, 1, 16, 16, HALF, None, None),
}
SCHEMES = ("symmetric", "zero_point", "minimum")
# tokens, N, K, bits, group, dtype, splits, bias
LINEAR = {
    "k-576-group-128": (1, 40, 576, 4, 128, HALF, 1, True),
    "k-576-split": (5, 33, 576, 4, 128, HALF, 3, True),
    "group-32-odd-k": (17, 33, 75, 4, 32, SINGLE, 1, False),
    "group-64-split": (3, 48, 320, 4, 64, SINGLE, 2, False),
    "group-96": (2, 20, 200, 4, 96, HALF, 1, False),
    "one-group": (4, 16, 48, 4, 48, SINGLE, 1, True),
    "eight-bits": (33, 40, 200, 8, 64, HALF, 2, True),
}


def make_mask(kind: str | None, rows: int, columns: int) -> Tensor | None:
    if kind is None:
        return None
    keep = torch.rand(2, 1, rows, columns) > 0.3
    if kind == "boolean":
        return keep[:, :, :1]
    if kind == "dead":
        keep[:, :, 3:9] = False
        return keep
    if kind == "bias":
        return torch.randn(1, 2, rows, columns).half()
    added = torch.zeros(2, 1, rows, columns).masked_fill(~keep, torch.finfo(torch.float32).min)
    added[:, :, 5] = torch.finfo(torch.float32).min  # every key: the law gives the mean of V
    added[:, :, 6] = -torch.inf  # every key excluded: the law gives 0
    return added


def unequal(found: Tensor, expected: Tensor) -> float:
    """0 where they agree, infinities included, and otherwise infinity."""
    return 0.0 if torch.allclose(found, expected, atol=1e-3) else float("inf")


def attention_errors() -> dict[str, float]:
    errors = {}
    for name, (heads, key_heads, rows, keys, d, dv, dtype, diagonal, kind) in ATTENTION.items():
        # [B,S,H,D] in memory, as models keep it.
        query = torch.randn(2, rows, heads, d).to(dtype).transpose(1, 2)
        key = torch.randn(2, keys, key_heads, d).to(dtype).transpose(1, 2)
        value = torch.randn(2, key_heads, dv, keys).to(dtype).transpose(2, 3)
        mask = make_mask(kind, rows, keys)
        options = {"scale": -0.2 if name == "one-key" else d**-0.5, "diagonal": diagonal}
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        wide = [t.double() for t in (query, key, value)]
        expected = attention_law.reference(*wide, wide_mask, **options)
        out, (peak, log_total) = attention(query, key, value, mask, **options, **TILES)
        lse = peak + log_total
        errors[f"attention-{name}"] = relative(out, expected)
        if name == "empty-rows":
            dead = torch.arange(rows) + diagonal < 0
            good = bool((lse[:, :, dead] == torch.inf).all() and (out[:, :, dead] == 0).all())
            errors["attention-empty-rows-are-zero"] = 0.0 if good else float("inf")
        sinks = torch.randn(heads).to(dtype)
        sinks[0] = -torch.inf  # a sink that takes nothing
        taken = attention_law.reference(*wide, wide_mask, sinks.double(), **options)
        out, stats = attention(query, key, value, mask, sinks, **options, **TILES)
        with_sinks = stats.sum(0)
        errors[f"attention-sinks-{name}"] = relative(out, taken)
        capped = options | {"soft_cap": 1.5}
        expected_capped = attention_law.reference(*wide, wide_mask, **capped)
        out, _ = attention(query, key, value, mask, **capped, **TILES)
        errors[f"attention-capped-{name}"] = relative(out, expected_capped)
        few = rows if rows * heads // key_heads <= 32 else 5
        mask = None if mask is None else mask[:, :, : min(few, mask.shape[2])]
        wide_mask = None if wide_mask is None else wide_mask[:, :, : min(few, wide_mask.shape[2])]
        expected = attention_law.reference(wide[0][:, :, :few], *wide[1:], wide_mask, **options)
        decode, decode_lse = attention_decode(
            query[:, :, :few], key, value, mask, splits=3, **options, **TILES
        )
        errors[f"decode-{name}"] = relative(decode, expected)
        decode_capped, _ = attention_decode(
            query[:, :, :few], key, value, mask, splits=3, **capped, **TILES
        )
        taken = attention_law.reference(wide[0][:, :, :few], *wide[1:], wide_mask, **capped)
        errors[f"decode-capped-{name}"] = relative(decode_capped, taken)
        errors[f"decode-lse-{name}"] = unequal(decode_lse, lse[:, :, :few])
        decode, decode_lse = attention_decode(
            query[:, :, :few], key, value, mask, sinks, splits=3, **options, **TILES
        )
        taken = attention_law.reference(
            wide[0][:, :, :few], *wide[1:], wide_mask, sinks.double(), **options
        )
        errors[f"decode-sinks-{name}"] = relative(decode, taken)
        errors[f"decode-sinks-lse-{name}"] = unequal(decode_lse, with_sinks[:, :, :few])
    return errors


def backward_errors() -> dict[str, float]:
    """Of dq, dk and dv, each with and without a soft cap, from what the forward kernel kept."""
    errors = {}
    for name, (heads, key_heads, rows, keys, d, dv, dtype, diagonal, kind) in ATTENTION.items():
        shapes = (heads, rows, d), (key_heads, keys, d), (key_heads, keys, dv), (heads, rows, dv)
        *operands, grad = (torch.randn(2, *shape).to(dtype) for shape in shapes)
        mask = make_mask(kind, rows, keys)
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        for soft_cap in (None, 1.5):
            options = {"scale": d**-0.5, "diagonal": diagonal, "soft_cap": soft_cap}
            wide = [x.double().requires_grad_() for x in operands]
            attention_law.reference(*wide, wide_mask, **options).backward(grad.double())
            out, stats = attention(*operands, mask, **options, **TILES)
            delta = (grad.float() * out.float()).sum(-1).contiguous()
            found = attention_backward(
                grad, *operands, mask, stats, delta, **options, keys=TILES, queries=TILES
            )
            for letter, own, leaf in zip("qkv", found, wide, strict=True):
                # what cancels is judged beside dv, which does not
                size = leaf.grad.norm() + 0.1 * wide[2].grad.norm()
                error = float((own.double() - leaf.grad).norm() / size)
                errors[f"d{letter}-{soft_cap}-{name}"] = error
    return errors


def linear_errors() -> dict[str, float]:
    errors = {}
    for name, (tokens, n, k, bits, group, dtype, splits, with_bias) in LINEAR.items():
        groups = -(-k // group)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        canonical = linear_law.pack_codes(codes, bits)
        words = pack(canonical, bits=bits, group_size=group, in_features=k)
        back = unpack(words, bits=bits, group_size=group, in_features=k)
        errors[f"pack-{name}"] = 0.0 if torch.equal(back, canonical) else float("inf")
        scale = torch.rand(groups, n).to(dtype).t()
        bias = torch.randn(n).to(dtype) if with_bias else None
        x = torch.randn(2, tokens, k).to(dtype)[1:]
        for scheme in SCHEMES:
            offset = None
            if scheme == "zero_point":
                offset = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
            elif scheme == "minimum":
                offset = (-(2 ** (bits - 1)) * torch.rand(n, groups)).to(dtype)
            weight = linear_law.dequantize(
                canonical, scale, offset, bits=bits, group_size=group, in_features=k
            )
            expected = x.double() @ weight.double().T
            expected = expected if bias is None else expected + bias.double()
            found = quantized_linear(
                x, words, scale, offset, bias, bits=bits, group_size=group, splits=splits,
                block_m=16, block_n=32, num_warps=4, num_stages=1,
            )  # fmt: skip
            errors[f"linear-{name}-{scheme}"] = relative(found, expected)
    return errors


# rows, N, dtype, BLOCK_M
NORMS = {
    "one-row": ((1,), 33, SINGLE, 1),
    "ragged": ((2, 3), 100, HALF, 4),
    "whole-block": ((5,), 64, SINGLE, 2),
}


def norm_errors() -> dict[str, float]:
    errors = {}
    for name, (rows, size, dtype, block_m) in NORMS.items():
        x, residual = (torch.randn(*rows, size).to(dtype) for _ in range(2))
        weight, bias = torch.randn(size).to(dtype), torch.randn(size)
        tiles = {"block_m": block_m, "block_n": 1 << (size - 1).bit_length(), "num_warps": 4}
        for center in (False, True):
            for added in (None, residual):
                form = "layer" if center else "rms"
                case = f"norm-{name}-{form}{'' if added is None else '-of-sum'}"
                shift = 0.0 if center else 1.0
                y, total = norm(
                    x, added, weight, bias if center else None,
                    eps=1e-5, shift=shift, center=center, **tiles,
                )  # fmt: skip
                sums = x if added is None else x + added
                errors[f"{case}-sum"] = 0.0 if torch.equal(total, sums) else float("inf")
                if center:
                    expected = layer_law.reference(
                        sums.double(), weight.double(), bias.double(), eps=1e-5
                    )
                else:
                    expected = rms_law.reference(
                        sums.double(), weight.double(), eps=1e-5, shift=shift
                    )
                errors[case] = relative(y, expected)
    return errors


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump(attention_errors() | backward_errors() | linear_errors() | norm_errors(), sys.stdout)
