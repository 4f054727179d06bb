"""Measured kernel times as CSV files, grouped for the cost model's laws.

A folder holds gemm.csv, gemm_quant.csv, attention.csv, memory.csv and collective.csv, one measured
kernel a row: gpu, op, dtype, shape parameters, median_us; and it may hold dtype_choice.csv, one
product a row with a column of microseconds for each dtype, whose rows are `beside` the others.
"""

import csv
import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.cost_model import shapes
from ridgeline.cost_model.machine import machine_of
from ridgeline.ir.errors import RidgelineError

FILES = ("gemm", "gemm_quant", "attention", "memory", "collective")
# Launched one by one: these time the host, of which `predict` knows nothing.
HOST_BOUND = {"vllm_eager", "llmcompass"}
CHOICE, CHOICE_DTYPES = "dtype_choice.csv", ("bf16", "int8", "w8a16", "w4a16")
_PRODUCT = ("gpu", "m", "n", "k")
_COLUMNS = {"source", "variant", "gpu", "op", "dtype", "median_us"}
# What makes two shapes "the same layer": held-out shapes are held out by this key.
_KEYS = (("n", "k"), ("heads", "kv_heads", "head_dim"), ("width",), ("bytes",))


@dataclass(frozen=True, slots=True)
class Times:
    """The rows of one group: arrays of one length; s and machine are the laws' arguments."""

    group: shapes.Group
    name: np.ndarray  # machine with topology, as calibrated
    harness: np.ndarray  # "source variant gpu op": rows that one person measured in one way
    layer: np.ndarray  # CRC of the sizes that make a layer: what is held out is held out by it
    beside: np.ndarray  # of dtype_choice.csv: residuals alone are fitted to them; not scored
    log_s: np.ndarray
    machine: Mapping[str, np.ndarray]
    s: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.log_s)

    @property
    def held_out(self) -> np.ndarray:
        """30 % of the layers."""
        return self.layer % 100 < 30

    def where(self, mask: np.ndarray) -> "Times":
        return Times(
            self.group,
            self.name[mask],
            self.harness[mask],
            self.layer[mask],
            self.beside[mask],
            self.log_s[mask],
            {k: v[mask] for k, v in self.machine.items()},
            {k: v[mask] for k, v in self.s.items()},
        )


class KernelTimesError(RidgelineError):
    """A folder does not hold measured kernel times."""


def read(folder: Path) -> dict[str, Times]:
    """Group key -> its rows. Raises KernelTimesError for a folder without one of FILES, or one of
    them without its columns, with an operator or dtype that `predict` does not know, or with a size
    or time that is no positive number; UnknownTarget for a GPU that isn't described."""
    rows: dict[shapes.Group, list[dict[str, str]]] = defaultdict(list)
    for file in FILES:
        path = folder / f"{file}.csv"
        if not path.is_file():
            raise KernelTimesError(
                f"{folder}: expected a folder with {', '.join(f'{f}.csv' for f in FILES)}, found no"
                f" {path.name}"
            )
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            _check_columns(_COLUMNS, reader.fieldnames, path)
            for row in reader:
                _check_time(row["median_us"], f"{path}:{reader.line_num}: median_us")
                if (
                    {row["source"], row["variant"]} & HOST_BOUND
                    or _slow_fp8(row)
                    or _unbridged(row)
                ):
                    continue
                rows[_group(row, f"{path}:{reader.line_num}")].append(row)
    if (path := folder / CHOICE).is_file():
        _add_choices(rows, path)
    return {group.key: _times(group, found) for group, found in sorted(rows.items(), key=str)}


