"""predict(target, op, dtype, **shape): seconds of one kernel from its shape alone, without a graph.

    seconds = law(constants, machine, shape) · exp(residual)

The law is physics (`laws`); its constants come from `calibration.json`, which
`python -m ridgeline.tools.fit_cost_model` writes from measured kernel times. A machine that was
measured has constants of its own and a smooth residual of the shape; any other has the constants
fitted over all machines and no residual. [low, high] is meant to hold 90 % of measurements.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.cost_model import laws, shapes
from ridgeline.cost_model.target import HOST, Target, UnknownTarget, load_target
from ridgeline.ir.errors import RidgelineError

CALIBRATION = Path(__file__).parent / "calibration.json"
TOPOLOGIES = ("nvswitch", "pairwise", "pcie")
REFERENCE_LAUNCH_S = 2.4e-6  # an A100's: floors are fitted in units of it
REFERENCE_CLOCK_HZ = 1.41e9  # an A100's
# float32 multiply-adds of a core in a cycle, where they aren't 128
_LANES = {"sm_70": 64, "sm_75": 64, "sm_80": 64, "gfx908": 64, "gfx90a": 64}
PCIE_BYTES_PER_S = 32e9  # generation 4, 16 lanes, one direction
# One network card of a node of each topology: an environment's property, not a GPU's.
NETWORK_BYTES_PER_S = {"nvswitch": 8e9, "pairwise": 3.2e9, "pcie": 3.2e9}


class InvalidShape(RidgelineError):
    """An operator, dtype or shape that `predict` has no law for."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """seconds, and [low, high], meant to hold 90 % of measurements."""

    seconds: float
    low: float
    high: float


def predict(
    target: str | Target, op: str, dtype: str, *, reserved: int = 0, **shape: int
) -> Prediction:
    """Seconds of `op` on `target`, of whose cores another kernel holds `reserved`.

    op, dtype and shape parameters: `gemm`, `bmm` (m, n, k, batch=1; fp32, bf16, fp16, fp8, int8,
    w8a16, w4a16: y[m, n] = x[m, k] w[n, k]ᵀ); `attn_prefill`, `attn_decode` (batch, heads,
    kv_heads, head_dim, q_len, kv_len, window=0); memory-bound operators (rows, width); collectives
    (world, per_node, bytes of payload per rank; the target's name may end in `_nvswitch`,
    `_pairwise` or `_pcie`). Raises UnknownTarget for a name that isn't described, InvalidShape for
    the rest.
    """
    try:
        return _predict(target, op, dtype, tuple(shape.items()), reserved)
    except TypeError as error:  # an unhashable argument
        if "unhashable" not in str(error):
            raise
        raise InvalidShape(f"{op}: expected integers, found {shape}") from error


@functools.lru_cache(maxsize=4096)
def _predict(
    target: str | Target, op: str, dtype: str, given: tuple[tuple[str, int], ...], reserved: int
) -> Prediction:
    shape = _checked(op, dtype, dict(given))
    machine, name = machine_of(target, op, dtype, shape.get("world"), shape.get("per_node"))
    if not 0 <= reserved < machine["cores"]:
        raise InvalidShape(
            f"{op}: reserved: expected 0 to {machine['cores'] - 1:.0f} cores, found {reserved!r}"
        )
    if reserved:
        left = 1 - reserved / machine["cores"]
        machine = {**machine, "cores": machine["cores"] * left, "peak": machine["peak"] * left}
    group = shapes.group_of(op, dtype)
    s = shapes.law_inputs(op, dtype, shape)
    if op in shapes.COLLECTIVES and shape["world"] == 1:
        return Prediction(0.0, 0.0, 0.0)
    model = _model()
    log_s = float(model.log_seconds(group, name, machine, s))
    below, above = model.interval(group, name)
    return Prediction(math.exp(log_s), math.exp(log_s + below), math.exp(log_s + above))


def _checked(op: str, dtype: str, given: Mapping[str, Any]) -> dict[str, int]:
    wanted = shapes.PARAMETERS.get(op)
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
        least = 0 if key == "window" else 1
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            shown = "nothing" if value is None else repr(value)
            raise InvalidShape(f"{op}: {key}: expected an integer >= {least}, found {shown}")
        shape[key] = int(value)
    if "heads" in shape and shape["heads"] % shape["kv_heads"]:
        raise InvalidShape(
            f"{op}: heads: expected a multiple of kv_heads = {shape['kv_heads']},"
            f" found {shape['heads']}"
        )
    if "q_len" in shape and shape["q_len"] > shape["kv_len"]:
        raise InvalidShape(
            f"{op}: q_len: expected at most kv_len = {shape['kv_len']}, found {shape['q_len']}"
        )
    return shape


@functools.lru_cache(maxsize=256)
def machine_of(
    target: str | Target, op: str, dtype: str, world: int | None = None, per_node: int | None = None
) -> tuple[dict[str, float], str]:
    """What the laws read of a machine, and the name under which it may be calibrated."""
    topology = "nvswitch"
    if isinstance(target, str) and op in shapes.COLLECTIVES:
        stem, _, last = target.rpartition("_")
        if last in TOPOLOGIES:
            target, topology = _described(target, stem), last
    if target in HOST:
        raise InvalidShape(f"target: expected a GPU, found {target!r}: use `estimate` for CPUs")
    t = load_target(target)
    unit = shapes.UNIT[dtype]
    # A GPU without bf16 or fp8 units runs on the widest 16-bit unit that it has.
    peak = t.peaks.get(unit) or t.peaks.get("float16") or t.peaks["float32"]
    if unit == "float16" or dtype == "fp32":
        peak = t.peaks.get(unit, t.peaks["float32"])
    machine = {
        "peak": peak * (t.gemm_efficiency if dtype != "fp32" else 1.0),
        "cores": float(t.cores),
        "bandwidth": t.bandwidth_bytes_per_s * t.bandwidth_efficiency,
        "l2": float(t.l2_bytes),
        "attention": t.attention_efficiency / t.gemm_efficiency,
        "link": t.link_bytes_per_s,
        "slow": t.launch_s / REFERENCE_LAUNCH_S,
        "cycle": REFERENCE_CLOCK_HZ * 2 * t.cores * _LANES.get(t.arch, 128) / t.peaks["float32"],
        "clock": t.peaks["float32"] / (2 * t.cores * _LANES.get(t.arch, 128)),
    }
    name = t.name
    if world is not None and per_node is not None:
        machine["link"] = ring_bytes_per_s(t, topology, world, per_node)
        name = f"{t.name}_{topology}"
    return machine, name


def _described(whole: str, stem: str) -> str:
    """`h100_pcie` is a card, `l40s_pcie` a topology of one."""
    try:
        load_target(stem)
    except UnknownTarget:
        return whole
    return stem


def ring_bytes_per_s(t: Target, topology: str, world: int, per_node: int) -> float:
    """Bytes/s, one direction, of the slowest link that a ring over `world` ranks crosses."""
    if per_node < world:
        return NETWORK_BYTES_PER_S[topology] * per_node
    if topology == "nvswitch":
        return t.link_bytes_per_s
    if topology == "pairwise":  # two GPUs share a bridge, pairs meet on PCIe
        return t.link_bytes_per_s if world == 2 else PCIE_BYTES_PER_S
    return min(t.link_bytes_per_s, PCIE_BYTES_PER_S) * (2 / world) ** 2  # through host memory


class Model:
    """The laws with the constants of a calibration; see `calibration.json` for its layout."""

    def __init__(self, calibration: Mapping[str, Any]) -> None:
        self.groups = calibration["groups"]
        self.residuals = {
            key: {
                name: {k: np.asarray(v) for k, v in own["residual"].items()}
                for name, own in group["machines"].items()
                if own.get("residual")
            }
            for key, group in self.groups.items()
        }

    def nearest(self, group: shapes.Group) -> str:
        """The group's key, or, for a dtype that nobody measured, that of the same operator."""
        if group.key in self.groups:
            return group.key
        stem = group.key.split(".")[0]
        same = [k for k in self.groups if k.split(".")[0] == stem]
        return (
            same[0] if same else next(k for k in self.groups if self.groups[k]["law"] == group.law)
        )

    def log_seconds(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """ln seconds; arrays for arrays."""
        key = self.nearest(group)
        fitted = self.groups[key]
        own = fitted["machines"].get(name, fitted)
        out = np.log(laws.LAWS[group.law](own["constants"], machine, s))
        residual = self.residuals[key].get(name)
        if residual is not None:
            out = out + smooth(residual, shapes.features(group.law, _flat(s), _flat(machine)))
        return out

    def interval(self, group: shapes.Group, name: str) -> tuple[float, float]:
        """(5 %, 95 %) quantiles of ln(measured / predicted)."""
        fitted = self.groups[self.nearest(group)]
        below, above = fitted["machines"].get(name, fitted)["interval"]
        return below, above


def _flat(s: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v[..., 0] if np.ndim(v) > 1 else v for k, v in s.items()}


def smooth(residual: Mapping[str, np.ndarray], at: tuple[Any, ...]) -> Any:
    """Σ wᵢ exp(-|x - cᵢ|² / 2) + w₀, with x in units of `scale`: ridge regression on Gaussians."""
    numbers = all(np.ndim(a) == 0 for a in at)  # the general way takes 30 us
    x = (np.array(at) if numbers else np.stack(np.broadcast_arrays(*at), -1)) / residual["scale"]
    c = residual["centres"]
    square = (x * x).sum(-1)[..., None] + residual["norms"] - 2 * (x @ c.T)
    return np.exp(-0.5 * square) @ residual["weights"] + residual["offset"]


@functools.cache
def _model() -> Model:
    return Model(json.loads(CALIBRATION.read_text(encoding="utf-8")))
