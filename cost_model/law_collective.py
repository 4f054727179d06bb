"""Seconds of a collective over p ranks: latency, and payload on the slowest link.

    t = α + β phases (p - 1) + wire + √(wire · half · (α + β phases (p - 1)))
    wire = c (p - 1)/p · bytes / (link e (p/2)^ranks)

The square root is a ramp between the protocols for small messages and those for large ones.
Source: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = Any  # float or an array that broadcasts with the others

CONSTANTS = {"floor_us": 10.0, "step_us": 1.0, "link": 0.7, "half": 0.5, "ranks_power": 0.0}


def collective(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(latency, 0, wire) seconds; s: world, per_node, bytes, phases, wire (share of the bytes)."""
    floor, step, link, half, ranks = c
    p = s["world"]
    rate = machine["link"] * link * (p / 2.0) ** ranks
    latency = (floor + step * s["phases"] * (p - 1)) * 1e-6
    wire = s["bytes"] * s["wire"] / rate
    return latency, 0.0 * wire, wire + np.sqrt(wire * half * latency)
