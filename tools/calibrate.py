"""`ridgeline calibrate`: refine what is predicted for this CPU by timing ridgeline's own kernels.

At most `calibrate_cases.MOST` micro-benchmarks, interleaved in rounds, the least of each counting:
what neighbours take slows some rounds and not others. Law and fit: `ridgeline.cost_model.refine`.
What comes out is stored beside the probe and read by every estimate for "cpu" from then on. It is
refused where the rounds disagree: half of them against the other half, as the probe does.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cost_model import Target, cpu_time, probe, record, refine
from ridgeline.cost_model.estimate import kind_of
from ridgeline.ir.errors import RidgelineError
from ridgeline.tools.calibrate_cases import cases, nothing

ROUNDS, SECONDS = 8, 0.004
MAX_SPREAD = probe.MAX_SPREAD
Status = Callable[[str], AbstractContextManager[None]]


class NoisyMachine(RidgelineError):
    """Measurements that tell more about other work on the machine than about it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """measurements: one a case; spread: by how much two halves of the rounds typically differ."""

    measurements: tuple[refine.Measurement, ...]
    spread: float


def run(console: Console, status: Status, *, dry: bool = False) -> None:
    """Measure, fit, print, and store unless `dry`.

    Raises NoisyMachine where the probe or the measurements are in doubt by more than MAX_SPREAD.
    """
    with status("probing"):
        host = probe.unrefined_host()
    if not dry and host.spread > MAX_SPREAD:
        raise NoisyMachine(_noise("the probe", host.spread))
    with status("compiling and timing ridgeline's kernels"), torch.inference_mode(False):
        found = measure(host)
    refined = refine.refine(found.measurements)
    console.print(table(found, refined))
    for m in found.measurements:
        record.append(host.name, m.kind, f"calibrate: {m.name}", m.predicted(), m.measured)
    console.print(
        f"two halves of the rounds differ by {100 * found.spread:.0f} % (median of the cases)"
    )
    if dry:
        console.print("nothing is stored")
        return
    if found.spread > MAX_SPREAD:
        raise NoisyMachine(_noise("the benchmarks", found.spread))
    path = probe.refinement_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(refine.to_json(refined, host), encoding="utf-8")
    probe.probe_host.cache_clear()
    console.print(Text(f"stored in {path}"))


def _noise(what: str, spread: float) -> str:
    return (
        f"nothing is stored: other work disturbed {what} by {100 * spread:.0f} %, where at most"
        f" {100 * MAX_SPREAD:.0f} % is expected; run again on an idle machine, or pass --dry-run to"
        " see the figures only"
    )


def measure(host: Target, rounds: int = ROUNDS, each: float = SECONDS) -> Measured:
    """Time every case; all are timed in turn, round by round."""
    built = [(case.name, *case.build(host)) for case in (*cases(), nothing())]
    loops = [_loops(call, each) for _, call, _ in built]
    times: list[list[float]] = [[] for _ in built]
    for _ in range(rounds):
        for i, (_, call, _) in enumerate(built):
            times[i].append(_sample(call, loops[i]))
    # What it costs to call a graph's Python from here is no part of its kernels.
    idle = max(0.0, min(times.pop()) - host.launch_s)
    built.pop()
    found = []
    for (name, _, work), samples in zip(built, times, strict=True):
        parts = [cpu_time.kernel_parts(k, host, 0.0) for k in work.kernels]
        longest = max(range(len(parts)), key=lambda i: sum(parts[i]))  # the others are calls
        compute, memory, _ = parts[longest]
        fixed = sum(part[2] for part in parts)
        kind = kind_of(work.kernels[longest])
        found.append(
            refine.Measurement(
                kind, name, compute, memory, fixed, max(min(samples) - idle, 0.1 * min(samples))
            )
        )
    halves = [max(h) / min(h) - 1 for t in times for h in [(min(t[::2]), min(t[1::2]))]]
    return Measured(tuple(found), statistics.median(halves))


def _sample(call: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def _loops(call: Callable[[], object], seconds: float) -> int:
    call()
    return max(1, int(seconds / max(_sample(call, 2), 1e-7)))


def table(found: Measured, refined: dict[str, refine.Refinement]) -> Table:
    """Median error by kind: as predicted, refined, and with each case left out of its fit."""
    shown = Table(
        title=Text(f"predicted against measured, {len(found.measurements)} cases"),
        box=box.SIMPLE_HEAD,
    )
    columns = "kind", "cases", "before", "after", "left out", "compute", "memory", "fixed"
    for column in columns:
        shown.add_column(column, justify="left" if column == "kind" else "right")
    before: list[float] = []
    after: list[float] = []
    for kind in dict.fromkeys(m.kind for m in found.measurements):
        of = [m for m in found.measurements if m.kind == kind]
        own = refined.get(kind)
        pair = [[error(m.predicted(r), m.measured) for m in of] for r in (None, own)]
        before += pair[0]
        after += pair[1]
        factors = ("", "", "") if own is None else (own.compute, own.memory, own.fixed)
        shown.add_row(
            kind,
            str(len(of)),
            *(f"{100 * statistics.median(errors):.0f} %" for errors in pair),
            f"{100 * own.error:.0f} %" if own else "",
            *(f"x {f:.2f}" if isinstance(f, float) else f for f in factors),
        )
    shown.add_section()
    medians = (f"{100 * statistics.median(errors):.0f} %" for errors in (before, after))
    shown.add_row("all", str(len(before)), *medians)
    return shown


def error(predicted: float, measured: float) -> float:
    """|predicted - measured| / measured."""
    return abs(predicted - measured) / measured


def show(console: Console) -> None:
    """The log of predicted against measured times, by target and kind."""
    found = list(record.entries())
    if not found:
        console.print(
            Text(f"nothing logged yet in {record.log_path()}: `ridgeline bench` and calibrate do")
        )
        return
    shown = Table(title=Text(f"{len(found)} measurements"), box=box.SIMPLE_HEAD)
    for column in ("target", "kind", "measurements", "median error", "bias", "last"):
        shown.add_column(column, justify="left" if column in ("target", "kind") else "right")
    for target, kind in dict.fromkeys((e.target, e.kind) for e in found):
        of = [e for e in found if (e.target, e.kind) == (target, kind)]
        bias = math.exp(statistics.median(math.log(e.measured / e.predicted) for e in of))
        shown.add_row(
            target,
            kind,
            str(len(of)),
            f"{100 * statistics.median(error(e.predicted, e.measured) for e in of):.0f} %",
            f"x {bias:.2f}",
            time.strftime("%Y-%m-%d", time.localtime(max(e.when for e in of))),
        )
    console.print(shown)
    console.print("bias: median of measured over predicted")
