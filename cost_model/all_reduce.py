"""Seconds of AllReduce + residual + RMSNorm on one site by every way to compute it; the choice.

Law. S bytes of partial sums per rank, T rows, p ranks, B the link's bytes/s in one direction, e a
fitted fraction, α a latency, M the memory's bytes/s:

    nccl         min over two protocols of α + 2 (p-1)/p S/(B e),     then the norm
    multimem AR  α + (1 + 1/p) S/(B e)           the switch sums: S leaves a rank, S/p comes back,
                                                 and the other way round for the broadcast
    RS, AG       α + S/(B e), with the norm of S/p between            sequence parallel
    norm         α + 4 S/(M e)                   x and residual read, y and residual written
    fused        α + g c + (rows^q + wire^q)^(1/q),  rows = ceil(ceil(T/p)/c) · t_row
                 wire = (1 + 1/p) S/(B e) with multimem, 2 (p-1)/p S/(B e) from peer to peer
    one-shot     the same with ceil(T/c) rows and wire (p-1) S/(B e), and 3 S/M of local traffic

c thread blocks sum a row each in t_row, whatever the link could carry: few blocks are bound by
latency, many by the link. t_row is that of up to 16 KiB, which 1024 threads hold in flight at once;
assumed for one-shot and two-shot: the loads from all peers too. g, the switch's cost of one more
block, is multimem's alone, and one-shot's latency holds its first row.

The constants of `FITTED` are those of one DGX H100 (hidden size 8192, bf16, p = 8; TokenWeave's
published kernel times, the rows of 128, 512, 2048, 8192 and 32768 tokens, by
`python -m ridgeline.tools.fit_tensor_parallel`); other rows, other p and other machines are
predictions. What no published row shows is assumed and marked so. Sources: Thakur et al.,
"Optimization of Collective Communication Operations in MPICH", 2005; TokenWeave (arXiv:2505.11329).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from ridgeline.cost_model.machine import TOPOLOGIES, ring_bytes_per_s
from ridgeline.cost_model.target import InvalidTarget, Target, load_target
from ridgeline.ir.errors import RidgelineError

ROW_BYTES = 16 * 1024
PCIE_AT_MOST = 64e9  # bytes/s in one direction: generation 5, 16 lanes
EAGER_S = 4.75e-6
"""What launching kernels one by one adds to each in the published harness: the norm's latency
there, 7.15 us as fitted, less the floor of a kernel in a CUDA graph, 2.4 us (h100.toml)."""
P2P_EFFICIENCY = 0.72
"""Of the link, from peer to peer: 216 of 300 GB/s on an A100, 657 of 900 on a B200, the bus
bandwidth of custom all-reduces at 60 MB and more in public serving-engine measurements."""
ONE_SHOT_S = {"sm_80": 5.8e-6, "sm_90": 4.7e-6, "sm_100": 7.8e-6}
"""Latency in a CUDA graph of the same at 16 kB and less; other architectures: as sm_80."""
MOST_BLOCKS = 64
"""More than the links can use only lengthens the barriers (published sweeps: 16 to 32 best)."""
MOST_ELEMENTS = 16384
"""Of a row that one block of the fused kernels holds in registers."""
MOST_RANKS = 16
"""That the fused kernels' loops over peers are unrolled for."""
BLOCKS = (2, 4, 8, 16, 32, MOST_BLOCKS)
WAYS = ("nccl", "multimem_all_reduce", "one_shot", "two_shot", "multimem", "sequence_parallel")
FUSED = ("one_shot", "two_shot", "multimem")


class InvalidSite(RidgelineError):
    """A size, number of ranks, topology or way to launch that the laws don't know."""


@dataclass(frozen=True, slots=True)
class Constants:
    """*_us: latencies in a harness that launches kernels one by one; *_link, *_memory: fractions
    of B and M; per_block_us: g; row_us: t_row; sharpness: q."""

    nccl_low_us: float
    nccl_low_link: float
    nccl_high_us: float
    nccl_high_link: float
    all_reduce_us: float
    all_reduce_link: float
    reduce_scatter_us: float
    reduce_scatter_link: float
    all_gather_us: float
    all_gather_link: float
    norm_us: float
    norm_memory: float
    fused_us: float
    fused_link: float
    per_block_us: float
    row_us: float
    sharpness: float


FITTED = Constants(
    nccl_low_us=18.2,
    nccl_low_link=0.221,
    nccl_high_us=59.3,
    nccl_high_link=0.879,
    all_reduce_us=12.7,
    all_reduce_link=0.684,
    reduce_scatter_us=12.7,
    reduce_scatter_link=0.803,
    all_gather_us=12.0,
    all_gather_link=0.839,
    norm_us=7.15,
    norm_memory=0.904,
    fused_us=11.7,
    fused_link=0.699,
    per_block_us=0.187,
    row_us=3.06,
    sharpness=2.55,
)


