"""Seconds of a collective over p ranks: latency, and payload on the slowest link.

rings (NCCL), with c (p - 1)/p · bytes on the wire in `phases` rounds:
    t = α + β phases (p - 1) + wire + √(wire · half · (α + β phases (p - 1)))
    wire = c (p - 1)/p · bytes / (link e (p/2)^ranks); ranks: 0 across nodes, whose cards gain
           nothing by more of them
The square root is a ramp between the protocols for small messages and those for large ones.

all-reduce inside a serving engine's graph, below 8 MB and where every pair of ranks has a link: the
smaller of
    one pass:   α₁ + (p - 1) bytes / (link e₁)            every rank reads all others
    two passes: α₁ + α₂ + 2 (p - 1)/p bytes / (link e₁)   scattered sums, then gathered
Sources: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005; the
custom all-reduce of vLLM and TensorRT-LLM.
"""

from collections.abc import Mapping, Sequence

from ridgeline.cost_model.elementwise import Numbers, least

CONSTANTS = {
    "floor_us": 8.0, "step_us": 1.0, "link": 0.7, "half": 0.7, "ranks_power": 0.1,
    "direct_us": 5.0, "second_us": 5.0, "direct": 0.65, "rank_us": 0.1,
}  # fmt: skip
DIRECT_BYTES = 8 * 2**20  # and above, engines leave it to NCCL


def collective(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(latency, 0, wire) seconds.

    c: CONSTANTS in order; s: world, per_node, bytes, phases, wire (share of the bytes), direct (1:
    an engine's all-reduce may serve it).
    """
    floor, step, link, half, ranks, direct, second, e_direct, per_rank = c
    p, size = s["world"], s["bytes"]
    latency = (floor * machine["slow"] + step * s["phases"] * (p - 1)) * 1e-6
    within = s["per_node"] >= p
    wire = size * s["wire"] / (machine["link"] * link * (p / 2.0) ** (ranks * within))
    wire = wire + (wire * half * latency) ** 0.5
    start = (direct + per_rank * (p - 1)) * 1e-6
    speed = machine["link"] * e_direct
    once = size * (p - 1) / speed
    twice = second * 1e-6 + 2 * size * (p - 1) / p / speed
    chosen = s["direct"] * machine["meshed"]
    latency = chosen * start + (1 - chosen) * latency
    wire = chosen * least(once, twice) + (1 - chosen) * wire
    return latency, 0.0 * wire, wire
