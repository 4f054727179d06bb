"""What a process group's transport takes on this machine, measured once in a few hundred ms.

    t(kind, bytes) = latency + bytes / speed          a line through a small and a large message

Each of `KINDS` is timed at `SIZES` as a graph sends: every rank has just computed the message, in
memory of its own that it has read `BETWEEN` bytes beside, and nobody waits for the others before.
So ranks come late to each other, as they do between layers, and caches and cores are shared with
what computes; a probe that sends one warm buffer in a row gives a third to a half of that. The
median run of the slowest rank counts, as it does where forms are compared. bytes: of the whole
value, all tokens of it, whatever a rank holds. Kept beside the probe of the CPU, by CPU model,
torch version, number of ranks, their threads and backend, where most runs agree; what rank 0 has
counts. Law: the alpha-beta model (Thakur et al., "Optimization of Collective Communication
Operations in MPICH", 2005) with both constants of this machine.
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
from torch import Tensor

from ridgeline.cost_model.probe import cpu_model, store
from ridgeline.ir.cache_dir import cache_dir

functional = torch.ops._c10d_functional
SIZES = (2**12, 2**21)
"""Bytes: latency alone, and beyond any buffer of a socket."""
ROUNDS = (12, 6)
KINDS = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
STEADY = 2.0
"""Medians of more than this many times the quickest run are other work's, and are not stored."""
BETWEEN = 2**22
"""Bytes read and written between two messages: those of a layer, beyond the caches of a core."""
_METHOD = "median of the slowest rank, between computation"


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
            _timed(*_call(kind, size // (4 * world) * world, group), rounds, group)
            for size, rounds in zip(SIZES, ROUNDS, strict=True)
        ]
        (small, _), (large, _) = timed
        spread = max(spread, *(median / quickest for median, quickest in timed))
        # Noise may make a large message the quicker one; a speed stays a positive number.
        small = min(small, large)
        per_byte[kind] = max(large - small, 0.01 * large) / (SIZES[1] - SIZES[0])
        latency[kind] = max(small - SIZES[0] * per_byte[kind], 0.0)
    return Transport(world, latency, per_byte), spread


Call = Callable[[Tensor], Tensor]


def _call(kind: str, count: int, group: dist.ProcessGroup) -> tuple[Call, Tensor]:
    """The collective as graphs send it, and a message of `count` fp32 numbers, or a rank's part."""
    world, name = dist.get_world_size(group), group.group_name
    shares = [count // world] * world
    sends: dict[str, Call] = {
        "all_reduce": lambda x: functional.all_reduce(x, "sum", name),
        "all_to_all_single": lambda x: functional.all_to_all_single(x, shares, shares, name),
        "all_gather_into_tensor": lambda x: functional.all_gather_into_tensor(x, world, name),
        "reduce_scatter_tensor": lambda x: functional.reduce_scatter_tensor(x, "sum", world, name),
    }
    message = torch.ones(
        count // world if kind == "all_gather_into_tensor" else count, device="cpu"
    )
    return lambda x: functional.wait_tensor(sends[kind](x)), message


def _timed(
    call: Call, message: Tensor, rounds: int, group: dist.ProcessGroup
) -> tuple[float, float]:
    """The slowest rank's median, and its quickest run, in seconds."""
    times, beside = [], torch.ones(BETWEEN // 4, device="cpu")
    for _ in range(rounds + 1):
        beside.mul_(1.0)
        fresh = message * 1.0
        start = time.perf_counter()
        call(fresh)
        times.append(time.perf_counter() - start)
    found = message.new_tensor([statistics.median(times[1:]), min(times[1:])], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    median, quickest = found.tolist()
    return median, quickest


def _read(path: Path) -> Transport | None:
    try:
        return Transport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
