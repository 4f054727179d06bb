"""What torch's kernels of attention store beside their result.

                           without a fused kernel (`fused`), scores and their softmax:
    2 B H Sq Skv max(4, itemsize) bytes, and K and V once for each head of Q

Source: torch's `_scaled_dot_product_attention_math`, and what Inductor makes of it; measured peaks
in tests/cost_model/test_lifetimes.py. Run one by one, without Inductor, it takes 2.75 arrays in
place of two.
"""

import functools
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from ridgeline.cost_model.count import argument
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.views import tensors_of
from ridgeline.ir.sizes import numbers

_NO_FLASH = ("sm_70", "sm_75")
_CUDNN = ("sm_90", "sm_100")


def attention_workspace(node: fx.Node, target: Target) -> int:
    """Bytes that torch's kernels of `scaled_dot_product_attention` store beside its result."""
    query, key, value = (tensors_of([node.args[i]])[0] for i in range(3))
    (batch, heads, q, size), (_, kv_heads, kv, _) = _dimensions(query), _dimensions(key)
    values, width = numbers(value.shape)[-1], max(4, query.dtype.itemsize)
    call = Call(
        query.dtype, query.dim(), heads, kv_heads, size, values,
        argument(node, "attn_mask") is not None, bool(argument(node, "is_causal")), q == kv,
    )  # fmt: skip
    if fused(call, target):
        return 0
    repeated = kv * (size + values) if heads != kv_heads else 0
    return width * batch * heads * (2 * q * kv + repeated)


def _dimensions(operand: Tensor) -> tuple[int, int, int, int]:
    """(batch, heads, length, features); of [batch, length, features] and [length, features] what
    is missing is 1."""
    *outer, length, features = numbers(operand.shape)
    heads = outer.pop() if len(outer) > 1 else 1
    return prod(outer), heads, length, features


@dataclass(frozen=True, slots=True)
class Call:
    """What torch chooses a kernel of attention by. square: as many queries as keys."""

    dtype: torch.dtype
    rank: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    masked: bool
    causal: bool
    square: bool


def fused(call: Call, target: Target) -> bool:
    """Has torch a kernel for it that stores no scores? On a CPU as torch says itself; on a GPU by
    what its such kernels ask for (`sdp_utils.cpp`): flash attention two-byte numbers, heads of one
    size to 256, sm_80, no mask, and no causal mask over unequal lengths; the memory-efficient one
    heads of their own for K and V, of a multiple of 16 bytes; cuDNN's two-byte numbers and heads
    of a multiple of 8 to 128. cuDNN's comes before the one that stores scores on Hopper and B200
    alone, with cuDNN 9.15.1 or later (torch 2.11 for CUDA 13 brings 9.19)."""
    if target.kind == "cpu":
        return _fused_on_cpu(call)
    c, half = call, call.dtype in (torch.float16, torch.bfloat16)
    flash = half and target.arch not in _NO_FLASH and c.size == c.value_size <= 256
    flash = flash and not c.masked and (c.square or not c.causal)
    aligned = all(n * c.dtype.itemsize % 16 == 0 for n in (c.size, c.value_size))
    efficient = (half or c.dtype == torch.float32) and aligned and c.heads == c.kv_heads
    cudnn = half and target.arch in _CUDNN and max(c.size, c.value_size) <= 128
    cudnn = cudnn and c.size % 8 == c.value_size % 8 == 0
    return c.rank == 4 and (flash or efficient or cudnn)


@functools.cache
def _fused_on_cpu(c: Call) -> bool:
    def drawn(number: int, features: int) -> Tensor:
        shape = (1, number, 2, features) if c.rank == 4 else (2,) * (c.rank - 1) + (features,)
        return torch.zeros(shape, dtype=c.dtype, device="cpu")

    operands = drawn(c.heads, c.size), drawn(c.kv_heads, c.size), drawn(c.kv_heads, c.value_size)
    mask = torch.zeros((2, 2), dtype=c.dtype, device="cpu") if c.masked else None
    grouped = c.heads != c.kv_heads
    choice = torch._fused_sdp_choice(*operands, mask, 0.0, c.causal, enable_gqa=grouped)
    return choice != torch.nn.attention.SDPBackend.MATH.value
