"""`ridgeline calibrate`: refine what is predicted for this CPU by timing ridgeline's own kernels.

At most `calibrate_cases.MOST` micro-benchmarks, compiled first, then timed as
`ridgeline.tools.undisturbed` says. Law and fit: `ridgeline.cost_model.refine`. What comes out is
stored beside the probe and read by every estimate for "cpu" from then on. Where other work disturbs
the probe or the benchmarks they are taken again until the patience is over. A case that stays in
doubt by more than MAX_SPREAD is left out; where more than MOST_LEFT_OUT of them are, or the probe
is in doubt, nothing is stored.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cost_model import Target, Work, cpu_time, probe, record, refine
from ridgeline.cost_model.estimate import kind_of
from ridgeline.ir.errors import RidgelineError
from ridgeline.tools.allocator import keep_freed_memory
from ridgeline.tools.calibrate_cases import TORCH, cases, nothing
from ridgeline.tools.undisturbed import Samples, time_calls

ROUNDS, SECONDS = 8, 0.002
PATIENCE = 60.0
MAX_SPREAD = probe.MAX_SPREAD
MOST_LEFT_OUT, NAMED = 0.25, 4
Status = Callable[[str], AbstractContextManager[None]]
Built = tuple[str, Callable[[], object], Work]


class NoisyMachine(RidgelineError):
    """Measurements that tell more about other work on the machine than about it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """measurements: one a case; spread: the doubt about the typical one; left_out: names of cases
    whose doubt is too large; disturbed: the part of all samples that did not count."""

    measurements: tuple[refine.Measurement, ...]
    spread: float
    left_out: tuple[str, ...] = ()
    disturbed: float = 0.0


def run(console: Console, status: Status, *, dry: bool = False, patience: float = PATIENCE) -> None:
    """Measure, fit, print, and store unless `dry`.

    patience: seconds to wait for an undisturbed probe, and again for undisturbed benchmarks.
    Raises NoisyMachine where they stay disturbed.
    """
    keep_freed_memory()
    with status("compiling ridgeline's kernels"), torch.inference_mode(False):
        built = [(case.name, *case.build(probe.unrefined_host())) for case in (*cases(), nothing())]
    with status("probing"):
        host = probe.steady_host(patience)
    if not dry and host.spread > MAX_SPREAD:
        raise NoisyMachine(_noise(f"disturbed the probe by {100 * host.spread:.0f} %, where at most"
                                  f" {100 * MAX_SPREAD:.0f} % is expected"))  # fmt: skip
    with status("timing ridgeline's kernels"), torch.inference_mode(False):
        found = measure(host, built, patience)
    refined = refine.refine(found.measurements)
    console.print(table(found, refined))
    console.print(Text(_said(found, host)))
    if dry:
        console.print("nothing is stored")
        return
    for m in found.measurements:
        record.append(host.name, m.kind, f"calibrate: {m.name}", m.predicted(), m.measured)
    all_cases = len(found.measurements) + len(found.left_out)
    if len(found.left_out) > MOST_LEFT_OUT * all_cases:
        raise NoisyMachine(_noise(f"disturbed {len(found.left_out)} of {all_cases} benchmarks"))
    path = probe.refinement_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(refine.to_json(refined, host), encoding="utf-8")
    probe.probe_host.cache_clear()
    console.print(Text(f"stored in {path}"))


def _noise(what: str) -> str:
    return (
        f"nothing is stored: other work {what}; run again on an idle machine, wait longer with"
        " --patience SECONDS, or pass --dry-run to see the figures only"
    )


def _said(found: Measured, host: Target) -> str:
    text = (
        f"on {probe.cpu_model()}, {host.threads} threads; the least samples agree within"
        f" {100 * found.spread:.0f} % (median of the cases); {100 * found.disturbed:.0f} % of the"
        " samples were disturbed and do not count"
    )
    if found.left_out:
        named = ", ".join(found.left_out[:NAMED])
        more = f" and {n} more" if (n := len(found.left_out) - NAMED) > 0 else ""
        text += f"; left out, as never undisturbed: {named}{more}"
    return text


def measure(host: Target, built: Sequence[Built], patience: float) -> Measured:
    """Time every case but the last, which does nothing; what calling it takes is subtracted."""
    samples = time_calls([call for _, call, _ in built], ROUNDS, SECONDS, patience)
    # What it costs to call a graph's Python from here is no part of its kernels.
    idle = max(0.0, samples[-1].least - host.launch_s)
    pairs = list(zip(built[:-1], samples[:-1], strict=True))
    known = [(case, s) for case, s in pairs if s.doubt <= MAX_SPREAD and math.isfinite(idle)]
    tried = sum(len(s.seconds) + s.disturbed for s in samples)
    return Measured(
        tuple(_measurement(case, s, host, idle) for case, s in known),
        statistics.median([s.doubt for _, s in known] or [0.0]),
        tuple(case[0] for case, s in pairs if (case, s) not in known),
        sum(s.disturbed for s in samples) / tried,
    )


def _measurement(case: Built, samples: Samples, host: Target, idle: float) -> refine.Measurement:
    name, _, work = case
    parts = [cpu_time.kernel_parts(k, host, 0.0) for k in work.kernels]
    longest = max(range(len(parts)), key=lambda i: sum(parts[i]))  # the others are calls
    dispatch, fork = (sum(part[i] for part in parts) for i in (2, 3))
    kind, taken = kind_of(work.kernels[longest]), max(samples.least - idle, 0.1 * samples.least)
    return refine.Measurement(kind, name, *parts[longest][:2], dispatch, fork, taken)


def table(found: Measured, refined: dict[str, refine.Refinement]) -> Table:
    """Median error by kind: as predicted, refined, and of each case by a fit that has not seen
    it."""
    shown = Table(
        title=Text(f"predicted against measured, {len(found.measurements)} cases"),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    columns = "kind", "cases", "before", "after", "held out", "compute", "memory", "call", "fork"
    for column in columns:
        shown.add_column(column, justify="left" if column == "kind" else "right")
    errors: list[tuple[refine.Measurement, tuple[float, float, float]]] = []
    for kind in dict.fromkeys(m.kind for m in found.measurements):
        of = [m for m in found.measurements if m.kind == kind]
        own = refined.get(kind)
        held_out = [m.predicted() for m in of] if own is None else refine.left_out(of)
        each = [
            tuple(error(s, m.measured) for s in (m.predicted(), m.predicted(own), seconds))
            for m, seconds in zip(of, held_out, strict=True)
        ]
        errors += zip(of, each, strict=True)  # pyright: ignore[reportArgumentType]
        factors = ("",) * 4 if own is None else (own.compute, own.memory, own.dispatch, own.fork)
        shown.add_row(
            kind,
            *_medians(each),
            *(f"{f:.2f}" if isinstance(f, float) else f for f in factors),
        )
    shown.add_section()
    ours = [each for m, each in errors if not m.name.startswith(TORCH)]
    shown.add_row("ridgeline's kernels", *_medians(ours))
    shown.add_row("all", *_medians([each for _, each in errors]))
    return shown


def _medians(errors: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """How many, and the median of each column."""
    columns = zip(*errors, strict=True)
    return str(len(errors)), *(f"{100 * statistics.median(c):.0f} %" for c in columns)


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