def _group(row: Mapping[str, str], where: str) -> shapes.Group:
    op, dtype = row["op"], row["dtype"]
    if op not in shapes.PARAMETERS:
        known = ", ".join(shapes.PARAMETERS)
        raise KernelTimesError(f"{where}: op: expected one of {known}, found {op!r}")
    if dtype not in shapes.dtypes_of(op):
        known = ", ".join(shapes.dtypes_of(op))
        raise KernelTimesError(f"{where}: dtype: expected one of {known} for {op}, found {dtype!r}")
    for name in shapes.PARAMETERS[op]:
        written = row.get(name) or ""
        least = 0 if name == "window" else 1
        if not written.isdecimal() or int(written) < least:
            expected = f"expected an integer of at least {least}"
            raise KernelTimesError(f"{where}: {name}: {expected}, found {written!r}")
    return shapes.group_of(op, dtype)


def _check_columns(wanted: Set[str], found: Sequence[str] | None, path: Path) -> None:
    if missing := wanted - set(found or ()):
        raise KernelTimesError(f"{path}: expected a column {min(missing)!r}")


def _check_time(written: str | None, where: str) -> None:
    try:
        known = 0 < float(written or "") < math.inf
    except ValueError:
        known = False
    if not known:
        raise KernelTimesError(f"{where}: expected microseconds, found {written!r}")


def _add_choices(rows: dict[shapes.Group, list[dict[str, str]]], path: Path) -> None:
    """Adds products that groups of `rows` haven't already. Its fp8 is that of `_slow_fp8`."""
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        _check_columns(set(_PRODUCT), reader.fieldnames, path)
        choices = [(reader.line_num, row) for row in reader]
    for dtype in CHOICE_DTYPES:
        known = rows.get(shapes.group_of("gemm", dtype), [])
        seen = {tuple(row[key] for key in _PRODUCT) for row in known}
        for line, choice in choices:
            measured = choice.get(dtype)
            if known and measured and tuple(choice[key] for key in _PRODUCT) not in seen:
                _check_time(measured, f"{path}:{line}: {dtype}")
                row = {**choice, "variant": CHOICE, "op": "gemm", "dtype": dtype, "batch": "1"}
                known.append({**row, "median_us": measured})


def _slow_fp8(row: Mapping[str, str]) -> bool:
    """TensorRT-LLM's fp8 path adds 7 us of kernels to what vLLM's takes: one name, two kernels."""
    return row["dtype"] == "fp8" and row["variant"].startswith("trtllm")


def _unbridged(row: Mapping[str, str]) -> bool:
    """A40s that exchange 4 GB/s inside a node: through the host, past the bridge they have."""
    return row["gpu"] == "a40_pairwise" and row["per_node"] == row["world"]


def _times(group: shapes.Group, rows: list[dict[str, str]]) -> Times:
    names, harness, layer, machines, inputs = [], [], [], [], []
    for row in rows:
        op, dtype = row["op"], row["dtype"]
        shape = {key: int(row[key]) for key in shapes.PARAMETERS[op]}
        machine, name = machine_of(row["gpu"], op, dtype, shape.get("world"), shape.get("per_node"))
        names.append(name)
        machines.append(machine)
        harness.append(" ".join((row["source"], row["variant"], row["gpu"], op, dtype)))
        layer.append(_crc(row))
        inputs.append(shapes.law_inputs(op, dtype, shape))
    return Times(
        group,
        np.array(names),
        np.array(harness),
        np.array(layer),
        np.array([row["variant"] == CHOICE for row in rows]),
        np.log([float(row["median_us"]) * 1e-6 for row in rows]),
        _columns(machines, group.law),
        _columns(inputs, group.law),
    )


def _columns(rows: list[dict[str, Any]], law: str) -> dict[str, np.ndarray]:
    # The laws of GEMM spread their candidates over a last axis.
    columns = {k: np.array([r[k] for r in rows], dtype=np.float64) for k in rows[0]}
    return {k: v[:, None] for k, v in columns.items()} if law == "gemm" else columns


def _crc(row: Mapping[str, str]) -> int:
    keys = next(k for k in _KEYS if all(row.get(part) for part in k))
    return zlib.crc32(",".join(row[k] for k in keys).encode())
