"""The cost model's own error on measured kernels, beside the goals.

Nothing is scored by constants that saw it: held-out shapes (30 % by CRC of the layer's sizes) and
whole machines are predicted by fits on the rest, which are made afresh.

    APE      |predicted / measured - 1|
    pairs    two kernels of one harness, 1.05 to 2 times apart: the share in the right order
    covered  measurements within [low, high]; the interval comes from other machines' errors, or
             from the other half of the held-out shapes
    choice   the dtype predicted fastest: within 2 % of the fastest measured (top-1), and by how
             much slower on average (regret); of products that take 15 us and more in bf16
"""

import csv
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.cost_model import shapes
from ridgeline.cost_model.calibration import Model
from ridgeline.cost_model.machine import machine_of
from ridgeline.tools import fit_cost_model as fits
from ridgeline.tools.kernel_times import Times, read

# class -> its groups, and the goals for held-out shapes and for machines left out:
# median APE, mean APE, pairs
CLASSES: Mapping[str, tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "GEMM, tensor cores": (("gemm.bf16", "gemm.fp16"), (0.04, 0.06, 0.96), (0.08, 0.12, 0.95)),
    "GEMM, quantized": (
        ("gemm.fp8", "gemm.int8", "gemm.w4a16", "gemm.w8a16"),
        (0.05, 0.08, 0.93),
        (0.12, 0.18, 0.88),
    ),
    "GEMM, fp32": (("gemm.fp32", "bmm.fp32"), (0.04, 0.07, 0.95), (0.10, 0.15, 0.90)),
    "elementwise": (
        ("elementwise.fp32", "elementwise.fp16", "silu_mul.fp16"),
        (0.04, 0.08, 0.96),
        (0.10, 0.18, 0.92),
    ),
    "norm": (("layernorm.fp32", "rmsnorm.fp16"), (0.07, 0.12, 0.96), (0.15, 0.25, 0.94)),
    "softmax": (("softmax.fp32",), (0.05, 0.09, 0.95), (0.15, 0.22, 0.90)),
    "attention, prefill": (("prefill",), (0.05, 0.08, 0.94), (0.12, 0.18, 0.86)),
    "attention, decode": (("decode",), (0.06, 0.10, 0.94), (0.10, 0.16, 0.90)),
    "all-reduce": (("all_reduce",), (0.08, 0.20, 0.88), (0.12, 0.25, 0.90)),
}
CHOICE_GOALS = ((0.93, 0.02), (0.70, 0.06))
CHOICE_DTYPES = ("bf16", "int8", "w4a16", "w8a16", "fp8")
CHOICE_LEAST_US = 15.0
PAIRS_OF = 600  # rows of a harness


@dataclass(frozen=True, slots=True)
class Score:
    """median and mean APE; pairs in the right order and covered measurements, as shares."""

    rows: int
    median: float
    mean: float
    pairs: float
    covered: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The rows of one group's files, fits without what is scored, and the errors of these."""

    times: Times
    fit_unseen: dict[str, Any] | None
    fits_without: dict[str, dict[str, Any]]
    unseen: fits.Errors | None  # of held-out shapes
    apart: dict[str, fits.Errors]  # of each machine left out


def evaluate(t: Times) -> Evaluated:
    """Fits the group anew without what is scored."""
    unseen, without = fits.fit_unseen(t), fits.fits_without(t)
    t = t.where(~t.beside)
    return Evaluated(
        t,
        unseen,
        without,
        fits.errors(unseen, t.where(t.held_out)) if unseen is not None else None,
        {n: fits.errors(e, fits.of_board(t, n)) for n, e in without.items()},
    )


Scored = tuple[Times, np.ndarray, np.ndarray]  # rows, their errors, 1.0 where an interval held


def scored_unseen(done: Evaluated) -> list[Scored]:
    if done.unseen is None:
        return []
    t = done.times.where(done.times.held_out)
    return [(t, done.unseen[0], _covered_by_halves(t, *done.unseen))]


def scored_apart(done: Evaluated, others: fits.Errors) -> list[Scored]:
    """`others`: errors of other groups, as in `fit_cost_model.interval_apart`."""
    out = []
    for name, (e, bound) in done.apart.items():
        rest = [v for k, v in done.apart.items() if k != name]
        t = fits.of_board(done.times, name)
        out.append((t, e, _inside(e, bound, fits.interval_apart(rest, others))))
    return out


def _inside(e: np.ndarray, bound: np.ndarray, intervals: list[tuple[float, float]]) -> np.ndarray:
    low, high = np.array(intervals).T
    return ((low[bound] <= e) & (e <= high[bound])).astype(float)


