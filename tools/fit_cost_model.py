"""`python -m ridgeline.tools.fit_cost_model FOLDER`: the constants of the laws from measured times.

For each group of operators:
    1. constants over all machines: least soft-L1 loss of ln(measured / law), every machine of
       equal weight;
    2. each machine's own: the same loss plus a ridge towards 1;
    3. a machine's residual: boosted trees over features of the shapes that were measured;
    4. intervals: quantiles of the errors by what bounds the kernel, of machines left out of 1 for a
       machine that wasn't measured, of shapes held out of 2 and 3 for one that was.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.optimize import least_squares

from ridgeline.cost_model import laws
from ridgeline.cost_model.calibration import CALIBRATION, Model, features
from ridgeline.tools.boosted_trees import boosted
from ridgeline.tools.kernel_times import Times, read

SEED = 0
ROWS = 1200  # of a machine that a fit of constants reads
FEW = 24  # rows below which a machine has no constants of its own
# How far constants are expected to lie from where a fit begins, and a machine's from all, on the
# fit's scale; target files measure what "power" corrects, physics gives "vector", and "ranks_power"
# is of links: what host memory makes of more ranks is no switch's.
PRIOR, OWN_PRIOR = 1.5, 3.0
TIGHT = {
    "power": 0.03, "vector": 0.03, "half": 0.1, "fill": 0.2, "quantized_row_ns": 0.1,
    "quantized": 0.1, "copies": 0.1, "ranks_power": 0.03,
}  # fmt: skip
PULL = 0.01  # of the mean error that moving a constant that far must save
# It times attention's kernel alone, others with what an engine runs around it: left out of what
# holds for all machines.
BARE = "llmservingsim flash_attn2"
# Batched products were timed from the host, one by one: none took less.
BEGIN = {
    "bmm.fp32": {"floor_us": 40.0, "copies": 1.0},
    "gemm.fp32": {"copies": 1.0},
    # A step loads as many bytes, hence twice the depth; kernels of fewer stages and tiles.
    "gemm.fp8": {"step_us": 0.12, "loss": 1.4, "floor_us": 4.2, "compute": 0.85, "memory": 0.93},
    "gemm.int8": {"step_us": 0.14, "split_us": 15.0, "floor_us": 10.3, "resident": 0.4},
    **{key: {"loss": 0.25, "step_us": 0.16} for key in ("gemm.w8a16", "gemm.w4a16")},
}
UNKNOWN = [(-0.5, 0.5)] * 3  # where nothing of a law was measured on two machines
FEWEST = 20  # errors that quantiles are taken of
ENOUGH = 4  # machines
WIDER = 1.25  # intervals of machines that were not measured

Interval = list[tuple[float, float]]  # (5 %, 95 %) quantiles by the largest of the parts
Errors = tuple[np.ndarray, np.ndarray]  # ln(measured / predicted), the largest of the parts


def constants(t: Times, begin: Sequence[float], prior: float) -> list[float]:
    """The law's constants with the least loss on `t`, near `begin`."""
    t = t.where(~t.beside)
    rng = np.random.default_rng(SEED)
    chosen = np.zeros(len(t), bool)
    for name in np.unique(t.harness):
        rows = np.flatnonzero(t.harness == name)
        chosen[rng.permutation(rows)[:ROWS]] = True
    t = t.where(chosen)
    # A machine weighs as the root of its rows, and on it every harness the same.
    weight = np.zeros(len(t))
    for name in np.unique(t.name):
        harnesses = np.unique(t.harness[t.name == name])
        for harness in harnesses:
            rows = (t.name == name) & (t.harness == harness)
            weight[rows] = np.sqrt((t.name == name).sum()) / (rows.sum() * len(harnesses))
    weight = np.sqrt(weight / weight.mean())
    name, start = t.group.law, laws.free(t.group.law, begin)
    law = laws.LAWS[name]
    width = np.array([TIGHT.get(c, 1.0) for c in laws.CONSTANTS[name]]) * prior

    def loss(x: np.ndarray) -> np.ndarray:
        error = t.log_s - np.log(laws.total(law(laws.natural(name, x), t.machine, t.s)))
        return np.concatenate([error * weight, PULL * len(t) * (x - start) / width])

    found = least_squares(loss, start, loss="soft_l1", f_scale=0.05, max_nfev=40, diff_step=1e-4).x
    return [float(f"{c:.4g}") for c in laws.natural(name, found)]


