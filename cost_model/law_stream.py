"""Seconds of an operator that reads and writes tensors of rows x width once.

    t = floor + max₄(bytes / speed, scalar · bytes / (core · C · clock)) · ramp · shape
    speed = bandwidth e_m (1 + hits · l2),  hits: the share that the L2 cache holds
    ramp  = 1 + half · C / bytes: the kernel fills and drains

A kernel that loads element by element (`scalar`) is no faster than the bytes that its cores keep
in flight, whatever the memory could deliver. Source: Little's law; fitted forms otherwise.
"""

from collections.abc import Mapping, Sequence

from ridgeline.cost_model.elementwise import Numbers, largest, least

CONSTANTS = {
    "floor_us": 2.0, "memory": 1.0, "half": 20.0, "l2": 1.0, "width_power": 0.0, "narrow": 100.0,
    "resident_share": 0.4, "core": 7.0,
}  # fmt: skip


def stream(
    c: Sequence[float], machine: Mapping[str, Numbers], s: Mapping[str, Numbers]
) -> tuple[Numbers, Numbers, Numbers]:
    """(fixed, compute, memory) seconds; s: rows, width, bytes, scalar (1: element by element)."""
    floor, e_m, half, l2, width, narrow, resident, core = c
    moved, bandwidth = s["bytes"], machine["bandwidth"] * e_m
    hits = least(largest((1.0 - moved / machine["l2"]) / resident, 0.0), 1.0)
    speed = bandwidth * (1 + hits * l2)
    ramp = 1 + 0.1 * half * 1024 * machine["cores"] / moved
    # Rows shorter than a block's reach leave lanes idle; longer ones are read again.
    shape = (1 + narrow / 10 / s["width"]) * (1 + s["width"] / 16384) ** width * ramp
    cores = s["scalar"] * moved / (core * machine["cores"] * machine["clock"])
    start = floor * largest(machine["slow"], 1.0) * 1e-6
    return start, cores * shape, moved / speed * shape
