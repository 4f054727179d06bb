"""What the laws read of a GPU: numbers of its target file, and of how its GPUs are linked.

peak       dense FLOP/s that large products sustain within the board's power: the published peak
           times the product's measured fraction; of vectors, the board's power / energy a FLOP
dram       bytes/s of the data sheet; cache: bytes of the whole last cache
boost      dense FLOP/s at the board's clock, which short or half-idle kernels keep
clock      peak float32 / (2 · cores · lanes); cycle: an A100's clock over it
link       bytes/s, one direction, of the slowest link that a ring over the ranks crosses
"""

import functools
from collections.abc import Mapping
from dataclasses import replace

from ridgeline.cost_model import shapes
from ridgeline.cost_model.shapes import InvalidShape
from ridgeline.cost_model.target import (
    FOLDER,
    HOST,
    InvalidTarget,
    Target,
    UnknownTarget,
    load_target,
)

TOPOLOGIES = ("nvswitch", "pairwise", "pcie")
REFERENCE_LAUNCH_S = 2.4e-6  # an A100's: floors are fitted in units of it
REFERENCE_CLOCK_HZ = 1.41e9  # an A100's
REFERENCE_RATIO = 16.0  # an A100's peak of products over that of vectors
# A target file's fraction is a median over products, a tenth of whose time tiles lose.
SUSTAINED = 1.15
# Joules of a float32 FLOP outside the tensor cores, board included: a T4's and an A100's from what
# they sustain at their power limits; others estimates, by process node from those.
_JOULES_PER_FLOP = {
    "sm_70": 16e-12, "sm_75": 16e-12, "sm_80": 14.5e-12, "sm_86": 9e-12, "gfx908": 13e-12,
    "gfx90a": 9e-12, "gfx942": 5.5e-12,
}  # fmt: skip
_JOULES_PER_FLOP_4_NM = 5.5e-12
UNTHROTTLED = 0.9  # of the boost, by products that no power limit slows
# Two halves of an A100's L2 cache hold copies of what both sides' cores read: this much is left
# to streams, which find what a kernel before left, and to what products and decodes read again, as
# their times say. Hopper's and Blackwell's halves cost no capacity that measurements show.
_HALVED_L2 = {"sm_80"}
HALVED, HALVED_STREAM = 0.35, 0.5
# float32 multiply-adds of a core in a cycle, where they aren't 128
_LANES = {"sm_70": 64, "sm_75": 64, "sm_80": 64, "gfx908": 64, "gfx90a": 64}
# Threads that a core holds at once, where they aren't 2048
_THREADS = {"sm_75": 1024.0, "sm_86": 1536.0, "sm_89": 1536.0, "sm_120": 1536.0}
# FLOPs of a core in a cycle, 16-bit operands and float32 sums; the published peaks of Hopper and
# Blackwell are for a lower clock than the boards keep under light load.
_TENSOR = {"sm_90": 4096, "sm_100": 8192}
# Matrix units that read operands from shared memory while threads do something else; sm_120 has
# units of the older kind, and so have kernels that unpack weights or are written for int8.
_ASYNCHRONOUS = {"sm_90", "sm_100"}
_ASYNCHRONOUS_DTYPES = {"bf16", "fp16", "fp8"}
# Matrix units that multiply float32 at twice the vectors' rate, and libraries that use them.
_MATRIX_FP32 = {"gfx908", "gfx90a"}
# Kernels for int8 still issue the older instructions, which reach this much of Hopper's peak.
OLDER_INSTRUCTIONS = 0.63
# PCI Express of 16 lanes, one direction: generation 5 since Hopper, 4 before
_PCIE_5 = {"sm_90", "sm_100", "sm_120", "gfx942"}
PCIE_BYTES_PER_S = {True: 64e9, False: 32e9}
BRIDGE_BYTES_PER_S = 300e9  # of one direction: the widest NVLink bridge between two cards
# Switches that add on the way nearly halve what an all-reduce sends; NCCL's versions differ in when
# they use it, and measured gains lie between 1.1 and 1.3.
IN_SWITCH = 1.2
# What nodes of each topology reach between them: an environment's property, not a GPU's.
NETWORK_BYTES_PER_S = {"nvswitch": 8e9, "pairwise": 2.7e9, "pcie": 2.7e9}
NETWORK_LIMIT = 3.0  # cards' worth that several ranks of a node reach together
NETWORK_GENERATION = 5.0  # Hopper's nodes came with 400 Gb/s cards, Ampere's mostly with 100


