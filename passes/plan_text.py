"""A plan for people: what was applied (+), what was refused (-), worth, evidence, kernels."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ridgeline.ir.provenance import short

if TYPE_CHECKING:  # plan.py imports this module to print itself
    from ridgeline.passes.plan import Decision, Plan


def render(plan: "Plan", *, detail: bool = False, console: Console | None = None) -> None:
    """Print `plan`; `detail` gives each site its own lines and shows all evidence."""
    console = console or Console(highlight=False)
    console.print(Text(f"plan for {plan.target}, tolerance {plan.tolerance:g}", style="bold"))
    if not plan.predicted:
        unrun = (
            "no graph was captured: the notes say why"
            if plan.notes
            else ("nothing captured yet: call the model, or pass example inputs")
        )
        console.print(unrun)
    for phase, figures in plan.predicted.items():
        _phase(console, plan, phase, figures, detail)
    if plan.kernels:
        console.print(Text(f"\nkernels ({len(plan.kernels)})", style="bold"))
        for k in plan.kernels:
            audit = ", ".join(f"{name} {value}" for name, value in k.audit.items())
            _entry(console, f"{k.op} {k.backend} for {k.target}: {k.configuration}", audit)
    for sentence in plan.notes:
        console.print(Text(f"note: {sentence}", style="yellow"))


def _phase(
    console: Console, plan: "Plan", phase: str, figures: dict[str, Any], detail: bool
) -> None:
    before, after = figures["before"], figures["after"]
    console.print(Text(f"\n{phase}", style="bold"))
    ratio = before["seconds"] / after["seconds"] if after["seconds"] else 1.0
    console.print(
        f"  predicted {_interval(before)} -> {_interval(after)}: {ratio:.2f}x,"
        f" bound by {after['bound']}; eFLOPs {before['eflops']:.3g} -> {after['eflops']:.3g}"
    )
    console.print(
        f"  weights {_change(before, after, 'held_bytes', _bytes)}; energy"
        f" {_change(before, after, 'energy_joules', _energy)} (of a 45 nm process)"
    )
    held = [(name, after.get(f"{name}_bytes", 0)) for name in ("held", "state", "live")]
    if held[2][1]:
        names = {"held": "weights", "state": "caches", "live": "what else is alive"}
        parts = " + ".join(f"{names[name]} {_bytes(size)}" for name, size in held if size)
        console.print(f"  memory {_bytes(sum(size for _, size in held))} at its fullest: {parts}")
    if otherwise := [
        d for d in (*plan.applied, *plan.refused) if d.phase == phase and d.otherwise_by_eflops
    ]:
        sites = _listed([f"{ds[0].rewrite} {heading}" for heading, ds in grouped(otherwise)])
        console.print(f"  eFLOPs rank these the other way round than time: {sites}", markup=False)
    if not any(d.phase == phase for d in plan.applied):
        console.print("  nothing applied: the graph runs as it was captured")
    elif phase in plan.measured:
        console.print(f"  measured output error {plan.measured[phase]:.2e}")
    if detail and (spent := plan.seconds.get(phase)):
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in spent.items())
        console.print(f"  compiled in {sum(spent.values()):.2f} s: {stages}")
    for sign, style, decisions in (("+", "green", plan.applied), ("-", "red", plan.refused)):
        here = [d for d in decisions if d.phase == phase]
        if sign == "-" and not detail:
            for heading, members in summaries(here):
                line = Text("  - ", style=style)
                line.append(sentence(heading, members))
                console.print(line, soft_wrap=True)
            continue
        for heading, members in [(d.at, [d]) for d in here] if detail else grouped(here):
            first = members[0]
            line = Text(f"  {sign} ", style=style)
            line.append(f"{first.rewrite} ", style="bold")
            line.append(heading + (f" x{len(members)}" if len(members) > 1 else ""))
            line.append(_worth(members), style="dim")
            console.print(line)
            _entry(console, "", _why(members, detail))


_FIRST = ("defect", "certificate", "pattern", "precondition", "overlap", "budget", "cost")
"""What is wrong before what the user can change before what was weighed and found too light."""


def summaries(decisions: Sequence["Decision"]) -> list[tuple[str, list["Decision"]]]:
    """Decisions for people: sites refused alike under one heading, the most telling ones first; and
    passes that refuse the same sites alike in one line."""
    alike: dict[tuple[Any, ...], list[tuple[str, list[Decision]]]] = {}
    for heading, members in grouped(decisions):
        first = members[0]
        key = (first.rewrite, first.variant, first.refused_by, first.reason, first.needed)
        alike.setdefault(key, []).append((heading, members))
    joined: dict[tuple[Any, ...], list[Decision]] = {}
    for (rewrite, *told), groups in alike.items():
        heading, refused = _listed([h for h, _ in groups]), groups[0][1][0].refused_by
        joined.setdefault((heading, refused is None and rewrite, *told), []).extend(
            d for _, ds in groups for d in ds
        )
    rank = {by: i for i, by in enumerate(_FIRST)}
    lines = [(heading, members) for (heading, *_), members in joined.items()]
    return sorted(lines, key=lambda g: (rank.get(g[1][0].refused_by or "", -1), -len(g[1])))


def sentence(heading: str, members: Sequence["Decision"], *, detail: bool = False) -> str:
    """One line: the rewrite, where, how often, and why (not) and what to do."""
    first, rewrites = members[0], list(dict.fromkeys(d.rewrite for d in members))
    sites = len(members) // len(rewrites)
    often = f" x{sites}" if sites > 1 else ""
    why = _why(list(members), detail) if detail or not first.refused_by else _reason(first)
    return f"{', '.join(rewrites)} {heading}{often}: {why}"


def _reason(decision: "Decision") -> str:
    return decision.reason + (f"; to do: {decision.needed}" if decision.needed else "")


def _listed(headings: list[str]) -> str:
    shown = ", ".join(headings[:_SHOWN])
    return f"{shown} and {len(headings) - _SHOWN} more" if len(headings) > _SHOWN else shown


_SHOWN = 4
"""Places named in one line; --detail names all."""


def _entry(console: Console, line: str, below: str) -> None:
    if line:
        console.print(f"  {line}", markup=False)
    if below:
        console.print(Padding(Text(below, style="dim"), (0, 0, 0, 6)))


def _worth(members: list["Decision"]) -> str:
    """Time before and after; weights and energy too where the weights are held differently."""
    pairs = [(d.before, d.after) for d in members if d.before is not None and d.after is not None]
    if not pairs:
        return ""
    figures = [("seconds", _time)]
    if any(before.weight_bytes != after.weight_bytes for before, after in pairs):
        figures += [("weight_bytes", _bytes), ("energy_joules", _energy)]
    sums = [
        (written, *(sum(getattr(pair[side], name) for pair in pairs) for side in (0, 1)))
        for name, written in figures
    ]
    return "  " + ", ".join(f"{written(a)} -> {written(b)}" for written, a, b in sums)


def _why(members: list["Decision"], detail: bool) -> str:
    first = members[0]
    if first.refused_by:
        where = f" [{short(first.source)}]" if first.source else ""
        return f"{first.refused_by}: {_reason(first)}{where}"
    words = [first.variant or first.exactness]
    worst = max(
        (d.certificate for d in members if d.certificate),
        key=lambda c: c.relative_error,
        default=None,
    )
    if worst is not None:
        words += worst.preconditions if detail or len(worst.preconditions) > 1 else ()
        if worst.model_error is None:
            words.append(f"{worst.kind} {worst.relative_error:.1e}, allowed {worst.limit:.1e}")
        else:
            words.append(
                f"drift {worst.relative_error:.1e} here, {worst.model_error:.1e} at the outputs,"
                f" allowed {worst.limit:.1e}"
            )
        words += worst.cases if detail else ()
    return "; ".join(words)


def _interval(cost: dict[str, Any]) -> str:
    return f"{_time(cost['seconds'])} ({_time(cost['low'])} to {_time(cost['high'])})"


def _change(
    before: dict[str, Any], after: dict[str, Any], key: str, written: Callable[[float], str]
) -> str:
    ratio = f" ({before[key] / after[key]:.2f}x less)" if before[key] > after[key] > 0 else ""
    return f"{written(before[key])} -> {written(after[key])}{ratio}"


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """`value` in the first of `units` (name, size) that it reaches, or in the last."""
    unit, size = next(((u, s) for u, s in units if value >= s), units[-1])
    return f"{value / size:.3g} {unit}"


def _time(seconds: float) -> str:
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def _bytes(size: float) -> str:
    return _scaled(size, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _energy(joules: float) -> str:
    return _scaled(joules, (("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6), ("nJ", 1e-9)))


def grouped(decisions: Iterable["Decision"]) -> list[tuple[str, list["Decision"]]]:
    """Equal decisions across layers under one heading, as ``model.layers.{0-29}.mlp.up_proj``."""
    groups: dict[tuple[Any, ...], list[Decision]] = {}
    for d in decisions:
        shape = re.sub(r"\d+", "#", d.at.partition(":")[0] or d.at)
        reason = re.sub(r"[\d.]+|\w+_\d+", "#", d.reason)
        key = (d.phase, d.rewrite, d.variant, d.refused_by, shape, reason)
        groups.setdefault(key, []).append(d)
    return [(_heading([d.at for d in ds]), ds) for ds in groups.values()]


def places(at: Iterable[str]) -> str:
    """Module paths that differ in numbers only under one heading each, the first few named."""
    alike: dict[str, list[str]] = {}
    for place in at:
        alike.setdefault(re.sub(r"\d+", "#", place.partition(":")[0] or place), []).append(place)
    return _listed([_heading(group) for group in alike.values()])


def _heading(at: list[str]) -> str:
    paths = [p.partition(":")[0] or p for p in at]
    columns = zip(*(re.split(r"(\d+)", p) for p in paths), strict=True)
    return "".join(
        c[0] if len(set(c)) == 1 else "{" + _range(sorted({int(n) for n in c})) + "}"
        for c in columns
    )


def _range(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
