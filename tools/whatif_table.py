"""What `ridgeline whatif` prints: a table of decisions, and sentences about where they flip."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from ridgeline.passes.what_if import Answer, Firing
from ridgeline.tools.whatif_flips import Ranges

BOUNDS = ("compute", "memory", "launch", "communication")
Row = tuple[str, str, int, int | None, Answer]


def answers_table(model: str, rows: Sequence[Row]) -> Table:
    """A line per decision: time before and after, its split, bytes held, passes with the share of
    their sites."""
    table = Table(title=Text(f"what if {model}"), caption=Text(CAPTION), caption_justify="left")
    headings = ("phase", "target", "batch", "context", "time", "bound by", "weights", "caches")
    for heading in headings:
        left = heading in ("phase", "target", "bound by")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    table.add_column("fires", overflow="fold", min_width=24)
    last = None
    for phase, target, batch, context, answer in rows:
        if last not in (None, (phase, target)):
            table.add_section()
        last = phase, target
        cells = [phase, target, str(batch), "" if context is None else length(context)]
        table.add_row(*(Text(c) for c in (*cells, *_figures(answer))))
    return table


CAPTION = (
    "time: before -> after, predicted; bound by: shares of the time after, in percent (compute,"
    " memory, launch, communication); fires: passes, with a share where it is not every site"
)


def _figures(answer: Answer) -> tuple[str, ...]:
    before, after = answer.before, answer.after
    if before is None or after is None:
        need = sum((min(answer.weights), answer.state))
        return (
            "does not fit", "", gigabytes(answer.weights[0]), gigabytes(answer.state),
            f"{gigabytes(need)} of {gigabytes(answer.target.memory_bytes)}",
        )  # fmt: skip
    split = " ".join(
        f"{name[0]} {after.spent[name] / after.seconds:.0%}"
        for name in BOUNDS
        if after.spent[name] >= 0.005 * after.seconds
    )
    return (
        f"{seconds(before.seconds)} -> {seconds(after.seconds)}",
        split,
        " -> ".join(dict.fromkeys(map(gigabytes, answer.weights))),
        gigabytes(answer.state),
        ", ".join(said(n, f) for n, f in answer.firing.items() if f.made) or "nothing",
    )


def said(name: str, firing: Firing) -> str:
    """A pass with its most frequent form, and its share of the sites."""
    share = "" if firing.made == firing.values else f" {firing.made}/{firing.values}"
    form = main_form(firing)
    return f"{name}{share}" + (f" ({form})" if form else "")


def main_form(firing: Firing) -> str:
    """The form taken most often, without how many layers stand side by side."""
    counts: dict[str, int] = {}
    for variant, count in firing.variants.items():
        stem = variant.partition(", ")[0]
        counts[stem] = counts.get(stem, 0) + count
    return max(counts, key=lambda v: counts[v], default="")


def flip_lines(
    found: Mapping[tuple[str, str, int | None], Mapping[str, Ranges]], largest: int
) -> Iterable[str]:
    """A sentence per phase, context and pass, over the targets."""
    yield f"Where passes fire at most of their sites, by batch (searched to {largest}):"
    groups = dict.fromkeys((phase, context) for phase, _, context in found)
    for phase, context in groups:
        there = {t: r for (p, t, c), r in found.items() if (p, c) == (phase, context)}
        names = dict.fromkeys(name for ranges in there.values() for name in ranges)
        at = phase if context is None else f"{phase}, context {length(context)}"
        for name in names:
            wheres: dict[str, list[str]] = {}
            for target, ranges in there.items():
                where = str(ranges[name]) if name in ranges else "never"
                wheres.setdefault("does not fit" if not ranges else where, []).append(target)
            yield f"  {at}: {name}: " + "; ".join(
                f"{where} on {', '.join(targets)}" for where, targets in wheres.items()
            )


def length(tokens: int) -> str:
    """1024 -> 1k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def seconds(value: float) -> str:
    """Three digits, in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def gigabytes(size: float) -> str:
    """Bytes in GB, or MB below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
