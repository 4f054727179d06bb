"""Linear layer with 4- or 8-bit integer weights in Triton, with a deterministic split of K.

Law, with g = k // group_size (the last group may be shorter):

    ŵ[n,k] = scale[n,g] * (code[n,k] - 2**(bits-1))         scheme "symmetric", offset absent
    ŵ[n,k] = scale[n,g] * (code[n,k] - offset[n,g])         scheme "zero_point", offset integer
    ŵ[n,k] = scale[n,g] * code[n,k] + offset[n,g]           scheme "minimum", offset floating
    y[m,n] = sum_k x[m,k] ŵ[n,k] + bias[n]                  accumulated in fp32

The kernel never rounds ŵ. Codes, and codes minus a zero point within [-128, 255], are exact in
fp16 and bf16, so the matrix unit multiplies x by integers and the fp32 sum over one tile is scaled:

    y[m,n] = sum_tiles scale[n,g] * (sum_k x[m,k] c[n,k]) + offset[n,g] * (sum_k x[m,k])

The product is formed transposed, ŵ xᵀ: the weight takes the long side of the matrix instruction
(16, 32 or 64 rows), so that a single token costs 16 columns rather than 64 rows, and the codes
reach it from registers.

Storage for the GPU (`pack`, a bijection with the canonical one): int32 [N, ceil(K/T) * T*bits/32],
T = `packing_tile`. Byte j of a tile of T 4-bit codes holds code j in its low and code j + T/2 in
its high nibble, so that both halves meet a contiguous part of x; 8-bit tiles are bytes in order;
the last tile is filled with zeros. Every row starts on 16 bytes.
Source: MARLIN (symmetric, group scale); HQQ and GGUF (zero point, minimum). This file needs only
torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.split_sum import quantized_linear_reduce

# The interpreter reads bf16 operands of `tl.dot` as integers; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SYMMETRIC, ZERO_POINT, MINIMUM = 0, 1, 2


@triton.jit
def _exact(code, CENTRE: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr):
    """code - CENTRE as COMPUTE numbers, exactly. An integer-to-float conversion runs at a quarter
    of the arithmetic rate, so the code is OR-ed into the mantissa of 1024 (fp16) or 128 (bf16)."""
    if COMPUTE == tl.float16:  # noqa: SIM300
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + CENTRE)
    if COMPUTE == tl.bfloat16 and BITS == 4:  # noqa: SIM300
        return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + CENTRE)
    return (code.to(tl.float32) - CENTRE).to(COMPUTE)


@triton.jit
def _product(
    code,
    zero,
    x,
    sums,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sums[BLOCK_N, BLOCK_M] + c[BLOCK_N, T] x[T, BLOCK_M] in fp32, c the centred codes."""
    w = _exact(code, 2 ** (BITS - 1) if SCHEME == 0 else 0, BITS, COMPUTE)
    if SCHEME == 1:
        w -= zero
    if UPCAST:
        return sums + tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    return tl.dot(w, x, sums, input_precision="ieee")


@triton.jit
def quantized_linear_forward(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    tiles,
    tiles_per_split,
    tiles_per_group,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_sn,
    stride_sg,
    stride_on,
    stride_og,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    SCHEME: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED_K: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (ceil(M / BLOCK_M) * ceil(N / BLOCK_N), splits). The law stands at the top.

    out_ptr: y [M,N], or with SPLIT the fp32 workspace [splits,M,N] of partial sums without bias.
    words_ptr: uint8 view of the GPU storage, stride_wn in bytes.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    m = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    in_m = m < tokens
    in_n = n < out_features

    BYTES: tl.constexpr = TILE * BITS // 8
    j = tl.arange(0, BYTES)
    wide_n = n.to(tl.int64)
    x_tile = x_ptr + m.to(tl.int64)[None, :] * stride_xm + j[:, None] * stride_xk
    words_tile = words_ptr + wide_n[:, None] * stride_wn + j[None, :]
    x_tile += first * TILE * stride_xk
    words_tile += first * BYTES
    scale_row = scale_ptr + wide_n * stride_sn
    offset_row = offset_ptr + wide_n * stride_on

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(first, last):
        codes = tl.load(words_tile, mask=in_n[:, None], other=0)
        in_low = in_m[None, :]
        if RAGGED_K:
            in_low = in_low & (tile * TILE + j < in_features)[:, None]
        x_low = tl.load(x_tile, mask=in_low, other=0.0).to(COMPUTE)
        group = tile // tiles_per_group
        zero = None
        if SCHEME == 1:
            offset = tl.load(offset_row + group * stride_og, mask=in_n, other=0)
            zero = offset.to(tl.float32).to(COMPUTE)[:, None]
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if SCHEME == 2:
            x_sum = tl.sum(x_low.to(tl.float32), 0)
        if BITS == 4:
            in_high = in_m[None, :]
            if RAGGED_K:
                in_high = in_high & (tile * TILE + BYTES + j < in_features)[:, None]
            x_high = tl.load(x_tile + BYTES * stride_xk, mask=in_high, other=0.0).to(COMPUTE)
            part = _product(codes & 15, zero, x_low, part, SCHEME, BITS, COMPUTE, UPCAST)
            part = _product(codes >> 4, zero, x_high, part, SCHEME, BITS, COMPUTE, UPCAST)
            if SCHEME == 2:
                x_sum += tl.sum(x_high.to(tl.float32), 0)
        else:
            part = _product(codes, zero, x_low, part, SCHEME, BITS, COMPUTE, UPCAST)
        scale = tl.load(scale_row + group * stride_sg, mask=in_n, other=0.0).to(tl.float32)
        sums += scale[:, None] * part
        if SCHEME == 2:
            offset = tl.load(offset_row + group * stride_og, mask=in_n, other=0.0).to(tl.float32)
            sums += offset[:, None] * x_sum[None, :]
        x_tile += TILE * stride_xk
        words_tile += BYTES

    if SPLIT:
        out_ptr += split.to(tl.int64) * tokens * out_features
    elif BIAS:
        sums += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + m.to(tl.int64)[None, :] * out_features + n[:, None],
        sums.to(out_ptr.dtype.element_ty),
        mask=in_m[None, :] & in_n[:, None],
    )


