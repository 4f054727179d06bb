"""What a process group's transport takes on this machine, measured once in a few hundred ms.

    t(kind, bytes) = latency + bytes / speed          a line through a small and a large message

Each of `KINDS` is timed at `SIZES`, all ranks at once: the quickest of some runs, of the slowest
rank. bytes: of the whole value, all tokens of it, whatever a rank holds. Kept beside the probe of
the CPU, by CPU model, torch version, number of ranks, their threads and backend, where most runs
agree; what rank 0 has counts. Law: the alpha-beta model (Thakur et al., "Optimization of Collective
Communication Operations in MPICH", 2005) with both constants of this machine.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ridgeline.cost_model.probe import cpu_model, store
from ridgeline.ir.cache_dir import cache_dir

functional = torch.ops._c10d_functional
SIZES = (2**12, 2**21)
"""Bytes: latency alone, and beyond any buffer of a socket."""
ROUNDS = (12, 6)
KINDS = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
STEADY = 2.0
"""Medians of more than this many times the quickest run are other work's, and are not stored."""
_METHOD = "quickest run of the slowest rank"


@dataclass(frozen=True, slots=True)
class Transport:
    """latency: seconds, by kind; per_byte: seconds a byte, by kind."""

    world: int
    latency: Mapping[str, float]
    per_byte: Mapping[str, float]

    def seconds(self, kind: str, size: float) -> float:
        """Of one collective of `size` bytes. Raises KeyError for a kind not in `KINDS`."""
        return self.latency[kind] + size * self.per_byte[kind]

    def __str__(self) -> str:
        kinds = (
            f"{kind} {self.latency[kind] * 1e6:.0f} us + {1e-9 / self.per_byte[kind]:.2f} GB/s"
            for kind in KINDS
        )
        return f"{self.world} ranks on this machine: {', '.join(kinds)}"


def transport_of(group: dist.ProcessGroup) -> Transport:
    """Of the group's backend, on CPU tensors. Every rank calls this together."""
    path = transport_path(group)
    found: list[Transport | None] = [_read(path)]
    dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group)
    if found[0] is not None:
        return found[0]
    measured, spread = measure(group)
    if spread <= STEADY:
        store(asdict(measured), path)
    return measured


def transport_path(group: dist.ProcessGroup) -> Path:
    """Where the measurement is kept."""
    facts = (cpu_model(), torch.__version__, dist.get_world_size(group), torch.get_num_threads())
    key = "|".join(map(str, (*facts, dist.get_backend(group), _METHOD, *SIZES)))
    return cache_dir() / f"transport-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measure(group: dist.ProcessGroup) -> tuple[Transport, float]:
    """Time the collectives, every rank together; what they take, the same on all, and how many
    times as long the median took at worst."""
    world, latency, per_byte, spread = dist.get_world_size(group), {}, {}, 1.0
    for kind in KINDS:
        timed = [
            _timed(_call(kind, size // (4 * world) * world, group), rounds, group)
            for size, rounds in zip(SIZES, ROUNDS, strict=True)
        ]
        (small, _), (large, _) = timed
        spread = max(spread, *(median / quickest for quickest, median in timed))
        # Noise may make a large message the quicker one; a speed stays a positive number.
        per_byte[kind] = max(large - small, 0.01 * large) / (SIZES[1] - SIZES[0])
        latency[kind] = max(small - SIZES[0] * per_byte[kind], 0.0)
    return Transport(world, latency, per_byte), spread


def _call(kind: str, count: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """The collective on `count` fp32 numbers, as graphs send it."""
    world, name = dist.get_world_size(group), group.group_name
    whole, part = torch.ones(count), torch.ones(count // world)
    shares = [count // world] * world
    sends: dict[str, Callable[[], torch.Tensor]] = {
        "all_reduce": lambda: functional.all_reduce(whole, "sum", name),
        "all_to_all_single": lambda: functional.all_to_all_single(whole, shares, shares, name),
        "all_gather_into_tensor": lambda: functional.all_gather_into_tensor(part, world, name),
        "reduce_scatter_tensor": lambda: functional.reduce_scatter_tensor(
            whole, "sum", world, name
        ),
    }
    return lambda: functional.wait_tensor(sends[kind]())


def _timed(
    call: Callable[[], object], rounds: int, group: dist.ProcessGroup
) -> tuple[float, float]:
    """The slowest rank's quickest run, and its median, in seconds."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    found = torch.tensor([min(times[1:]), statistics.median(times[1:])], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    quickest, median = found.tolist()
    return quickest, median


def _read(path: Path) -> Transport | None:
    try:
        return Transport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