@dataclass(frozen=True, slots=True)
class Links:
    """How `world` ranks are joined: bytes/s in one direction of the slowest link of a ring;
    peers: every pair has an NVLink path, so that kernels may read each other's memory;
    multicast: a switch that sums."""

    target: Target
    world: int
    bytes_per_s: float
    peers: bool
    multicast: bool


def links_of(
    target: str | Target, world: int, *, topology: str | None = None, per_node: int = 8
) -> Links:
    """Raises InvalidSite for another topology or fewer than 2 ranks, InvalidTarget without links.

    topology: "nvswitch", "pairwise" (bridges between two) or "pcie"; by default "pcie" where a link
    carries no more than PCIe does; per_node: ranks in a node.
    """
    if world < 2 or per_node < 1:
        raise InvalidSite(
            f"expected 2 or more ranks, 1 or more of them in a node; found {world}, {per_node}"
        )
    t = load_target(target)
    if t.kind == "cpu" or t.link_bytes_per_s <= 0:
        raise InvalidTarget(
            f"target {t.name!r}: expected a GPU with a positive link_gb_per_s, found"
            f" {t.kind} with {t.link_bytes_per_s:g} bytes/s"
        )
    if topology is None:
        topology = "pcie" if t.link_bytes_per_s <= PCIE_AT_MOST else "nvswitch"
    if topology not in TOPOLOGIES:
        raise InvalidSite(f"topology: expected one of {', '.join(TOPOLOGIES)}, found {topology!r}")
    slowest = ring_bytes_per_s(t, topology, world, per_node)
    within = per_node >= world
    peers = within and (topology == "nvswitch" or (topology == "pairwise" and world == 2))
    generation = re.match(r"sm_(\d+)", t.arch)
    hopper = generation is not None and int(generation[1]) >= 90
    return Links(t, world, slowest, peers, peers and hopper and topology == "nvswitch")


def norm_seconds(size: float, target: Target, c: Constants = FITTED) -> float:
    """Residual addition and RMSNorm of `size` bytes, launched by itself."""
    return c.norm_us * 1e-6 + 4 * size / (target.bandwidth_bytes_per_s * c.norm_memory)


def nccl_seconds(size: float, links: Links, c: Constants = FITTED) -> float:
    wire = 2 * (links.world - 1) / links.world * size / links.bytes_per_s
    return min(
        c.nccl_low_us * 1e-6 + wire / c.nccl_low_link,
        c.nccl_high_us * 1e-6 + wire / c.nccl_high_link,
    )


def multimem_seconds(size: float, links: Links, c: Constants = FITTED) -> float:
    """All-reduce by the switch."""
    wire = (1 + 1 / links.world) * size / (links.bytes_per_s * c.all_reduce_link)
    return c.all_reduce_us * 1e-6 + wire


def reduce_scatter_seconds(size: float, links: Links, c: Constants = FITTED) -> float:
    """By the switch, or as half of an all-reduce by rings."""
    if not links.multicast:
        return nccl_seconds(size / 2, links, c)
    return c.reduce_scatter_us * 1e-6 + size / (links.bytes_per_s * c.reduce_scatter_link)


def all_gather_seconds(size: float, links: Links, c: Constants = FITTED) -> float:
    """Of `size` bytes in all; as `reduce_scatter_seconds`."""
    if not links.multicast:
        return nccl_seconds(size / 2, links, c)
    return c.all_gather_us * 1e-6 + size / (links.bytes_per_s * c.all_gather_link)


def sequence_parallel_seconds(size: float, links: Links, c: Constants = FITTED) -> float:
    """Reduce-scatter, norm of a shard, all-gather: three kernels."""
    shard = norm_seconds(size / links.world, links.target, c)
    return reduce_scatter_seconds(size, links, c) + shard + all_gather_seconds(size, links, c)


def fused_seconds(
    way: str, tokens: int, row_bytes: int, links: Links, blocks: int, c: Constants = FITTED
) -> float:
    """The fused kernel `way` of `FUSED` on `blocks` thread blocks."""
    p, size = links.world, tokens * row_bytes
    latency, link = c.fused_us * 1e-6, P2P_EFFICIENCY
    owned, wire, local, ahead = ceil(tokens / p), 2 * (p - 1) / p * size, 0.0, 0
    if way == "multimem":
        wire, link = (1 + 1 / p) * size, c.fused_link
        latency += c.per_block_us * 1e-6 * min(blocks, owned)
    elif way == "one_shot":
        latency = ONE_SHOT_S.get(links.target.arch, ONE_SHOT_S["sm_80"]) + EAGER_S
        owned, wire, ahead = tokens, (p - 1) * size, 1  # its latency holds the first row
        local = 3 * size / (links.target.bandwidth_bytes_per_s * c.norm_memory)
    rows = ceil(owned / blocks) * ceil(row_bytes / ROW_BYTES) - ahead
    busy, sent = rows * c.row_us * 1e-6, wire / (links.bytes_per_s * link)
    q = c.sharpness
    return latency + (busy**q + sent**q + local**q) ** (1 / q)