def _covered_by_halves(t: Times, e: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Each half of a machine's rows by the interval of the other."""
    out = np.full(len(t), np.nan)
    half = np.random.default_rng(0).permutation(len(t)) % 2 == 0
    for name in np.unique(t.name):
        for side in (half, ~half):
            rows, others = side & (t.name == name), ~side & (t.name == name)
            if others.sum() >= fits.FEWEST:
                limits = fits.interval([(e[others], bound[others])])
                out[rows] = _inside(e[rows], bound[rows], limits)
    return out


def score(parts: Iterable[Scored]) -> Score | None:
    """One score over the rows of several groups; None without any known error."""
    errors, covered, right, close = [], [], 0, 0
    for t, e, inside in parts:
        known = np.isfinite(e)
        errors.append(e[known])
        covered.append(inside[np.isfinite(inside)])
        ordered = _ordered(t.where(known), e[known])
        right, close = right + ordered[0], close + ordered[1]
    if not sum(map(len, errors)):
        return None
    e, inside = np.concatenate(errors), np.concatenate(covered)
    ape = np.abs(np.expm1(-e))
    share = right / close if close else np.nan
    held = float(inside.mean()) if len(inside) else np.nan
    return Score(len(e), float(np.median(ape)), float(ape.mean()), share, held)


def _ordered(t: Times, e: np.ndarray) -> tuple[int, int]:
    right = close = 0
    for harness in np.unique(t.harness):
        rows = np.flatnonzero(t.harness == harness)
        rows = np.random.default_rng(0).permutation(rows)[:PAIRS_OF]
        apart = t.log_s[rows][:, None] - t.log_s[rows]
        pairs = (apart > np.log(1.05)) & (apart < np.log(2))
        predicted = t.log_s[rows] - e[rows]
        right += int((pairs & (predicted[:, None] > predicted)).sum())
        close += int(pairs.sum())
    return right, close


def few_shot(
    dev: Mapping[str, Times], few: Mapping[str, Times], intervals: Mapping[str, fits.Interval]
) -> dict[str, tuple[Any, Any]]:
    """Class -> scores of machines that `dev` hasn't: by its constants, and after each machine gave
    half of its few rows to constants of its own.

    intervals: group -> that of a machine which wasn't measured.
    """
    before, after = defaultdict(list), defaultdict(list)
    for key, t in few.items():
        name = next((c for c, (keys, *_) in CLASSES.items() if key in keys), None)
        if name is None or key not in dev:
            continue
        entry = fits.fit_group(dev[key], machines=False)
        unknown = np.full(len(t), np.nan)
        e, bound = fits.errors(entry, t)
        before[name].append((t, e, _inside(e, bound, intervals[key])))
        e = np.full(len(t), np.nan)
        half = np.random.default_rng(0).permutation(len(t)) % 2 == 0
        for board in np.unique(t.name):
            for side in (half, ~half):
                rows, others = side & (t.name == board), ~side & (t.name == board)
                if others.sum() >= 8 and rows.any():
                    own = {**entry, "machines": {}}
                    fits.calibrate(own, t.where(others), smooth=False)
                    e[rows] = fits.errors(own, t.where(rows))[0]
        after[name].append((t, e, unknown))
    return {name: (score(before[name]), score(after[name])) for name in before}


def choice(file: Path, found: Mapping[str, Evaluated], apart: bool) -> tuple[int, float, float]:
    """(rows, top-1, mean regret) of the dtype predicted fastest, for shapes or machines unseen."""
    top, regret = [], []
    models: dict[int, Model] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if not row["bf16"] or float(row["bf16"]) < CHOICE_LEAST_US:
                continue
            if not apart and zlib.crc32(f"{row['n']},{row['k']}".encode()) % 100 >= 30:
                continue
            times = {d: float(row[d]) for d in CHOICE_DTYPES if row.get(d)}
            guess = {
                d: s for d in times if (s := _log_seconds(row, d, found, apart, models)) is not None
            }
            if len(guess) < 2:
                continue
            best = min(times[d] for d in guess)
            lost = times[min(guess, key=guess.__getitem__)] / best - 1
            top.append(lost <= 0.02)
            regret.append(lost)
    if not top:
        return 0, np.nan, np.nan
    return len(top), float(np.mean(top)), float(np.mean(regret))


def _log_seconds(
    row: Mapping[str, str],
    dtype: str,
    found: Mapping[str, Evaluated],
    apart: bool,
    models: dict[int, Model],
) -> float | None:
    group = shapes.group_of("gemm", dtype)
    done = found.get(group.key)
    if done is None:
        return None
    machine, name = machine_of(row["gpu"], "gemm", dtype)
    entry = done.fits_without.get(name) if apart else done.fit_unseen
    if entry is None:
        return None
    model = models.setdefault(id(entry), Model({"groups": {group.key: entry}}))
    s = shapes.law_inputs("gemm", dtype, {"batch": 1, **{k: int(row[k]) for k in "mnk"}})
    return float(model.log_seconds(group, name, machine, s))


def run(folder: Path, few: Path | None) -> dict[str, Any]:
    """Everything that the tables show: "groups", "classes", "choice" and, with `few`, "few"."""
    dev = read(folder)
    found = {key: evaluate(t) for key, t in dev.items()}
    apart = {key: list(e.apart.values()) for key, e in found.items()}
    sides = {
        key: (scored_unseen(e), scored_apart(e, fits.pooled(apart, key)))
        for key, e in found.items()
    }
    out: dict[str, Any] = {
        "groups": {key: tuple(score(side) for side in both) for key, both in sides.items()},
        "classes": {
            name: tuple(score(p for k in keys if k in sides for p in sides[k][i]) for i in (0, 1))
            for name, (keys, *_) in CLASSES.items()
            if any(k in sides for k in keys)
        },
    }
    file = folder / "dtype_choice.csv"
    if file.is_file():
        out["choice"] = tuple(choice(file, found, whole) for whole in (False, True))
    if few is not None:
        laws = {key: t.group.law for key, t in dev.items()}
        out["few"] = few_shot(dev, read(few), fits.intervals_apart(apart, laws))
    return out
