"""Which configurations to try for a problem on an architecture, best first.

The lists hold tiles that compile without a register spill for the family (checked by `audit` at
compile time, where the next entry is tried if one fails). Their order follows the tile sizes that
FlashAttention-2 and Triton's own tuned kernels use; it has not been tuned on a device.
"""

import math
from dataclasses import replace

import torch

from ridgeline.codegen.triton.arch import Arch
from ridgeline.codegen.triton.config import Config

# BLOCK_M, BLOCK_N, warps, stages by (family, largest head dimension), 16-bit inputs.
_PREFILL = {
    ("ampere", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    ("ampere", 128): (
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2),
        (64, 16, 4, 2),
    ),
    ("ampere", 256): ((64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 4, 1)),
    ("hopper", 64): ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
    ("hopper", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    ("hopper", 256): ((128, 64, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2), (128, 16, 8, 1)),
    ("cdna", 64): ((128, 32, 4, 2), (128, 32, 4, 1), (64, 32, 4, 1)),
    ("cdna", 128): ((128, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
    ("cdna", 256): ((64, 32, 8, 1), (64, 16, 8, 1), (64, 16, 4, 1)),
}  # fmt: skip
# fp32 runs on the vector units in IEEE arithmetic: small tiles, operands held in registers.
_PREFILL_FP32 = ((64, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1))
# Of the backward: keys (BLOCK_M queries walk by BLOCK_N keys), then queries; by the same key.
_BACKWARD_KEYS = {
    ("ampere", 64): ((64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 1), (32, 32, 4, 1)),
    ("ampere", 128): ((32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    ("ampere", 256): ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    ("hopper", 64): ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1), (32, 64, 4, 1)),
    ("hopper", 128): ((64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 4, 1)),
    ("hopper", 256): ((32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    ("cdna", 64): ((32, 64, 4, 1), (32, 32, 4, 1)),
    ("cdna", 128): ((32, 32, 4, 1), (16, 32, 4, 1)),
    ("cdna", 256): ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
_BACKWARD_QUERIES = {
    ("ampere", 64): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("ampere", 128): ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 4, 1), (32, 16, 4, 1)),
    ("ampere", 256): ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    ("hopper", 64): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 1)),
    ("hopper", 128): ((64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1)),
    ("hopper", 256): ((64, 32, 8, 1), (64, 16, 8, 1), (64, 16, 4, 1)),
    ("cdna", 64): ((64, 32, 4, 1), (32, 32, 4, 1)),
    ("cdna", 128): ((32, 32, 4, 1), (32, 16, 4, 1)),
    ("cdna", 256): ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
_BACKWARD_FP32 = ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1))
_DECODE = ((64, 4, 3), (64, 4, 2), (32, 4, 2), (32, 4, 1), (16, 4, 1))  # BLOCK_N, warps, stages

# tokens up to -> (BLOCK_M, BLOCK_N, warps, stages) of the quantised linear layer, 16-bit products.
_LINEAR = (
    (16, ((16, 64, 4, 4), (16, 64, 4, 2), (16, 32, 4, 2))),
    (32, ((32, 64, 4, 4), (32, 64, 4, 2), (32, 32, 4, 2))),
    (64, ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 1))),
    (math.inf, ((128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2))),
)
_LINEAR_FP32 = ((16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))

# BLOCK_M, BLOCK_N and then (BLOCK_K, warps, stages) of the linear layer with a rational function,
# from the largest tile: the sizes are those of `cost_model.gpu_time.OWN_TILES`.
_RATIONAL = (
    ((128, 128), ((64, 8, 3), (32, 8, 3))),
    ((128, 64), ((64, 4, 3), (32, 4, 3))),
    ((64, 64), ((64, 4, 4), (64, 4, 3), (32, 4, 3))),
    ((32, 64), ((64, 4, 4), (32, 4, 3))),
    ((16, 64), ((64, 4, 4), (32, 4, 3))),
)

# With the rows of one key head at most this many, attention is bound by reading the keys.
DECODE_ROWS = 64
MOST_SPLITS = 128


def _family(arch: Arch) -> str:
    if arch.backend == "hip":
        return "cdna"
    return "hopper" if int(arch.capability) >= 90 else "ampere"