@functools.lru_cache(maxsize=1024)
def machine_of(
    target: str | Target, op: str, dtype: str, world: int | None = None, per_node: int | None = None
) -> tuple[Mapping[str, float], str]:
    """The laws' `machine`, and the name under which it may be calibrated.

    Raises UnknownTarget for a name that isn't described, and InvalidShape for a CPU.
    """
    t, topology = _loaded(target)
    slow = t.launch_s / REFERENCE_LAUNCH_S
    clock = t.peaks["float32"] / (2 * t.cores * _LANES.get(t.arch, 128))
    modern = t.arch.startswith("sm_") and int(t.arch.removeprefix("sm_")) >= 90
    asynchronous = t.arch in _ASYNCHRONOUS and dtype in _ASYNCHRONOUS_DTYPES
    peak, sustained, boost = _rates(t, op, dtype, clock)
    # Below, the board's power is taken to limit what the file's fractions say.
    throttled = SUSTAINED * t.gemm_efficiency < UNTHROTTLED
    machine = {
        "peak": sustained,
        "boost": boost,
        "intensity": _unit_peak(t, dtype) / t.bandwidth_bytes_per_s,
        "cores": float(t.cores),
        "threads": _THREADS.get(t.arch, 2048.0),
        "bandwidth": t.bandwidth_bytes_per_s * t.bandwidth_efficiency,
        "l2": t.l2_bytes * _kept(t, op),
        "l2_bandwidth": t.l2_bandwidth_bytes_per_s,
        "dram": t.bandwidth_bytes_per_s,
        "cache": float(t.l2_bytes),
        "attention": t.attention_efficiency / t.gemm_efficiency,
        "attention_peak": peak * (t.attention_efficiency if throttled else 1.0),
        # Exponentials are to products as on one unit where that of vectors multiplies.
        "vector": (1.0 if dtype == "fp32" else _unit_peak(t, "fp16") / t.peaks["float32"])
        / REFERENCE_RATIO,
        "slow": slow,
        "floor": _floor(dtype, slow, REFERENCE_CLOCK_HZ / clock),
        "cycle": REFERENCE_CLOCK_HZ / clock,
        "clock": clock,
        # Warp-specialized kernels begin a tile's loads while the last one is written.
        "prologue": REFERENCE_CLOCK_HZ / clock * (0.5 if asynchronous else 1.0),
        # They keep about twice as many of a tile's loads in flight.
        "chain": (REFERENCE_CLOCK_HZ / clock) ** 0.5 * (0.5 if asynchronous else 1.0),
        # Libraries of today have tiles of any width for them. Products in fp16 were measured in
        # engines with those of Hopper's first year, which hadn't: few rows of an H100 say so.
        "fine": 1.0 if asynchronous and dtype != "fp16" else 0.0,
        # Hopper's tensor memory accelerator keeps about twice as many bytes in flight a core.
        "key": (REFERENCE_CLOCK_HZ / clock) ** 0.5 * (0.5 if modern else 1.0),
        # Products in 8 bits scale rows and columns in their epilogue only since Hopper.
        "unfused": 0.0 if modern else 1.0,
        # FlashAttention-2 copies grouped queries; the kernels of newer cores read them in place.
        "copies": 0.0 if modern else 1.0,
        # FlashAttention-3 and its successors lay the queries of a group of heads into one tile.
        "packed": 1.0 if asynchronous else 0.0,
        # A kernel may be launched before the one it depends on ends; and, on B200, one block a
        # core walks over the sequences.
        "merge": 0.25 if asynchronous else 1.0,
        "start": 0.5 if asynchronous and t.arch == "sm_100" else 1.0,
    }
    name = t.name if _is_built_in(t) else f"{t.name} as described by others"
    if world is not None and per_node is not None:
        if world > 1 and t.link_bytes_per_s <= 0:
            raise InvalidTarget(
                f"target {t.name!r}: key 'link_gb_per_s': expected a positive number for {op} over"
                f" {world} ranks, found 0"
            )
        machine["link"] = ring_bytes_per_s(t, topology, world, per_node)
        whole = topology == "nvswitch" and op == "all_reduce" and per_node == world >= 4
        machine["link"] *= IN_SWITCH if modern and whole else 1.0
        machine["meshed"] = float(topology == "nvswitch" or world == 2)
        name = f"{name}_{topology}"
    return machine, name


def _is_built_in(t: Target) -> bool:
    """Has it the figures of the file that ridgeline ships under that name? What was measured of a
    machine holds for no other that is called so."""
    return _figures(t) == _shipped(t.name)


@functools.cache
def _shipped(name: str) -> Target | None:
    file = FOLDER / f"{name}.toml"
    return _figures(load_target(file)) if file.is_file() else None


def _figures(t: Target) -> Target:
    return replace(t, sources={}, refined={})


def with_fewer_cores(machine: Mapping[str, float], op: str, reserved: int) -> Mapping[str, float]:
    """The machine while another kernel holds `reserved` of its cores. Raises InvalidShape where
    none is left."""
    cores = machine["cores"]
    whole = isinstance(reserved, int) and not isinstance(reserved, bool)
    if not whole or not 0 <= reserved < cores:
        raise InvalidShape(
            f"{op}: reserved: expected 0 to {cores - 1:.0f} cores, found {reserved!r}"
        )
    rates = ("cores", "peak", "boost", "attention_peak")
    return {**machine, **{name: machine[name] * (1 - reserved / cores) for name in rates}}


