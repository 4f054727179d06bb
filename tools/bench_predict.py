"""How long `cost_model.predict` takes for a shape that it has not seen: the goal is 50 us.

Processor time, so that what else runs on the machine counts little.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ridgeline.cost_model import predict

GOAL_US = 50.0
TITLE = f"predict, us of processor time a call, no shape twice; goal {GOAL_US:g}"
CALLS = 300  # of one round, each of another shape
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
# target, op, dtype, fixed part of the shape, what varies; a100, a40 and l40s are calibrated: a
# residual is added to their laws.
CASES: tuple[tuple[str, str, str, dict[str, Any], str], ...] = (
    ("a100", "gemm", "bf16", {"n": 4096, "k": 4096}, "m"),
    ("l40s", "gemm", "fp8", {"n": 4096, "k": 4096}, "m"),
    ("h100", "gemm", "bf16", {"n": 4096, "k": 4096}, "m"),
    ("a100", "attn_prefill", "bf16", {"batch": 4, "q_len": 1024, **HEADS}, "kv_len"),
    ("b200", "attn_prefill", "bf16", {"batch": 4, "q_len": 1024, **HEADS}, "kv_len"),
    ("a100", "attn_decode", "bf16", {"batch": 4, **HEADS}, "kv_len"),
    ("a40", "rope", "fp16", {"width": 4096}, "rows"),
    ("a100_80g_nvswitch", "all_reduce", "fp16", {"world": 8, "per_node": 8}, "bytes"),
)


def cases(rounds: int) -> Iterator[tuple[str, float, float]]:
    """(what, median, slowest) microseconds a call over `rounds` rounds."""
    for target, op, dtype, fixed, varies in CASES:
        predict(target, op, dtype, **fixed, **{varies: 2000})  # the files are read once
        taken = []
        for r in range(rounds):
            begin = time.process_time()
            for i in range(CALLS):
                predict(target, op, dtype, **fixed, **{varies: 2048 + r * CALLS + i})
            taken.append((time.process_time() - begin) / CALLS * 1e6)
        yield f"{target} {op} {dtype}", statistics.median(taken), max(taken)


def table(rounds: int) -> Table:
    """One line a case, with the goal in the title."""
    out = Table(title=TITLE, title_justify="left")
    for column in ("kernel", "median", "slowest round"):
        out.add_column(column, justify="left" if column == "kernel" else "right")
    for what, median, slowest in cases(rounds):
        out.add_row(what, f"{median:.1f}", f"{slowest:.1f}")
    return out