def padded(size: int) -> int:
    """The power of two, at least 16, that a head dimension is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def is_decode(query_length: int, heads: int, key_heads: int) -> bool:
    """Whether the rows that share a key head fit one tile, so that splitting the keys pays."""
    return query_length * (heads // key_heads) <= DECODE_ROWS


def attention_candidates(
    arch: Arch, *, head_dim: int, value_dim: int, dtype: torch.dtype, masked: bool
) -> tuple[Config, ...]:
    """Configurations of `attention_forward`, best first; those over the shared memory left out."""
    d, dv = padded(head_dim), padded(value_dim)
    tiles = _PREFILL_FP32 if dtype == torch.float32 else _PREFILL[_family(arch), max(64, d, dv)]
    if masked:  # a tile of the mask takes the registers that a larger tile of scores would
        largest = 8192 if max(d, dv) <= 64 else 4096
        tiles = tuple(tile for tile in tiles if tile[0] * tile[1] <= largest)
    item = dtype.itemsize
    return tuple(
        Config((("BLOCK_M", m), ("BLOCK_N", n)), warps, stages)
        for m, n, warps, stages in tiles
        # Query tile plus the pipelined key and value tiles; compilers add to this, never take.
        if item * (m * d + max(1, stages - 1) * n * (d + dv)) <= arch.shared_bytes
    )


def backward_candidates(
    arch: Arch, *, head_dim: int, value_dim: int, dtype: torch.dtype, keys: bool
) -> tuple[Config, ...]:
    """Configurations of `attention_backward_keys` or `.._queries`, best first."""
    largest = max(64, padded(head_dim), padded(value_dim))
    table = _BACKWARD_KEYS if keys else _BACKWARD_QUERIES
    tiles = _BACKWARD_FP32 if dtype == torch.float32 else table[_family(arch), largest]
    return tuple(
        Config((("BLOCK_M", m), ("BLOCK_N", n)), warps, stages) for m, n, warps, stages in tiles
    )


def decode_candidates(arch: Arch, *, rows: int) -> tuple[Config, ...]:
    """Configurations of `attention_decode` for `rows` query rows on one key head, best first."""
    block_m = padded(rows)
    return tuple(
        Config((("BLOCK_M", block_m), ("BLOCK_N", n)), warps, stages if arch.warp_size == 32 else 1)
        for n, warps, stages in _DECODE
    )


def linear_candidates(arch: Arch, *, tokens: int, compute: torch.dtype) -> tuple[Config, ...]:
    """Configurations of `quantized_linear_forward` without splits, best first."""
    tiles = _LINEAR_FP32
    if compute != torch.float32:
        tiles = next(tiles for limit, tiles in _LINEAR if tokens <= limit)
    return tuple(
        Config((("BLOCK_M", m), ("BLOCK_N", n)), warps, stages if arch.warp_size == 32 else 2)
        for m, n, warps, stages in tiles
    )


def rational_candidates(
    arch: Arch, *, tokens: int, n: int, width: int, item: int, multiprocessors: int
) -> tuple[Config, ...]:
    """Configurations of `linear_rational_forward`, best first: the largest tiles of which there is
    one for each multiprocessor, or else the smallest; then smaller ones.

    width: channels of a group where the function is of the input, of which blocks of K are to be
    parts, 0 where it is not; item: bytes of an element.
    """
    rows, columns = padded(min(tokens, 128)), max(64, padded(min(n, 128)))
    fitting = [tile for tile in _RATIONAL if tile[0][0] <= rows and tile[0][1] <= columns]
    full = (
        at for at, ((m, n_), _) in enumerate(fitting)
        if -(-tokens // m) * -(-n // n_) >= multiprocessors
    )  # fmt: skip
    found = [
        Config(
            (("BLOCK_M", m), ("BLOCK_N", n_), ("BLOCK_K", k)),
            warps,
            stages if arch.warp_size == 32 else 2,
        )
        for (m, n_), rest in fitting[next(full, len(fitting) - 1) :] + fitting[-1:]
        for k, warps, stages in rest
        if item < 4 or k == 32
    ]
    return tuple(sorted(dict.fromkeys(found), key=lambda c: _straddles(c, width)))


def _straddles(config: Config, width: int) -> bool:
    """Do the blocks of K straddle groups?"""
    return bool(width) and width % config.constexprs()["BLOCK_K"] != 0


def splits(programs: int, steps: int, multiprocessors: int, *, least_steps: int = 1) -> int:
    """Into how many parts to cut a loop of `steps` so that `programs` programs fill the device.

    FlashAttention-2's rule: with two programs per multiprocessor, the smallest number of parts
    whose last wave is within 85 % of the fullest one; 1 where the programs fill the device alone.
    """
    slots = 2 * multiprocessors
    if programs >= 0.8 * slots:
        return 1
    best: dict[int, float] = {}
    previous = None
    for parts in range(1, min(MOST_SPLITS, slots, max(1, steps // least_steps)) + 1):
        per_part = -(-steps // parts)
        if per_part != previous:  # otherwise a part more changes nothing
            waves = programs * parts / slots
            best[parts] = waves / math.ceil(waves)
        previous = per_part
    return next(parts for parts, fill in best.items() if fill >= 0.85 * max(best.values()))


def split_linear(
    config: Config, *, tokens: int, n: int, tiles: int, multiprocessors: int, least_tiles: int = 4
) -> Config:
    """`config` with K cut so that a small layer fills the device; least_tiles: in a part."""
    sizes = config.constexprs()
    programs = -(-tokens // sizes["BLOCK_M"]) * -(-n // sizes["BLOCK_N"])
    return replace(config, splits=splits(programs, tiles, multiprocessors, least_steps=least_tiles))


def split_decode(config: Config, *, heads: int, key_length: int, multiprocessors: int) -> Config:
    """`config` with the keys cut; heads: batch times key heads. At least 128 keys per part."""
    steps = max(1, -(-key_length // 128))
    return replace(config, splits=splits(heads, steps, multiprocessors))
