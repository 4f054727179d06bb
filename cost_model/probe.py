"""The host CPU as a Target, measured in a few seconds (see `ridgeline.cost_model.host_times`).

Kept as JSON under `$RIDGELINE_CACHE_DIR`, or ~/.cache/ridgeline, by CPU model, torch version and
threads. A probe that is in doubt by more than 15 %, because its rounds disagree or because other
work kept its threads off the cores for more than that of the time, serves this process and isn't
stored.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ridgeline.cost_model.host_times import ProbeSizes, host_times
from ridgeline.cost_model.refine import read
from ridgeline.cost_model.target import InvalidTarget, Target, parse_target
from ridgeline.ir.cache_dir import cache_dir

log = logging.getLogger(__name__)
MAX_SPREAD = 0.15
_METHOD = "reads, in rounds, right operands transposed"
"""How the host is measured: what was stored by another method is not taken."""
_SOURCE = "measured by ridgeline's probe of this host"
_SYSTEM = "reported by the operating system"
_DEFAULT_CACHES = (32 * 2**10, 2**20, 16 * 2**20)  # where the system reports none
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "neon", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@functools.cache
def probe_host() -> Target:
    """The host's Target: from the cache, else probed now (some 2 s) and stored if steady; refined
    by what `ridgeline calibrate` has stored for the same probe."""
    host = unrefined_host()
    try:
        return dataclasses.replace(host, refined=read(refinement_path(), host))
    except InvalidTarget as error:
        log.warning("estimates for this CPU are not refined: %s", error)
        return host


@functools.cache
def unrefined_host() -> Target:
    """The host's Target as probed."""
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


def steady_host(patience: float) -> Target:
    """The host's Target as probed, probed again for up to `patience` seconds while other work
    disturbs it."""
    end = time.monotonic() + patience
    host = unrefined_host()
    while host.spread > MAX_SPREAD and time.monotonic() < end:
        described = probe(ProbeSizes())
        if described["spread"] <= MAX_SPREAD:
            store(described, cache_path())
            unrefined_host.cache_clear()
            probe_host.cache_clear()
        host = parse_target(described, "the probe of this host")
    return host


def cache_path() -> Path:
    """Where the probe of this CPU, torch version and number of threads is kept."""
    key = f"{cpu_model()}|{torch.__version__}|{torch.get_num_threads()}|{_METHOD}"
    return cache_dir() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def refinement_path() -> Path:
    """Where the refinement of that probe is kept."""
    path = cache_path()
    return path.with_name(f"refined-{path.name}")


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
    caches = _cache_sizes()
    times = host_times(sizes, caches)
    speeds = [max(times.speeds[i:]) for i in range(len(caches))]  # dispatch hides the inner levels
    described = {
        "name": "cpu",
        "kind": "cpu",
        "arch": platform.machine().lower() or "unknown",
        "features": sorted(isa_flags()),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_bytes() / 1e9,
        "bandwidth_gb_per_s": min(times.dram, speeds[-1]) / 1e9,
        "cache_kib": [size / 1024 for size in caches],
        "cache_bandwidth_gb_per_s": [max(s, times.dram) / 1e9 for s in speeds],
        "launch_us": times.dispatch * 1e6,
        "fork_us": times.fork * 1e6,
        "gemm_efficiency": 0.9,
        "bandwidth_efficiency": 1.0,
        "attention_efficiency": 0.9,
        "spread": times.spread,
        "peaks_tflops": times.peaks,
    }
    reported = ("cores", "threads", "memory_gb", "cache_kib")
    numbers = [k for k, v in described.items() if isinstance(v, int | float | list)]
    source: dict[str, Any] = {k: _SYSTEM if k in reported else _SOURCE for k in numbers}
    del source["features"]
    for key in ("gemm_efficiency", "attention_efficiency", "bandwidth_efficiency"):
        source[key] = "estimate: other shapes against the timed GEMM and the sweep of the probe"
    source["peaks_tflops"] = dict.fromkeys(times.peaks, _SOURCE)
    return {**described, "source": source}


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
