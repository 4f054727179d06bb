"""What the host CPU takes for the operations that its description is made of, through torch.

    peaks      a GEMM per dtype on all threads, its right operand transposed as a linear layer's
               weight is: where a processor has no instructions for a dtype, torch takes another
               loop for it: 14 times as fast on Zen 3, where bf16 still takes 9 times as long as
               fp32 and int8 40; square where that is quick, else of fewer rows
    caches     the bytes that an in-place multiply reads and writes, of a size that lies in each
    memory     the bytes that a sum reads of a tensor beyond the caches: what inference does with
               memory is to read weights, and reading and writing at once shows a rate that no
               reader gets
    dispatch   an operation on one element
    fork       2**17 elements on all threads minus on one: what a parallel region costs

All are timed in turn, in rounds, and the best of each counts: a neighbour's burst then slows one
round of all of them, not all that is known of one. It is in doubt where the best of every other
round is another, or where a thread waited for a core in the best one. Of memory the median counts:
what neighbours take of it is taken from us whenever we run.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.cost_model.waiting import waited_seconds

GEMM_DTYPES = ("float32", "bfloat16", "int8")
SLOW_PRODUCT_S = 0.02
"""Where a square product would take longer, it is timed on fewer rows, which cost slow loops the
same each."""
LONGEST_FORK_S = 5e-5
SHORTEST_FORK_S = 5e-7

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """gemm: columns and, at most, rows of the products timed; dram_bytes: tensor beyond every
    cache; rounds: at least two, in each of which every figure is timed `repeats` times; seconds:
    least duration of one repeat, short so that on a busy machine some repeats run undisturbed."""

    gemm: int = 1024
    dram_bytes: int = 2**27
    rounds: int = 8
    repeats: int = 4
    seconds: float = 0.002


@dataclass(frozen=True, slots=True)
class HostTimes:
    """peaks: dtype -> TFLOP/s; speeds: bytes/s of each cache, innermost first; dram: bytes/s;
    dispatch, fork: seconds; spread: the doubt about all of them, 0.1 for 10 %."""

    peaks: dict[str, float]
    speeds: list[float]
    dram: float
    dispatch: float
    fork: float
    spread: float


def host_times(sizes: ProbeSizes, caches: Sequence[int]) -> HostTimes:
    """Time the host; `caches` in bytes, innermost first."""
    clock = _Clock(sizes)
    rows = {d: _rows(getattr(torch, d), sizes.gemm) for d in GEMM_DTYPES}
    products = {d: _product(getattr(torch, d), rows[d], sizes.gemm) for d in GEMM_DTYPES}
    cached = [torch.ones(n // 8) for n in caches]  # half of each
    beyond = torch.ones(max(sizes.dram_bytes, 2 * caches[-1]) // 4)
    one, wide = torch.ones(1), torch.ones(2**17)
    with torch.no_grad():
        for _ in range(sizes.rounds):
            for dtype, product in products.items():
                clock(dtype, product)
            for level, x in enumerate(cached):
                clock(f"cache {level}", functools.partial(x.mul_, 1.0))
            clock("memory", beyond.sum)
            clock("dispatch", lambda: one.mul_(1.0))
            clock("together", lambda: wide.mul_(1.0))
            _on_one_thread(lambda: clock("alone", lambda: wide.mul_(1.0)))
    dispatch, together, alone = (clock.best(n) for n in ("dispatch", "together", "alone"))
    # Without the region the threads would share the work evenly. On a busy machine a region waits
    # for a core for milliseconds: that is the neighbours' cost, not this machine's.
    fork = together - dispatch - (alone - dispatch) / torch.get_num_threads()
    return HostTimes(
        {d: 2 * rows[d] * sizes.gemm**2 / clock.best(d) / 1e12 for d in GEMM_DTYPES},
        [2 * x.nbytes / clock.best(f"cache {level}") for level, x in enumerate(cached)],
        beyond.nbytes / statistics.median(clock.times["memory"]),
        dispatch,
        min(max(fork, SHORTEST_FORK_S), LONGEST_FORK_S) if torch.get_num_threads() > 1 else 1e-7,
        clock.spread(),
    )


class _Clock:
    """Seconds per call by name: all that were seen, each long enough for the timer."""

    def __init__(self, sizes: ProbeSizes) -> None:
        self.sizes, self.times = sizes, defaultdict[str, list[float]](list)
        # The part of each sample's time in which a thread had no core.
        self.waited = defaultdict[str, list[float]](list)

    def __call__(self, name: str, call: Call) -> None:
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        loops = max(1, min(10_000, int(self.sizes.seconds / once)))
        for _ in range(self.sizes.repeats):
            waited, start = waited_seconds(), time.perf_counter()
            for _ in range(loops):
                call()
            wall = time.perf_counter() - start
            self.times[name].append(wall / loops)
            # A neighbour that is always there makes steady times, and slow ones.
            share = (waited_seconds() - waited) / (wall * torch.get_num_threads())
            self.waited[name].append(share)

    def best(self, name: str) -> float:
        return min(self.times[name])

    def spread(self) -> float:
        """The doubt: by how much the best of every other round differs from that of the rest, for
        a typical figure, or the time waited."""
        step = self.sizes.repeats
        spreads: list[float] = []
        for times in self.times.values():
            rounds = [times[i : i + step] for i in range(0, len(times), step)]
            bests = [min(map(min, rounds[start::2])) for start in (0, 1)]
            spreads.append(max(bests) / min(bests) - 1)
        waits = (waits[_least(self.times[name])] for name, waits in self.waited.items())
        return max([statistics.median(spreads), *waits])


def _least(values: Sequence[float]) -> int:
    """Where it stands."""
    return min(range(len(values)), key=values.__getitem__)


def _rows(dtype: torch.dtype, n: int) -> int:
    """Rows of a product with [n, n] that takes at most SLOW_PRODUCT_S: n, a half, ..., n / 32."""
    few = max(n // 32, 1)
    product = _product(dtype, few, n)
    product()
    times = []
    for _ in range(3):  # one that waits for a core would say too much
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    rows = n
    while rows > few and min(times) * rows / few > SLOW_PRODUCT_S:
        rows //= 2
    return rows


def _product(dtype: torch.dtype, rows: int, n: int) -> Call:
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 127, (m, n), dtype=torch.int8) for m in (rows, n))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.randn(m, n).to(dtype) for m in (rows, n))
    out = torch.empty(rows, n, dtype=dtype)
    return lambda: torch.mm(a, b.t(), out=out)


def _on_one_thread(call: Call) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
    finally:
        torch.set_num_threads(threads)
