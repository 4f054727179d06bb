"""Linear layer with binary-coded or shift weights in Triton, with a deterministic split of K.

Law, with j the column as stored, g = j // group_size and r = n // group_rows:

    y[m,n] = row_scale[n] sum_j x[m,j] ŵ[n,j] + bias[n]                  accumulated in fp32
    codec "binary"    ŵ[n,j] = sum_i α[r,g,i] (2 bit_i(code[n,j]) - 1) + offset[r,g]
    codec "shift"     ŵ[n,j] = scale[r,g] sum_t ±2**-e_t(code[n,j])

α is floating or a sum of signed powers of two held as int8 (v stands for sign(v) 2**(|v| - 64), 0
for 0), which become fp32 by writing the exponent field; a permutation of the columns is applied to
x before the call. Three ways (`coded_storage.product_form`):

    exact     no weight is rounded: ±1 and ±2**-e are exact in fp16 and bf16, so the matrix unit
              multiplies x by them and the fp32 sum over columns of one group takes the α or the
              scale: one product per plane. Few rows, and "shift" always.
    rounded   ŵ is built in fp32 and rounded once to the dtype of the products: one product for all
              planes. "binary" with many rows, and with fp32, where rounding changes nothing.
    halved    only for groups narrower than the columns of one product (ShiftAddLLM's column- and
              block-wise ones), which several rows share: ±1 multiplies α_i x, formed in fp32 and
              held as two numbers, rounded value and rest. With many rows the rest is left out.

`lift`, a power of two that brings the largest |ŵ| below 1, keeps fp16 out of its subnormal numbers.
The product is formed transposed, ŵ xᵀ: the weight takes the long side of the matrix instruction.

Storage: `coded_storage`, whose layout makes every shift below a constant.
Sources: ShiftAddLLM after LUT-GEMM (binary coding, powers of two); DeepShift and ShiftAddViT
(shift).
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.coded_parts import (
    read_alpha,
    read_columns,
    read_octets,
    shifts_of,
    signs_of,
)
from ridgeline.codegen.triton.coded_storage import (
    pack,
    packing_tile,
    product_dtype,
    product_form,
    shared_run,
)
from ridgeline.codegen.triton.split_sum import quantized_linear_reduce

# The interpreter reads bf16 operands of `tl.dot` as integers; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(w, x, sums, UPCAST: tl.constexpr):
    """sums[BLOCK_N, BLOCK_M] + w[BLOCK_N, J] x[J, BLOCK_M] in fp32."""
    if UPCAST:
        return sums + tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    return tl.dot(w, x, sums, input_precision="ieee")


@triton.jit
def coded_linear_forward(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    tiles,
    tiles_per_split,
    group_size,
    groups,
    group_rows,
    lift,
    unlift,
    stride_xm,
    stride_xk,
    stride_row,
    stride_sr,
    stride_sg,
    stride_sp,
    stride_st,
    stride_or,
    stride_og,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    OFFSET: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED_K: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (ceil(M / BLOCK_M) * ceil(N / BLOCK_N), splits). The law stands at the top.

    scale, offset: canonical shapes [R,G,(q,(T))] and [R,G], any strides.
    out_ptr: y [M,N], or with SPLIT the fp32 workspace [splits,M,N] of partial sums without bias.
    words_ptr: uint8 view of the GPU storage; stride_row = N * TILE / 8, a byte row of all n.
    TERMS: of a code ("shift"), or powers of two per α, 0 where it is floating ("binary").
    RUN: parts of J columns that share their group; 0: groups are narrower than J, and a block of n
    lies within one group row.
    """
    J: tl.constexpr = TILE // 8
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    m = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) // token_tiles
    split = tl.program_id(1)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    in_m = m < tokens
    j = tl.arange(0, J)
    if RUN > 0:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < out_features
        r = n // group_rows
    else:  # a block stays within one group row, so that a column has one α
        blocks = tl.cdiv(group_rows, BLOCK_N)
        r = block // blocks
        n = r * group_rows + block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < tl.minimum(out_features, (r + 1) * group_rows)

    x_tile = x_ptr + m.to(tl.int64)[None, :] * stride_xm + j[:, None] * stride_xk
    x_tile += first.to(tl.int64) * TILE * stride_xk
    words = words_ptr + n.to(tl.int64)[:, None] * J + j[None, :]
    words += first.to(tl.int64) * BITS * stride_row
    POWERS: tl.constexpr = TERMS if CODEC == 0 else 0
    PLANES: tl.constexpr = BITS if CODEC == 0 else 1
    scale_row = scale_ptr + r * stride_sr
    offset_row = offset_ptr + r * stride_or

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if OFFSET and RUN == 0:
        offsets = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(first, last):
        column = tile * TILE
        if RUN == 0:
            for run in range(8):  # not unrolled: the code would be eight times as long
                k = column + run * J + j
                inside = k < in_features
                group = k // group_size
                x = read_columns(
                    x_tile, run, column, in_m, in_features, stride_xk, J, RAGGED_K, COMPUTE
                ).to(tl.float32)
                for plane in tl.static_range(PLANES):
                    at = scale_row + group * stride_sg + plane * stride_sp
                    scaled = x * (read_alpha(at, inside, stride_st, POWERS) * lift)[:, None]
                    w = signs_of(read_octets(words, plane, stride_row, in_n), run, COMPUTE)
                    rounded = scaled.to(COMPUTE)
                    sums = _dot(w, rounded, sums, UPCAST)
                    if FORM == 2:
                        rest = (scaled - rounded.to(tl.float32)).to(COMPUTE)
                        sums = _dot(w, rest, sums, UPCAST)
                if OFFSET:
                    offset = tl.load(offset_row + group * stride_og, mask=inside, other=0.0)
                    offsets += tl.sum(x * (offset.to(tl.float32) * lift)[:, None], 0)
        else:
            for run in tl.static_range(8 // RUN):
                # The columns that fill up the last tile are counted to the last group.
                group = tl.minimum((column + run * RUN * J) // group_size, groups - 1)
                at = scale_row + group * stride_sg
                if OFFSET:
                    offset = tl.load(offset_row + group * stride_og, mask=in_n, other=0.0)
                    offset = offset.to(tl.float32)
                if FORM == 0:
                    if OFFSET:
                        x_sum = tl.zeros((BLOCK_M,), tl.float32)
                    for plane in tl.static_range(PLANES):
                        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                        for s in tl.static_range(run * RUN, run * RUN + RUN):
                            x = read_columns(
                                x_tile, s, column, in_m, in_features, stride_xk, J, RAGGED_K,
                                COMPUTE,
                            )  # fmt: skip
                            if CODEC == 0:
                                w = signs_of(
                                    read_octets(words, plane, stride_row, in_n), s, COMPUTE
                                )
                            else:
                                w = shifts_of(words, s, stride_row, in_n, BITS, TERMS, COMPUTE)
                            part = _dot(w, x, part, UPCAST)
                            if OFFSET and plane == 0:
                                x_sum += tl.sum(x.to(tl.float32), 0)
                        alpha = read_alpha(at + plane * stride_sp, in_n, stride_st, POWERS)
                        sums += alpha[:, None] * part
                    if OFFSET:
                        sums += offset[:, None] * x_sum[None, :]
                else:
                    for s in tl.static_range(run * RUN, run * RUN + RUN):
                        w = tl.zeros((BLOCK_N, J), tl.float32)
                        for plane in tl.static_range(PLANES):
                            minus = (read_octets(words, plane, stride_row, in_n) >> s) & 1
                            alpha = (
                                read_alpha(at + plane * stride_sp, in_n, stride_st, POWERS) * lift
                            )
                            w += tl.where(minus != 0, -alpha[:, None], alpha[:, None])
                        if OFFSET:
                            w += (offset * lift)[:, None]
                        x = read_columns(
                            x_tile, s, column, in_m, in_features, stride_xk, J, RAGGED_K, COMPUTE
                        )
                        sums = _dot(w.to(COMPUTE), x, sums, UPCAST)
        x_tile += TILE * stride_xk
        words += BITS * stride_row

    if OFFSET and RUN == 0:
        sums += offsets[None, :]
    if RUN == 0 or FORM > 0:
        sums *= unlift
    if ROW_SCALE:
        sums *= tl.load(row_scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        out_ptr += split.to(tl.int64) * tokens * out_features
    elif BIAS:
        sums += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + m.to(tl.int64)[None, :] * out_features + n[:, None],
        sums.to(out_ptr.dtype.element_ty),
        mask=in_m[None, :] & in_n[:, None],
    )


def coded_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    codec: str,
    bits: int,
    group_size: int,
    group_rows: int = 1,
    terms: int = 1,
    lift: float = 1.0,
    multiply: torch.dtype | None = None,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    splits: int = 1,
) -> Tensor:
    """Launches the kernel, and the reduction where splits > 1.

    x [..., K] fp16, bf16 or fp32, any strides, columns as stored; words from
    `coded_storage.pack`; scale, offset in their canonical shapes, any strides (`arranged` is read
    coalesced); bias, row_scale [N]; terms as the op's; lift from
    `coded_storage.lift_of`; multiply: the dtype in which products are formed (default x.dtype).
    Returns [..., N], x.dtype. Raises ValueError for "shift" codes in groups that are no multiple
    of 32 columns.
    """
    in_features, (tiles, _, out_features, _) = x.shape[-1], words.shape
    tile, run = packing_tile(in_features), shared_run(group_size, in_features)
    if codec == "shift" and not run:
        raise ValueError(f"expected a group size divisible by 32, found {group_size}")
    x2 = x.reshape(-1, in_features)
    tokens = x2.shape[0]
    out = x.new_empty(*x.shape[:-1], out_features)
    if out.numel() == 0:
        return out
    compute = product_dtype(multiply or x.dtype, codec=codec, bits=bits, terms=terms)
    powers = 0 if scale.is_floating_point() else scale.shape[3]
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)  # no split is empty
    target = out
    if splits > 1:
        target = x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    blocks = triton.cdiv(out_features, block_n)
    if not run:
        blocks = scale.shape[0] * triton.cdiv(group_rows, block_n)
    programs = triton.cdiv(tokens, block_m) * blocks
    coded_linear_forward[(programs, splits)](
        x2,
        words.view(torch.uint8),
        scale,
        scale if offset is None else offset,
        x2 if row_scale is None else row_scale,
        x2 if bias is None else bias,
        target,
        tokens,
        out_features,
        in_features,
        tiles,
        per_split,
        group_size,
        scale.shape[1],
        group_rows,
        lift,
        1.0 / lift,
        *x2.stride(),
        out_features * tile // 8,
        *(*scale.stride(), 0, 0)[:4],
        *((0, 0) if offset is None else offset.stride()),
        CODEC=("binary", "shift").index(codec),
        BITS=bits,
        TERMS=powers if codec == "binary" else terms,
        FORM=product_form(codec, compute, tokens=tokens, run=run),
        TILE=tile,
        RUN=run,
        OFFSET=offset is not None,
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        RAGGED_K=in_features % tile != 0,
        SPLIT=splits > 1,
        COMPUTE={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(compute, tl.float32),
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
            x2 if bias is None else bias,
            out,
            out.numel(),
            out_features,
            splits,
            BIAS=bias is not None,
            BLOCK=block,
        )
    return out


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: 3 planes, groups of 64, K = 300, all operands."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (80, 300), generator=generator, dtype=torch.uint8)
    powers = torch.randint(40, 64, (80, 5, 3, 2), generator=generator).to(torch.int8)
    offset, (bias, row_scale) = (torch.rand(*s, generator=generator) for s in ((80, 5), (2, 80)))
    x = torch.randn(7, 300, generator=generator).half()
    tensors = (x, pack(codes, codec="binary", bits=3), powers, offset, bias, row_scale)
    settings = {"codec": "binary", "bits": 3, "group_size": 64}
    y = coded_linear(*(t.to(device) for t in tensors), **settings, **config).cpu().double()
    weight = offset.double().repeat_interleave(64, dim=1)[:, :300]
    alpha = torch.exp2(powers.double() - 64).sum(-1)
    for plane, own in enumerate(alpha.unbind(-1)):
        wide = own.repeat_interleave(64, dim=1)[:, :300]
        weight = weight + wide * (((codes >> plane) & 1).double() * 2 - 1)
    expected = (x.double() @ weight.T) * row_scale.double() + bias.double()
    error = float((y - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-3")
    return error