def packing_tile(group_size: int, in_features: int) -> int:
    """T: the codes of one row that are multiplied together; a tile never straddles two groups."""
    if group_size >= in_features:
        return min(128, max(32, triton.next_power_of_2(in_features)))
    tile = min(128, group_size & -group_size)
    if tile < 32:
        raise ValueError(f"expected a group size divisible by 32, found {group_size}")
    return tile


def pack(packed: Tensor, *, bits: int, group_size: int, in_features: int) -> Tensor:
    """Canonical storage (uint8 [N, ceil(K*bits/8)]) -> GPU storage (int32, see the top)."""
    tile = packing_tile(group_size, in_features)
    width = -(-in_features // tile) * tile * bits // 8
    padded = torch.nn.functional.pad(packed, (0, width - packed.shape[1]))
    if bits == 4:
        if in_features % 2:  # the canonical filler nibble is not ours to keep
            padded[:, in_features // 2] &= 15
        codes = torch.stack((padded & 15, padded >> 4), dim=-1).reshape(-1, 2, tile // 2)
        padded = (codes[:, 0] | (codes[:, 1] << 4)).reshape(len(packed), width)
    return padded.contiguous().view(torch.int32)


def unpack(words: Tensor, *, bits: int, group_size: int, in_features: int) -> Tensor:
    """The inverse of `pack`."""
    tile = packing_tile(group_size, in_features)
    storage = words.view(torch.uint8)
    if bits == 4:
        halves = storage.reshape(-1, tile // 2)
        codes = torch.cat((halves & 15, halves >> 4), dim=1).reshape(len(words), -1, 2)
        storage = codes[..., 0] | (codes[..., 1] << 4)
    return storage[:, : -(-in_features * bits // 8)].contiguous()


def quantized_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    multiply: torch.dtype | None = None,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    splits: int = 1,
) -> Tensor:
    """Launches the kernel, and the reduction where splits > 1.

    x [..., K] fp16, bf16 or fp32, any strides; words from `pack`; scale, offset [N, groups], any
    strides (group-major memory, `scale.t().contiguous().t()`, is read coalesced); bias [N];
    multiply: the dtype in which products are formed (default x.dtype). Returns [..., N], x.dtype.
    """
    in_features, out_features = x.shape[-1], words.shape[0]
    tile = packing_tile(group_size, in_features)
    tiles = triton.cdiv(in_features, tile)
    x2 = x.reshape(-1, in_features)
    tokens = x2.shape[0]
    out = x.new_empty(*x.shape[:-1], out_features)
    if out.numel() == 0:
        return out
    scheme = SYMMETRIC
    if offset is not None:
        scheme = MINIMUM if offset.is_floating_point() else ZERO_POINT
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)  # no split is empty
    target = out
    if splits > 1:
        target = x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    compute = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    programs = triton.cdiv(tokens, block_m) * triton.cdiv(out_features, block_n)
    quantized_linear_forward[(programs, splits)](
        x2,
        words.view(torch.uint8),
        scale,
        scale if offset is None else offset,
        scale if bias is None else bias,
        target,
        tokens,
        out_features,
        in_features,
        tiles,
        per_split,
        max(1, group_size // tile) if group_size < in_features else tiles,
        *x2.stride(),
        words.stride(0) * 4,
        *scale.stride(),
        *(scale.stride() if offset is None else offset.stride()),
        BITS=bits,
        TILE=tile,
        SCHEME=scheme,
        BIAS=bias is not None,
        RAGGED_K=in_features % tile != 0,
        SPLIT=splits > 1,
        COMPUTE=compute[multiply or x.dtype],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        UPCAST=INTERPRETED,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if splits > 1:
        block = 1024
        quantized_linear_reduce[(triton.cdiv(out.numel(), block),)](
            target,
            scale if bias is None else bias,
            out,
            out.numel(),
            out_features,
            splits,
            BIAS=bias is not None,
            BLOCK=block,
        )
    return out


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: 4 bits, groups of 128, K = 576, minimum, bias."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (80, 576), generator=generator, dtype=torch.uint8)
    scale, offset = torch.rand(2, 80, 5, generator=generator)
    bias = torch.randn(80, generator=generator)
    x = torch.randn(7, 576, generator=generator).half()
    words = pack(codes[:, ::2] | codes[:, 1::2] << 4, bits=4, group_size=128, in_features=576)
    tensors = (t.to(device) for t in (x, words, scale, -8 * offset, bias))
    y = quantized_linear(*tensors, bits=4, group_size=128, **config).cpu().double()

    def per_column(t: Tensor) -> Tensor:
        return t.double().repeat_interleave(128, dim=1)[:, :576]

    weight = per_column(scale) * codes + per_column(-8 * offset)
    expected = x.double() @ weight.T + bias.double()
    error = float((y - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-3")
    return error