def _kept(t: Target, op: str) -> float:
    """The share of the L2 cache that holds no second copies."""
    if t.arch not in _HALVED_L2:
        return 1.0
    return HALVED_STREAM if op in shapes.STREAMS else HALVED


def _floor(dtype: str, slow: float, cycle: float) -> float:
    """How long a product's shortest call takes in units of an A100's."""
    if dtype == "fp8":
        return 1.0  # two kernels: the gap between them is the host's
    # Unpacking weights is a chain of instructions, which the clock paces.
    return slow * cycle**0.5 if dtype in ("int8", "w8a16", "w4a16") else slow


def _rates(t: Target, op: str, dtype: str, clock: float) -> tuple[float, float, float]:
    """(published, sustained, unthrottled) FLOP/s of the unit that runs it."""
    peak = _unit_peak(t, dtype)
    matrix = dtype != "fp32"
    if dtype == "fp32" and op in ("gemm", "bmm") and t.arch in _MATRIX_FP32:
        peak, matrix = 2 * peak, True
    if not matrix:
        joules = _JOULES_PER_FLOP.get(t.arch, _JOULES_PER_FLOP_4_NM)
        return peak, min(peak, t.tdp_w / joules), peak
    if dtype == "int8" and t.arch in _TENSOR:
        peak *= OLDER_INSTRUCTIONS
    rate = _TENSOR.get(t.arch)
    # The boards' clock over that of the published peak.
    above = min(1.1, clock * rate * t.cores / _unit_peak(t, "fp16")) if rate else 1.0
    # More than the published peak, where boards' clocks exceed it: GeForce.
    sustained = SUSTAINED * t.gemm_efficiency
    return peak, peak * sustained, peak * above * max(sustained, UNTHROTTLED)


def _unit_peak(t: Target, dtype: str) -> float:
    """The published peak of the unit that runs it; of vectors where none does."""
    return _peak(t, dtype) or t.peaks["float32"]


def _peak(t: Target, dtype: str) -> float | None:
    unit = shapes.UNIT[dtype]
    if unit.startswith("float8"):
        unit = next((u for u in t.peaks if u.startswith("float8_e4m3")), unit)
    return t.peaks.get(unit)


@functools.lru_cache(maxsize=1024)
def executed(target: str | Target, op: str, dtype: str) -> str:
    """The dtype at whose rate a product of `dtype` runs: float32 where the machine has no unit for
    it, as V100 and T4 have none for bfloat16 and are handed conversions around vector kernels.

    Raises as `machine_of` does."""
    if op not in ("gemm", "bmm", "attn_prefill", "attn_decode") or dtype == "fp32":
        return dtype
    return dtype if _peak(_loaded(target)[0], dtype) else "fp32"


def _loaded(target: str | Target) -> tuple[Target, str]:
    """The machine that a name means, and its topology. Raises UnknownTarget, and InvalidShape for a
    CPU."""
    topology = "nvswitch"
    if isinstance(target, str):
        stem, _, last = target.rpartition("_")
        if last in TOPOLOGIES:
            target, topology = _described(target, stem), last
    if isinstance(target, str) and target in HOST:
        raise InvalidShape(f"target: expected a GPU, found {target!r}: use `estimate` for CPUs")
    t = load_target(target)
    if t.kind == "cpu":
        raise InvalidShape(f"target: expected a GPU, found {t.name!r}: use `estimate` for CPUs")
    return t, topology


def _described(whole: str, stem: str) -> str:
    """`h100_pcie` is a card, `l40s_pcie` a topology of one."""
    try:
        load_target(whole)
    except UnknownTarget:
        return stem
    return whole


def ring_bytes_per_s(t: Target, topology: str, world: int, per_node: int) -> float:
    """Bytes/s, in one direction, of the slowest link that a ring over `world` ranks crosses: across
    nodes that of the network or of a node's own ring."""
    pcie = PCIE_BYTES_PER_S[t.arch in _PCIE_5]
    if per_node < world:
        newer = NETWORK_GENERATION if t.arch in _PCIE_5 else 1.0
        network = NETWORK_BYTES_PER_S[topology] * newer * min(per_node, NETWORK_LIMIT)
        within = ring_bytes_per_s(t, topology, per_node, per_node) if per_node > 1 else network
        return min(network, within)
    if topology == "nvswitch":
        return t.link_bytes_per_s
    if topology == "pairwise":  # two GPUs share a bridge, pairs meet on PCIe
        return min(t.link_bytes_per_s, BRIDGE_BYTES_PER_S) if world == 2 else pcie
    return min(t.link_bytes_per_s, pcie) * (2 / world) ** 2  # through host memory
