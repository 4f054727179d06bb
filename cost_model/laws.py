"""The laws of `predict` by name, the constants that each needs, and how their parts add up.

    t = t_fixed + (t_compute⁴ + t_memory⁴)^¼

A law takes constants in natural units; a fit moves them on a scale where every number is allowed:
by default the logarithm, for `*_share` in (0, 1) the logit, for exponents `*_power` as they are; a
floor is at least what an empty kernel takes.
Every argument of a law may be a number or an array; nothing here knows of graphs or files.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ridgeline.cost_model import law_attention, law_collective, law_gemm, law_stream
from ridgeline.cost_model.elementwise import Numbers, root4

Law = Callable[
    [Sequence[float], Mapping[str, Numbers], Mapping[str, Numbers]],
    tuple[Numbers, Numbers, Numbers],
]
LAWS: Mapping[str, Law] = {
    "gemm": law_gemm.gemm,
    "prefill": law_attention.prefill,
    "decode": law_attention.decode,
    "stream": law_stream.stream,
    "collective": law_collective.collective,
}
CONSTANTS: Mapping[str, Mapping[str, float]] = {
    "gemm": law_gemm.CONSTANTS,
    "prefill": law_attention.PREFILL,
    "decode": law_attention.DECODE,
    "stream": law_stream.CONSTANTS,
    "collective": law_collective.CONSTANTS,
}


EMPTY_US = 1.5  # of an A100: traces with a step of 1 us would let fits find less


def total(parts: tuple[Numbers, Numbers, Numbers]) -> Numbers:
    """Seconds of (fixed, compute, memory)."""
    fixed, compute, memory = parts
    return fixed + root4(compute, memory)


def roof(law: str, machine: Mapping[str, float], s: Mapping[str, float]) -> float:
    """Seconds below which no kernel ends: its bytes by the data sheet, from DRAM but for what the
    whole last cache holds, and a product's FLOPs at the board's clock."""
    moved = s["bytes"]
    if law == "collective":
        return 0.0
    hit = 1 / (1 + (moved / machine["cache"]) ** 8)
    read = moved * ((1 - hit) / machine["dram"] + hit / machine["l2_bandwidth"])
    if law != "gemm":
        return read
    return max(read, 2.0 * s["batch"] * s["m"] * s["n"] * s["k"] / machine["boost"])


def natural(law: str, free: Sequence[float]) -> tuple[float, ...]:
    """Constants in natural units from numbers without bounds."""
    out = []
    for name, x in zip(CONSTANTS[law], free, strict=True):
        if name.endswith("_power"):
            out.append(float(x))
        elif name.endswith("_share"):
            out.append(float(1 / (1 + np.exp(-x))))
        else:
            out.append(float(np.exp(x)) + EMPTY_US * (name == "floor_us"))
    return tuple(out)


def free(law: str, constants: Sequence[float]) -> np.ndarray:
    """The inverse of `natural`."""
    out = []
    for name, x in zip(CONSTANTS[law], constants, strict=True):
        if name.endswith("_power"):
            out.append(x)
        elif name.endswith("_share"):
            out.append(np.log(x / (1 - x)))
        else:
            out.append(np.log(max(x - EMPTY_US * (name == "floor_us"), 1e-3)))
    return np.array(out)
