"""predict(target, op, dtype, **shape): seconds of one kernel from its shape alone, without a graph.

    seconds = law(constants, machine, shape) · exp(residual), no less than the roof by that

The law is physics (`laws`); its constants come from `calibration.json`, which
`python -m ridgeline.tools.fit_cost_model` writes from measured kernel times. A machine that was
measured has constants of its own and a smooth residual of the shape; any other has the constants
fitted over all machines and no residual. [low, high] is meant to hold 90 % of measurements.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.cost_model import laws, shapes
from ridgeline.cost_model.calibration import calibration
from ridgeline.cost_model.energy import movement_joules, unit_joules
from ridgeline.cost_model.estimate import Cost
from ridgeline.cost_model.machine import executed, machine_of, with_fewer_cores
from ridgeline.cost_model.shapes import InvalidShape
from ridgeline.cost_model.target import Target, UnknownTarget, load_target

_BOUNDS = ("launch", "compute", "memory")
_NETWORK_BOUNDS = ("launch", "compute", "communication")
LARGEST_POWER = {"sizes": 32, "bytes": 50}  # of 2: what laws raise to the eighth stays a number
_SIZES = (1, 2 ** LARGEST_POWER["sizes"])
_NOTHING_SPENT = {"compute": 0.0, "memory": 0.0, "launch": 0.0, "communication": 0.0}
_LIMITS = {"window": (0, _SIZES[1]), "bytes": (1, 2 ** LARGEST_POWER["bytes"])}


def predict(target: str | Target, op: str, dtype: str, *, reserved: int = 0, **shape: int) -> Cost:
    """What one kernel `op` costs on `target`: seconds in [low, high], what bounds them, and work.

    op, dtype and shape parameters: `gemm`, `bmm` (m, n, k, batch=1; fp32, bf16, fp16, fp8, int8,
    w8a16, w4a16: y[m, n] = x[m, k] w[n, k]ᵀ); `attn_prefill`, `attn_decode` (batch, heads,
    kv_heads, head_dim, q_len, kv_len, window=0); memory-bound operators (rows, width); collectives
    (world, per_node: ranks that a node has room for, bytes of payload per rank; the target's name
    may end in `_nvswitch`, `_pairwise` or `_pcie`). target: a name of `target_names`, the path of a
    .toml file, or a Target. reserved: cores that another kernel holds meanwhile. Raises
    UnknownTarget for a name that isn't described, InvalidShape for the rest.
    """
    if not isinstance(target, str | Path | Target):
        raise UnknownTarget(
            f"target: expected one name, the path of a .toml file or a Target, found {target!r}"
        )
    shape = _checked(op, dtype, shape)
    if isinstance(target, str) and target.endswith(".toml") and (file := Path(target)).is_file():
        target = _own(target, file.stat().st_mtime_ns)
    network = op in shapes.COLLECTIVES
    runs = dtype if network else executed(target, op, dtype)
    machine, name = machine_of(target, op, runs, shape.get("world"), shape.get("per_node"))
    if reserved:
        machine = with_fewer_cores(machine, op, reserved)
    s = shapes.law_inputs(op, dtype, shape)
    if runs != dtype:  # a measured machine's kernels were others
        s |= shapes.AS_ONE_KERNEL
    if shape.get("world") == 1:
        return Cost(*[0.0] * 7, "communication", spent=dict(_NOTHING_SPENT))
    group = shapes.group_of(op, runs)
    model = calibration()
    parts = model.parts(group, name, machine, s)
    like = name if runs == dtype else ""
    law = laws.total(parts)
    factor = model.factor(group, like, machine, s, parts, law)
    seconds, fixed = law * factor, parts[0] * factor
    largest = max(range(3), key=parts.__getitem__)
    below, above = model.interval(group, like, largest)
    flops, moved = shapes.flops(op, shape), s["bytes"]
    eflops = 0.0 if network else flops + machine["intensity"] * moved
    energy = 0.0 if network else flops / 2 * _pair_joules(dtype) + movement_joules(moved)
    bound = _NETWORK_BOUNDS if network else _BOUNDS
    busy = bound[1 if parts[1] > parts[2] else 2]
    return Cost(
        seconds,
        seconds * math.exp(below),
        seconds * math.exp(above),
        moved,
        flops,
        eflops,
        energy,
        bound[largest],
        shapes.weight_bytes(op, dtype, shape),
        {**_NOTHING_SPENT, "launch": fixed, busy: seconds - fixed},
    )


@functools.lru_cache(maxsize=64)
def _own(path: str, modified: int) -> Target:
    """A description of the user's, read again once its file is written anew."""
    return load_target(path)


@functools.cache
def _pair_joules(dtype: str) -> float:
    """A multiplication and an addition to its accumulator."""
    unit = shapes.UNIT[dtype]
    accumulator = "float32" if unit != "int8" else "int32"
    return unit_joules("multiply", unit) + unit_joules("add", accumulator)


def _checked(op: str, dtype: str, given: Mapping[str, Any]) -> dict[str, int]:
    wanted = shapes.PARAMETERS.get(op) if isinstance(op, str) else None
    if wanted is None:
        raise InvalidShape(f"op: expected one of {', '.join(shapes.PARAMETERS)}, found {op!r}")
    dtypes = shapes.dtypes_of(op)
    if dtype not in dtypes:
        raise InvalidShape(f"{op}: dtype: expected one of {', '.join(dtypes)}, found {dtype!r}")
    if op in ("gemm", "bmm"):
        given = {"batch": 1, **given}
    shape = {}
    for key in given:
        if key not in wanted:
            raise InvalidShape(f"{op}: expected {', '.join(wanted)}, found {key!r}")
    for key, default in wanted.items():
        value = given.get(key, default)
        least, most = _LIMITS.get(key, _SIZES)
        # What is asked first is what it nearly always is: a prediction takes microseconds.
        if type(value) is not int:
            value = _integer(op, key, value, least)
        if not least <= value <= most:
            raise InvalidShape(_outside(op, key, value, least, most))
        shape[key] = value
    if "heads" in shape and shape["heads"] % shape["kv_heads"]:
        raise InvalidShape(
            f"{op}: heads: expected a multiple of kv_heads = {shape['kv_heads']},"
            f" found {shape['heads']}"
        )
    if "q_len" in shape and shape["q_len"] > shape["kv_len"]:
        raise InvalidShape(
            f"{op}: q_len: expected at most kv_len = {shape['kv_len']}, found {shape['q_len']}"
        )
    if "per_node" in shape:  # a node with room for more ranks holds these
        shape["per_node"] = min(shape["per_node"], shape["world"])
    return shape


def _integer(op: str, key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        shown = "nothing" if value is None else repr(value)
        raise InvalidShape(f"{op}: {key}: expected an integer >= {least}, found {shown}")
    return int(value)


def _outside(op: str, key: str, value: int, least: int, most: int) -> str:
    wanted = f"an integer >= {least}" if value < least else f"at most 2^{most.bit_length() - 1}"
    found = value if -most <= value < least else f"a number of {value.bit_length()} bits"
    return f"{op}: {key}: expected {wanted}, found {found}"
