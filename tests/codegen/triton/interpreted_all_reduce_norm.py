"""Runs the one-shot and two-shot kernels in Triton's interpreter, rank after rank.

A script, started by test_all_reduce_norm.py in a process of its own, as interpreted.py is. Prints
{case: relative error against the emulator} as JSON. The barriers are PTX, which the interpreter
does not run; without them one rank after the other is one of the orders that the protocol allows:
one-shot only reads, and in two-shot no rank touches another's rows.
"""

import json
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.symmetric_memory import Launch, emulate
from ridgeline.codegen.triton.all_reduce_norm import INTERPRETED, all_reduce_norm
from ridgeline.codegen.triton.multicast import pack, unpack

EPS = 1e-5
# world, rows, size, dtype, blocks, shift, weight
CASES = {
    "two-ranks": (2, 5, 48, torch.float32, 2, 0.0, True),
    "more-ranks-than-rows": (4, 3, 64, torch.float32, 1, 0.0, True),
    "gemma": (4, 9, 40, torch.float16, 3, 1.0, True),
    "no-weight": (8, 17, 64, torch.float32, 2, 0.0, False),
    "eight-ranks": (8, 21, 104, torch.float16, 2, 0.0, True),
}


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def errors(variant: str, name: str) -> float:
    world, rows, size, dtype, blocks, shift, weighted = CASES[name]
    partials = [torch.randn(rows, size).to(dtype) for _ in range(world)]
    residual, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
    given = Launch(partials, residual, weight if weighted else None, EPS, shift)
    expected = emulate(variant, [given], blocks=blocks)[0]
    buffers = [x.clone() for x in partials]
    table = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64)
    shard = -(-rows // world)
    padded = torch.zeros(shard * world, size, dtype=dtype)
    padded[:rows] = residual
    worst, outputs, sums = 0.0, [], []
    for rank in range(world):
        own = residual if variant == "one_shot" else padded[rank * shard : (rank + 1) * shard]
        y, total = all_reduce_norm(
            variant, table, 0, table, own.contiguous(), given.weight, rank, rows,
            eps=EPS, shift=shift, blocks=blocks, block_n=128, num_warps=4,
        )  # fmt: skip
        outputs.append(buffers[rank] if y is None else y)
        sums.append(total)
    for rank in range(world):
        live = max(0, min(shard, rows - rank * shard)) if variant == "two_shot" else rows
        worst = max(worst, relative(outputs[rank], expected[rank].y))
        if live:
            found, wanted = sums[rank][:live], expected[rank].residual[:live]
            worst = max(worst, relative(found, wanted))
    return worst


@triton.jit
def words_and_back(
    words_ptr, values_ptr, back_ptr, dtype: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    """multimem's 16-byte groups as fp32 values, and as groups again."""
    at = tl.arange(0, GROUPS) * 4
    a, b = tl.load(words_ptr + at), tl.load(words_ptr + at + 1)
    c, d = tl.load(words_ptr + at + 2), tl.load(words_ptr + at + 3)
    values = unpack(a, b, c, d, BLOCK, dtype)
    tl.store(values_ptr + tl.arange(0, BLOCK), values)
    a, b, c, d = pack(values, BLOCK, dtype)
    tl.store(back_ptr + at, a)
    tl.store(back_ptr + at + 1, b)
    tl.store(back_ptr + at + 2, c)
    tl.store(back_ptr + at + 3, d)


def packing_errors() -> dict[str, float]:
    errors = {}
    for name, dtype in (("fp16", tl.float16), ("bf16", tl.bfloat16), ("fp32", tl.float32)):
        x = torch.randn(64).to({"fp16": torch.float16, "bf16": torch.bfloat16}.get(name))
        words = x.view(torch.int32).view(torch.uint32)
        values, back = torch.empty(64), torch.empty_like(words)
        words_and_back[(1,)](words, values, back, dtype, BLOCK=64, GROUPS=len(words) // 4)
        same = torch.equal(back.view(torch.int32), words.view(torch.int32))
        errors[f"words-{name}"] = relative(values, x) if same else float("inf")
    return errors


if __name__ == "__main__":
    if not INTERPRETED:
        sys.exit("expected TRITON_INTERPRET=1")
    torch.manual_seed(0)
    shots = ("one_shot", "two_shot")
    found = {f"{v}-{name}": errors(v, name) for v in shots for name in CASES}
    print(json.dumps(found | packing_errors()))
