"""Residual adds and norms between tensor-parallel layers: on a shard of the tokens, or on all.

    ridgeline bench tensor-parallel

A chain of `SITES` sums over the ranks, each added to the residual and normalised, runs on gloo
ranks of this machine: as it is (all_reduce, then everything on every rank) and as
`allreduce_rms_norm` writes it, both compiled the same way, in turn. A time is the slowest rank's
median; the third column is `fuse="measured"`, which runs both when it compiles and takes one. The
last three are what the cost model predicts with gloo's latency and speed here, measured first, and
what it would have taken.
"""

import multiprocessing
import statistics
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

from ridgeline.passes.parallel import parallelize
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.layers import all_reduce
from ridgeline.passes.parallel.timed import WIN

SITES = 4
SHAPES = ((16, 576), (256, 576), (2048, 576), (256, 4096), (2048, 4096))
DTYPES = ("float32", "bfloat16")
FORMS = ("never", "always", "measured")
WORLDS = (2, 4)


class Chain(nn.Module):
    """h += sum over ranks of the last norm, its features reversed; y = norm(h): SITES times.

    The reversal stands for the layers between: it reads whole rows, and costs one pass.
    """

    def __init__(self, size: int, group: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in range(SITES))
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, H] -> the last norm."""
        h = y = x
        for norm in self.norms:
            h = h + all_reduce(y.flip(-1), self.group)
            y = norm(h)
        return y


@torch.no_grad()
def rows_of(
    shapes: Any, dtypes: Any, lowering: Any, rounds: int, target: str = "native"
) -> list[dict[str, Any]]:
    """Seconds a site of each form on this group, for each shape and dtype.

    Raises RuntimeError where the forms differ by more than rounding.
    """
    ranks, rows = Ranks.of(None), []
    for tokens, size in shapes:
        for name in dtypes:
            dtype = getattr(torch, name)
            x = torch.randn(1, tokens, size, generator=torch.Generator().manual_seed(0)).to(dtype)
            chain = Chain(size, ranks.name).to(dtype).eval()
            built = {
                form: parallelize(
                    chain, split=False, target=target, fuse=form, weave="never", lowering=lowering
                )
                for form in FORMS
            }
            first, *others = (built[form](x).double() for form in FORMS)
            if any((first - other).norm() > 1e-2 * first.norm() for other in others):
                raise RuntimeError(f"the forms differ at {[tokens, size]}, {name}")
            taken: dict[str, list[float]] = {form: [] for form in FORMS}
            for _ in range(rounds + 1):
                for form in FORMS:
                    ranks.barrier()
                    start = time.perf_counter()
                    built[form](x)
                    taken[form].append((time.perf_counter() - start) / SITES)
            seconds = ranks.largest([statistics.median(taken[form][1:]) for form in FORMS])
            taken_by = built["measured"].plan.applied
            shard = any(d.rewrite == "allreduce_rms_norm" for d in taken_by)
            timed = built["measured"]._ridgeline.compile_program.timed
            rows.append(
                {
                    "shape": (tokens, size),
                    "dtype": name,
                    "seconds": seconds,
                    "predicted": [s / SITES for t in timed for s in t.predicted],
                    "shard": shard,
                }
            )
    return rows


def _rank(rank: int, world: int, store: str, answer: Any, *args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"rank": rank, "world_size": world, "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    rows = rows_of(*args)
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    world: int,
    shapes: Any = SHAPES,
    dtypes: Any = DTYPES,
    lowering: str = "inductor",
    rounds: int = 11,
    target: str = "native",
) -> list[dict[str, Any]]:
    """`rows_of` on `world` new processes.

    Raises RuntimeError where a rank fails, whose own error it has printed.
    """
    args = (shapes, dtypes, lowering, rounds, target)
    context = multiprocessing.get_context("forkserver")  # imports once, not once a rank
    context.set_forkserver_preload(["ridgeline.passes.parallel", "torch._inductor"])
    answer = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(rank, world, store, answer, *args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        rows = None
        while rows is None:
            if any(process.exitcode for process in processes):
                for process in processes:  # the others wait for the one that failed
                    process.terminate()
                    process.join()
                raise RuntimeError("a rank failed; its error is above")
            if not answer.empty():
                rows = answer.get()
            time.sleep(0.1)
        for process in processes:
            process.join()
        return rows


def table(world: int, rows: list[dict[str, Any]]) -> Table:
    """Times on all tokens and on a shard, over what is predicted where there is a prediction, and
    of the measured choice; the form that it takes, and the one that a prediction would take."""
    result = Table(title=f"{world} gloo ranks: residual add and norm, ms (median of the slowest)")
    for heading in ("rows", "all", "shard", "choice", "gain", "takes", "law"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        whole, shard, chosen = row["seconds"]
        tokens, size = row["shape"]
        kind = {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]
        predicted = row["predicted"] or [None, None]
        forms = [
            _milliseconds(seconds) + (f" / {_milliseconds(guess)}" if guess else "")
            for seconds, guess in zip((whole, shard), predicted, strict=True)
        ]
        taken = "shard" if row["shard"] else "all"
        result.add_row(
            *(f"{tokens}x{size} {kind}", *forms, _milliseconds(chosen)),
            *(f"{whole / chosen:.2f}x", taken, _by_prediction(row) or "-"),
        )
    return result


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _by_prediction(row: dict[str, Any]) -> str:
    """What would be taken by the predicted times; "" where there are none."""
    if not row["predicted"]:
        return ""
    whole, shard = row["predicted"]
    return "shard" if shard < WIN * whole else "all"


def verdict(rows: list[dict[str, Any]]) -> str:
    """How often prediction and measurement take the same, how far off predicted times are, and the
    worst that the measured choice did."""
    same = sum(_by_prediction(row) == ("shard" if row["shard"] else "all") for row in rows)
    ratios = [row["seconds"][0] / p for row in rows for p in row["predicted"][:1]]
    worst = max(row["seconds"][2] / row["seconds"][0] for row in rows)
    told = f"the measured choice took {worst:.2f} times as long as norms on all tokens at worst"
    if not ratios:
        return told
    return (
        f"{told}; prediction takes the same at {same} of {len(rows)} sizes, and norms on all took"
        f" {min(ratios):.1f} to {max(ratios):.1f} times as long as predicted, in the median"
        f" {statistics.median(ratios):.1f}"
    )
