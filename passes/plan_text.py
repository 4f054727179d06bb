"""A plan as a table for people."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ridgeline.cost_model import Cost

if TYPE_CHECKING:  # plan.py imports this module to print itself
    from ridgeline.passes.plan import Decision, Plan


def render(plan: "Plan", *, detail: bool = False, console: Console | None = None) -> None:
    """Print `plan`: rewrites, refusals, predictions, evidence, kernels, notes."""
    console = console or Console()
    console.print(f"[bold]plan for {escape(plan.target)}[/] (tolerance {plan.tolerance:g})")
    console.print(_decisions("applied", plan.applied, detail))
    if plan.refused:
        console.print(_decisions("refused", plan.refused, detail))
    for phase, figures in plan.predicted.items():
        before, after = figures["before"], figures["after"]
        console.print(
            f"predicted {escape(phase)}: {_interval(before)} -> {_interval(after)}"
            f"  ({before['seconds'] / after['seconds']:.2f}x, bound by {after['bound']};"
            f" {before['eflops']:.3g} -> {after['eflops']:.3g} eFLOPs)"
        )
    for phase, error in plan.measured.items():
        console.print(f"measured output error, {escape(phase)}: {error:.2e}")
    if plan.kernels:
        console.print(_kernels(plan))
    for sentence in plan.notes:
        console.print(f"note: {escape(sentence)}", highlight=False)


def _interval(cost: dict) -> str:
    return f"{_time(cost['seconds'])} ({_time(cost['low'])} to {_time(cost['high'])})"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _sum(costs: list[Cost | None]) -> str:
    known = [c.seconds for c in costs if c is not None]
    return _time(sum(known)) if known else ""


def _decisions(title: str, decisions: list["Decision"], detail: bool) -> Table:
    table = Table(title=f"{title} ({len(decisions)})", title_justify="left")
    for column in ("phase", "rewrite", "where", "sites", "before", "after", "why"):
        table.add_column(
            column, justify="right" if column in ("sites", "before", "after") else "left"
        )
    groups = [(d.at, [d]) for d in decisions] if detail else grouped(decisions)
    for heading, members in groups:
        first = members[0]
        table.add_row(
            first.phase,
            first.rewrite,
            escape(heading),
            str(len(members)),
            _sum([d.before for d in members]),
            _sum([d.after for d in members]),
            escape(_why(first, detail)),
        )
    return table


def _why(decision: "Decision", detail: bool) -> str:
    if decision.refused_by:
        fix = f" ({decision.needed})" if decision.needed else ""
        return f"{decision.refused_by}: {decision.reason}{fix}"
    words = [decision.variant or decision.exactness, decision.reason]
    if decision.certificate:
        c = decision.certificate
        words.append(f"{c.kind} {c.relative_error:.1e} <= {c.limit:.1e}")
        if detail:
            words += [*c.preconditions, *c.cases]
    return "; ".join(w for w in words if w)


def _kernels(plan: "Plan") -> Table:
    table = Table(title=f"kernels ({len(plan.kernels)})", title_justify="left")
    for column in ("op", "back end", "for", "configuration", "code"):
        table.add_column(column)
    for k in plan.kernels:
        audit = ", ".join(f"{name} {value}" for name, value in k.audit.items())
        table.add_row(k.op, k.backend, k.target, escape(k.configuration), escape(audit))
    return table


def grouped(decisions: "Iterable[Decision]") -> "list[tuple[str, list[Decision]]]":
    """Equal decisions across layers under one heading, as ``model.layers.{0-29}.mlp.up_proj``."""
    groups: dict[tuple, list["Decision"]] = {}
    for d in decisions:
        shape = re.sub(r"\d+", "#", d.at.partition(":")[0] or d.at)
        reason = re.sub(r"[\d.]+|\w+_\d+", "#", d.reason)
        groups.setdefault((d.phase, d.rewrite, d.variant, d.refused_by, shape, reason), []).append(
            d
        )
    return [(_heading([d.at for d in ds]), ds) for ds in groups.values()]


def _heading(places: list[str]) -> str:
    paths = [p.partition(":")[0] or p for p in places]
    parts = [re.split(r"(\d+)", p) for p in paths]
    columns = zip(*parts, strict=False)
    return "".join(
        c[0] if len(set(c)) == 1 else "{" + _range(sorted({int(n) for n in c})) + "}"
        for c in columns
    )


def _range(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