def best_blocks(
    way: str, tokens: int, row_bytes: int, links: Links, c: Constants = FITTED
) -> tuple[int, float]:
    """(thread blocks, seconds) of the fastest launch of a fused kernel that has the device."""
    found = {b: fused_seconds(way, tokens, row_bytes, links, b, c) for b in BLOCKS}
    blocks = min(found, key=lambda b: found[b])
    return blocks, found[blocks]


@dataclass(frozen=True, slots=True)
class Way:
    """One alternative: seconds, or None and the reason why it can't be taken."""

    name: str
    seconds: float | None
    reason: str = ""
    blocks: int = 0

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.name}: not here: {self.reason}"
        blocks = f" on {self.blocks} thread blocks" if self.blocks else ""
        return f"{self.name}: {self.seconds * 1e6:.1f} us{blocks}"


@dataclass(frozen=True, slots=True)
class SiteChoice:
    """The fastest way and all of them, in the order of `WAYS`."""

    chosen: str
    ways: tuple[Way, ...]

    def __getitem__(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def __str__(self) -> str:
        return f"{self.chosen} ({'; '.join(map(str, self.ways))})"


def refusals(links: Links, hidden: int, itemsize: int = 2) -> Mapping[str, str]:
    """Why ways can't be taken: name -> reason."""
    out = {}
    if hidden > MOST_ELEMENTS or hidden * itemsize % 16:
        rows = f"rows of up to {MOST_ELEMENTS} elements in groups of 16 bytes, found {hidden}"
        out |= dict.fromkeys(FUSED, f"the fused kernels take {rows} elements of {itemsize} bytes")
    if links.world > MOST_RANKS:
        most = f"the fused kernels take up to {MOST_RANKS} ranks, found {links.world}"
        out |= dict.fromkeys(FUSED, most)
    if not links.peers:
        apart = "the ranks' memories aren't all joined by NVLink, so no kernel can read its peers'"
        out |= dict.fromkeys(("one_shot", "two_shot"), apart)
    if links.target.kind != "cuda":
        out |= dict.fromkeys(FUSED, "the fused kernels' signals are PTX, for NVIDIA GPUs")
    if not links.multicast:
        switch = "needs an NVSwitch that sums and sm_90 or later"
        out |= {name: switch for name in ("multimem_all_reduce", "multimem") if name not in out}
    return out


def choose_site(
    tokens: int,
    hidden: int,
    world: int,
    target: str | Target,
    *,
    itemsize: int = 2,
    topology: str | None = None,
    per_node: int = 8,
    launch: str = "graph",
) -> SiteChoice:
    """The fastest way to reduce, add and normalise [tokens, hidden], with all ways' seconds.

    launch: "graph" or "eager", in which each kernel takes EAGER_S more. Deterministic: all ranks
    that ask the same choose the same. Raises InvalidSite, UnknownTarget, InvalidTarget.
    """
    if min(tokens, hidden, itemsize) < 1 or launch not in ("graph", "eager"):
        raise InvalidSite(
            "expected positive sizes and launch 'graph' or 'eager'; found"
            f" tokens={tokens}, hidden={hidden}, itemsize={itemsize}, launch={launch!r}"
        )
    links = links_of(target, world, topology=topology, per_node=per_node)
    refused = refusals(links, hidden, itemsize)
    row, size = hidden * itemsize, tokens * hidden * itemsize
    norm = norm_seconds(size, links.target)
    kernels = {"nccl": 2, "multimem_all_reduce": 2, "sequence_parallel": 3}
    seconds = {
        "nccl": nccl_seconds(size, links) + norm,
        "multimem_all_reduce": multimem_seconds(size, links) + norm,
        "sequence_parallel": sequence_parallel_seconds(size, links),
    }
    ways = []
    for name in WAYS:
        if name in refused:
            ways.append(Way(name, None, refused[name]))
            continue
        blocks = 0
        if name in FUSED:
            blocks, seconds[name] = best_blocks(name, tokens, row, links)
        saved = EAGER_S * kernels.get(name, 1) if launch == "graph" else 0.0
        ways.append(Way(name, seconds[name] - saved, blocks=blocks))
    possible = [way for way in ways if way.seconds is not None]
    return SiteChoice(min(possible, key=lambda way: way.seconds or 0.0).name, tuple(ways))
