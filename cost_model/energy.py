"""Energy of a kernel in joules, by unit energies of a 45 nm process.

    E = sum over (kind, dtype) of operations · unit energy + bytes · (DRAM + on-chip buffer)

The units rank number formats and codecs; they are not watts of any chip here, and are never turned
into time. Every byte is charged the way from DRAM and once through the buffer on the chip, those of
additions and lookups too: the published accounting of ShiftAddViT and ShiftAddLLM lets those travel
free, which is a part of the savings that it reports. Registers and the network between processing
elements are left out: what they cost depends on the dataflow, and it is alike for all codecs.
"""

from ridgeline.cost_model.operations import operations
from ridgeline.cost_model.work import Collective, Kernel

PICO = 1e-12

UNITS: dict[tuple[str, str], float] = {
    # Horowitz, ISSCC 2014, 45 nm, 0.9 V.
    ("multiply", "float32"): 3.7, ("add", "float32"): 0.9,
    ("multiply", "float16"): 1.1, ("add", "float16"): 0.4,
    ("multiply", "int32"): 3.1, ("add", "int32"): 0.1,
    ("multiply", "int8"): 0.2, ("add", "int8"): 0.03,
    ("add", "int16"): 0.05,
    # Not in it: bf16 as fp16 (its multiplier is smaller), fp8 as half of fp16, fp64 and the int16
    # multiplier by the square of the width, fp64 additions by the width.
    ("multiply", "bfloat16"): 1.1, ("add", "bfloat16"): 0.4,
    ("multiply", "float8"): 0.55, ("add", "float8"): 0.2,
    ("multiply", "float64"): 14.8, ("add", "float64"): 3.6,
    ("multiply", "int16"): 0.78,
    # ShiftAddViT's code for integer shifts; ShiftAddLLM's for a floating number times a power of
    # two (an addition of exponents) and for one query of a table.
    ("shift", "int32"): 0.13, ("shift", "int16"): 0.057, ("shift", "int8"): 0.024,
    ("shift", "float32"): 0.15, ("shift", "float16"): 0.15, ("shift", "bfloat16"): 0.15,
    ("lookup", "*"): 0.37,
    # A division by four multiplications (Newton's method); there is one per query at most.
    ("divide", "float32"): 14.8,
}  # fmt: skip
"""Picojoules by (kind, dtype name); "*" for every dtype."""

DRAM_PICOJOULES_PER_BYTE = 100.0
"""200 pJ per 16 bits, as in Eyeriss's hierarchy and ShiftAddViT's code."""
BUFFER_PICOJOULES_PER_BYTE = 11.1
"""22.2 pJ per 16 bits of the global buffer, six times a register's 3.7 (same sources)."""


def unit_joules(kind: str, dtype: str) -> float:
    """Joules of one operation; of a dtype without a figure of its own, float32's."""
    for name in (dtype, dtype.partition("_")[0], "*", "float32"):
        if (kind, name) in UNITS:
            return UNITS[kind, name] * PICO
    raise KeyError(f"no unit energy for {kind!r}; expected one of {sorted({k for k, _ in UNITS})}")


def joules(kernel: Kernel) -> float:
    """Energy of one kernel; of a collective nothing, since links have no figure here."""
    if isinstance(kernel, Collective):
        return 0.0
    arithmetic = sum(n * unit_joules(*unit) for unit, n in operations(kernel).items())
    return arithmetic + movement_joules(sum(kernel.bytes.values()))


def movement_joules(moved: float) -> float:
    """Energy of `moved` bytes between DRAM and the arithmetic units."""
    return moved * (DRAM_PICOJOULES_PER_BYTE + BUFFER_PICOJOULES_PER_BYTE) * PICO