def residual(t: Times, model: Model) -> dict[str, Any]:
    """Trees over the features of `t`'s shapes, fitted to what the law leaves."""
    parts = model.parts(t.group, t.name[0], t.machine, t.s)
    at = np.stack(np.broadcast_arrays(*features(t.group, t.machine, t.s, parts)), -1)
    return boosted(at, t.log_s - np.log(laws.total(parts)), t.layer // 100, SEED)


def fit_group(t: Times, machines: bool = True) -> dict[str, Any]:
    """One group's entry of the calibration, with assumed intervals."""
    begin = {**laws.CONSTANTS[t.group.law], **BEGIN.get(t.group.key, {})}
    bare = np.array([h.startswith(BARE) for h in t.harness])
    shared = constants(t.where(~bare) if not bare.all() else t, list(begin.values()), PRIOR)
    entry: dict[str, Any] = {
        "law": t.group.law,
        "constants": shared,
        "machines": {},
        "interval": UNKNOWN,
    }
    for name in np.unique(t.name) if machines else ():
        own = t.where(t.name == name)
        if (~own.beside).sum() >= FEW:
            calibrate(entry, own)
    return entry


def calibrate(entry: dict[str, Any], own: Times, smooth: bool = True) -> None:
    """Gives `entry` constants for the one machine of `own`, and a residual unless `smooth` is
    false."""
    name = str(own.name[0])
    c = constants(own, entry["constants"], OWN_PRIOR)
    entry["machines"][name] = {"constants": c, "interval": entry["interval"]}
    if smooth:
        model = Model({"groups": {own.group.key: entry}})
        entry["machines"][name]["residual"] = residual(own, model)


def errors(entry: dict[str, Any], t: Times) -> Errors:
    """ln(measured / predicted) of each row, and which of the law's parts is the largest."""
    model = Model({"groups": {t.group.key: entry}})
    out, bound = np.empty(len(t)), np.empty(len(t), int)
    for name in np.unique(t.name):
        rows = t.name == name
        own = t.where(rows)
        out[rows] = own.log_s - model.log_seconds(t.group, str(name), own.machine, own.s)
        bound[rows] = np.argmax(model.parts(t.group, str(name), own.machine, own.s), 0)
    return out, bound


def boards(t: Times) -> np.ndarray:
    """The machine of each row; of a collective without its topology."""
    if t.group.law != "collective":
        return t.name
    return np.array([n.rpartition("_")[0] or n for n in t.name])


def of_board(t: Times, name: str) -> Times:
    """Its rows of the files of kernels."""
    return t.where((boards(t) == name) & ~t.beside)


def fits_without(t: Times) -> dict[str, dict[str, Any]]:
    """Machine -> an entry fitted on all others; empty if there is only one."""
    names = np.unique(boards(t))
    if len(names) < 2:
        return {}
    return {str(n): fit_group(t.where(boards(t) != n), machines=False) for n in names}


def fit_unseen(t: Times) -> dict[str, Any] | None:
    """An entry fitted without the held-out shapes; None if all or none are."""
    if not t.held_out.any() or t.held_out.all():
        return None
    return fit_group(t.where(~t.held_out))


def fit(folder: Path) -> dict[str, Any]:
    """The whole calibration."""
    groups, apart = {}, {}
    for key, t in read(folder).items():
        entry = groups[key] = fit_group(t)
        apart[key] = [errors(e, of_board(t, name)) for name, e in fits_without(t).items()]
        unseen = fit_unseen(t)
        for name, own in entry["machines"].items():
            rows = t.where(t.held_out & (t.name == name) & ~t.beside)
            own["interval"] = None
            if unseen is not None and len(rows) >= FEWEST:
                own["interval"] = interval([errors(unseen, rows)])
    unmeasured = intervals_apart(apart, {k: entry["law"] for k, entry in groups.items()})
    for key, entry in groups.items():
        entry["interval"] = unmeasured[key]
        for own in entry["machines"].values():
            own["interval"] = own["interval"] or entry["interval"]
    return {"groups": groups}


def intervals_apart(
    apart: Mapping[str, Sequence[Errors]], law: Mapping[str, str]
) -> dict[str, Interval]:
    """Group -> the interval of a machine that wasn't measured, from errors on machines left out.

    A group that a single machine was measured for takes the widest limits of those of its law.
    """
    out = {k: interval_apart(found, pooled(apart, k)) for k, found in apart.items() if found}
    for key in apart:
        alike = [out[k] for k in out if law[k] == law[key] and apart[k]]
        if key not in out:
            out[key] = UNKNOWN
            if alike:
                lows, highs = np.array(alike).min(0)[:, 0], np.array(alike).max(0)[:, 1]
                out[key] = [(float(x), float(y)) for x, y in zip(lows, highs, strict=True)]
    return out


def pooled(apart: Mapping[str, Sequence[Errors]], but: str) -> Errors:
    """The errors of all groups but one on machines left out."""
    parts = [e for key, found in apart.items() if key != but for e in found]
    if not parts:
        return np.empty(0), np.empty(0, int)
    return np.concatenate([e for e, _ in parts]), np.concatenate([b for _, b in parts])


def interval_apart(found: Sequence[Errors], others: Errors) -> Interval:
    """For a machine that wasn't measured. Few machines say little of one more: with fewer than
    ENOUGH, the errors of all other groups count as another. A machine to come may differ more from
    those measured than these among themselves: WIDER."""
    limits = interval([*found, others] if len(found) < ENOUGH else found)
    return [(round(WIDER * low, 4), round(WIDER * high, 4)) for low, high in limits]


def interval(found: Sequence[Errors]) -> Interval:
    """For each bound the widest of the machines' (5 %, 95 %) quantiles of their errors."""
    found = [(e, b) for e, b in found if len(e) >= FEWEST]
    if not found:
        return UNKNOWN
    whole = [_quantiles(e) for e, _ in found]
    out = []
    for bound in range(3):
        parts = [e[b == bound] for e, b in found]
        ranges = [_quantiles(e) for e in parts if len(e) >= FEWEST] or whole
        out.append((min(r[0] for r in ranges), max(r[1] for r in ranges)))
    return out


def _quantiles(e: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(e, (0.05, 0.95))
    return round(min(float(low), -0.02), 4), round(max(float(high), 0.02), 4)


def main(folder: Annotated[Path, typer.Argument(help="A folder of measured kernel times.")]):
    """Write cost_model/calibration.json from the CSV files of FOLDER."""
    CALIBRATION.write_text(json.dumps(fit(folder), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
