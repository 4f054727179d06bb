"""The host CPU as a Target, measured in a few seconds through torch.

    peaks      best of repeats of a square GEMM per dtype on all threads
    bandwidth  bytes of an in-place multiply (one read, one write) over sizes that lie in each cache
               and beyond the last; a level counts what its size reaches
    dispatch   an operation on one element; fork: 2**17 elements on all threads minus on one, which
               is what a parallel region costs

Kept as JSON under `$RIDGELINE_CACHE_DIR`, or ~/.cache/ridgeline, by CPU model, torch version and
threads. A probe whose repeats spread by more than 15 %, or whose threads were kept off the cores by
other work for more than 15 % of the time, serves this process and isn't stored.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ridgeline.cost_model.target import InvalidTarget, Target, parse_target
from ridgeline.ir.cache_dir import cache_dir

log = logging.getLogger(__name__)
MAX_SPREAD = 0.15
_SOURCE = "measured by ridgeline's probe of this host"
_SYSTEM = "reported by the operating system"
_GEMM_DTYPES = ("float32", "bfloat16", "int8")
_DEFAULT_CACHES = (32 * 2**10, 2**20, 16 * 2**20)  # where the system reports none
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "neon", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """gemm: rows = columns of the products timed; dram_bytes: tensor beyond every cache;
    repeats: per figure, the minimum counts; seconds: least duration of one repeat, short so that
    on a busy machine some repeats run undisturbed."""

    gemm: int = 1024
    dram_bytes: int = 2**27
    repeats: int = 11
    seconds: float = 0.002


@functools.cache
def probe_host() -> Target:
    """The host's Target: from the cache, else probed now (below 5 s) and stored if steady."""
    path = cache_path()
    try:
        return parse_target(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        pass
    except (json.JSONDecodeError, UnicodeDecodeError, InvalidTarget) as error:
        log.warning("probing again: the stored probe can't be used: %s", error)
    described = probe(ProbeSizes())
    if described["spread"] > MAX_SPREAD:
        log.warning(
            "the probe of this CPU isn't stored: other work disturbed it by %.0f %%, where at most"
            " %.0f %% is expected; estimates are as uncertain. Run again on an idle machine",
            100 * described["spread"],
            100 * MAX_SPREAD,
        )
    else:
        store(described, path)
    return parse_target(described, "the probe of this host")


def cache_path() -> Path:
    """Where the probe of this CPU, torch version and number of threads is kept."""
    key = f"{cpu_model()}|{torch.__version__}|{torch.get_num_threads()}"
    return cache_dir() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def store(described: dict[str, Any], path: Path) -> None:
    """Write whole or not at all; a cache that can't be written costs a probe, not the result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(described, file, indent=1)
        Path(temporary).replace(path)
    except OSError as error:
        log.warning("the probe of this CPU isn't stored: %s", error)


def probe(sizes: ProbeSizes) -> dict[str, Any]:
    """Measure the host; the result has the keys of a target file (`parse_target` reads it)."""
    clock = _Clock(sizes)
    with torch.no_grad():
        peaks = {d: _gemm_tflops(clock, getattr(torch, d), sizes.gemm) for d in _GEMM_DTYPES}
        caches = _cache_sizes()
        speeds = [_bandwidth(clock, size // 2) for size in caches]
        dram = _bandwidth(clock, max(sizes.dram_bytes, 2 * caches[-1]))
        dispatch, fork = _overheads(clock)
    for inner in range(len(speeds) - 2, -1, -1):  # an outer level is never faster: dispatch hides
        speeds[inner] = max(speeds[inner], speeds[inner + 1])
    described = {
        "name": "cpu",
        "kind": "cpu",
        "arch": platform.machine().lower() or "unknown",
        "features": sorted(isa_flags()),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_bytes() / 1e9,
        "bandwidth_gb_per_s": min(dram, speeds[-1]) / 1e9,
        "cache_kib": [size / 1024 for size in caches],
        "cache_bandwidth_gb_per_s": [max(s, dram) / 1e9 for s in speeds],
        "launch_us": dispatch * 1e6,
        "fork_us": fork * 1e6,
        "gemm_efficiency": 0.9,
        "bandwidth_efficiency": 1.0,
        "attention_efficiency": 0.9,
        "spread": clock.spread(),
        "peaks_tflops": peaks,
    }
    reported = ("cores", "threads", "memory_gb", "cache_kib")
    numbers = [k for k, v in described.items() if isinstance(v, int | float | list)]
    source: dict[str, Any] = {k: _SYSTEM if k in reported else _SOURCE for k in numbers}
    del source["features"]
    for key in ("gemm_efficiency", "attention_efficiency", "bandwidth_efficiency"):
        source[key] = "estimate: other shapes against the square GEMM and the sweep of the probe"
    source["peaks_tflops"] = dict.fromkeys(peaks, _SOURCE)
    return {**described, "source": source}


LONGEST_FORK_S = 5e-5


class _Clock:
    """Seconds per call: the minimum over repeats, each long enough for the timer."""

    def __init__(self, sizes: ProbeSizes) -> None:
        self.sizes, self.spreads = sizes, list[float]()
        self.waiting = 0.0  # the largest part of its time in which a thread had no core

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        loops = max(1, min(10_000, int(self.sizes.seconds / once)))
        times = []
        for _ in range(self.sizes.repeats):
            start = time.perf_counter()
            for _ in range(loops):
                call()
            times.append((time.perf_counter() - start) / loops)
        best = min(times)
        self.spreads.append(statistics.median(times) / best - 1)
        return best

    def on_all_threads(self, call: Callable[[], Any]) -> float:
        """The same for a call that keeps every thread busy, which tells whether each has a core: a
        neighbour that is always there makes steady times, and slow ones."""
        wall, cpu = time.perf_counter(), time.process_time()
        best = self(call)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.waiting = max(self.waiting, 1 - cpu / (wall * torch.get_num_threads()))
        return best

    def spread(self) -> float:
        """The doubt: the typical (median/minimum - 1) of what was timed, or the time waited."""
        return max(statistics.median(self.spreads), self.waiting)


def _gemm_tflops(clock: _Clock, dtype: torch.dtype, n: int) -> float:
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 127, (n, n), dtype=torch.int8) for _ in range(2))
        seconds = clock.on_all_threads(lambda: torch._int_mm(a, b))
    else:
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype)
        seconds = clock.on_all_threads(lambda: torch.mm(a, b, out=out))
    return 2 * n**3 / seconds / 1e12


def _bandwidth(clock: _Clock, size: int) -> float:
    """Bytes per second of x *= 1 over `size` bytes, read and written once."""
    x = torch.ones(max(size // 4, 1))
    return 2 * x.nbytes / clock(lambda: x.mul_(1.0))


def _overheads(clock: _Clock) -> tuple[float, float]:
    one, wide = torch.ones(1), torch.ones(2**17)
    dispatch = clock(lambda: one.mul_(1.0))
    together = clock(lambda: wide.mul_(1.0))
    threads = torch.get_num_threads()
    if threads == 1:
        return dispatch, 1e-7
    torch.set_num_threads(1)
    try:
        alone = clock(lambda: wide.mul_(1.0))
    finally:
        torch.set_num_threads(threads)
    # Without the region the threads would share the work evenly. On a busy machine a region waits
    # for a core for milliseconds: that is the neighbours' cost, not this machine's.
    fork = together - dispatch - (alone - dispatch) / threads
    return dispatch, min(max(fork, 5e-7), LONGEST_FORK_S)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "cpu model", "cpu part"):
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def isa_flags() -> frozenset[str]:
    """Instruction sets that kernels ask for, from /proc/cpuinfo; elsewhere what torch reports."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split()) & frozenset(_FLAGS)
    capability = torch.backends.cpu.get_cpu_capability().lower()
    known = {"avx512": {"avx2", "fma", "avx512f"}, "avx2": {"avx2", "fma"}}
    return frozenset(known.get(capability, {capability} & set(_FLAGS)))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cache_sizes() -> tuple[int, ...]:
    """Data caches of one core, innermost first, in bytes; private levels times the threads."""
    found: dict[int, int] = {}
    threads = torch.get_num_threads()
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_first(index / name) for name in ("level", "type", "size"))
        if kind not in ("Data", "Unified") or not size[:-1].isdigit() or not level.isdigit():
            continue
        factor = {"K": 2**10, "M": 2**20}.get(size[-1], 1)
        shared = "," in (cpus := _first(index / "shared_cpu_list")) or "-" in cpus
        found[int(level)] = int(size[:-1]) * factor * (1 if shared else threads)
    return tuple(found[level] for level in sorted(found)) or _DEFAULT_CACHES


def _first(path: Path) -> str:
    return next(iter(_lines(str(path))), "").strip()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30  # a system without sysconf: assume little
