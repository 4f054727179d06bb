"""The gated activation y = act(gate) * up, elementwise, on rows of any stride.

    silu x σ(x), sigmoid σ(x), relu max(x, 0), gelu x (1 + erf(x / √2)) / 2,
    gelu_tanh x σ(2 √(2/π) (x + 0.044715 x³))

Arithmetic in fp32, one rounding. A program takes BLOCK elements of one row; gate and up may be the
halves of one packed row. Source: Shazeer, GLU Variants Improve Transformer. This file needs only
torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ACTIVATIONS = ("silu", "sigmoid", "relu", "gelu", "gelu_tanh")


@triton.jit
def gated_activation_rows(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, ceil(columns / BLOCK)). out contiguous; the last dimension of all is."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        a = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        a = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        a = x * tl.sigmoid(x * (1.5957691216057308 + 0.07135481627159 * x * x))
    elif ACTIVATION == "sigmoid":
        a = tl.sigmoid(x)
    else:
        a = x * tl.sigmoid(x)
    y = (a * u).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + column, y, mask=inside)


def gated_activation(
    gate: Tensor, up: Tensor, *, activation: str, block: int, num_warps: int, num_stages: int
) -> Tensor:
    """Launches the kernel. gate, up: one shape and dtype; rows that no stride joins are copied."""
    if gate.shape != up.shape or gate.dtype != up.dtype or activation not in ACTIVATIONS:
        raise ValueError(
            f"expected gate and up of one shape and dtype and an activation of {ACTIVATIONS},"
            f" found {gate.dtype} {list(gate.shape)}, {up.dtype} {list(up.shape)}, {activation!r}"
        )
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    n = gate.shape[-1]
    gate, up = (x.reshape(-1, n) for x in (gate, up))
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    gated_activation_rows[(gate.shape[0], triton.cdiv(n, block))](
        gate, up, out, n, gate.stride(0), up.stride(0),
        ACTIVATION=activation, BLOCK=block, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: halves of a packed tensor."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(3, 5, 400, generator=generator).to(device, torch.float16)
    gate, up = packed.chunk(2, dim=-1)
    out = gated_activation(gate, up, activation="silu", **config)
    wide = gate.double()
    expected = wide * torch.sigmoid(wide) * up.double()
    error = float((out.double() - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-3")
    return error
