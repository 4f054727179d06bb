"""What `ridgeline whatif` prints: tables of decisions, and sentences about where they flip."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ridgeline.passes.decide import Objective
from ridgeline.passes.what_if import Answer, Firing, Unfired
from ridgeline.tools.whatif_flips import Ranges

BOUNDS = {"compute": "c", "memory": "m", "launch": "l", "communication": "x"}
Row = tuple[str, str, int, int | None, Answer]


def answer_tables(model: str, rows: Sequence[Row]) -> Iterator[Table | Text]:
    """A table per phase with a line per decision: time before and after, what bounds it, bytes
    held, and a letter for what fires; then what the letters stand for."""
    letters: dict[str, str] = {}
    for phase in dict.fromkeys(phase for phase, *_ in rows):
        table = Table(
            title=Text(f"what if {model}: {phase}"),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for heading in (
            "target",
            "batch",
            "context",
            "time",
            "bound by",
            "weights",
            "caches",
            "live",
            "",
        ):
            left = heading in ("target", "bound by", "fires")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        last = None
        for _, target, batch, context, answer in (row for row in rows if row[0] == phase):
            if last not in (None, target):
                table.add_section()
            last = target
            cells = [target, str(batch), "" if context is None else length(context)]
            cells += _figures(answer)
            if answer.fits:
                fires = ", ".join(said(n, f) for n, f in answer.firing.items() if f.made)
                cells.append(letters.setdefault(fires or "nothing", letter(len(letters))))
            else:
                cells.append("-")
            table.add_row(*map(Text, cells))
        yield table
    yield Text(CAPTION)
    for fires, name in letters.items():
        yield Text(f"  {name}: {fires}")


CAPTION = (
    "time: before -> after, predicted. bound by: percent of the time after (c compute, m memory,"
    " l launch, x links). weights, caches, live (whatever else is alive at the fullest): after."
    " fires, with a share where it is not every site:"
)


def letter(number: int) -> str:
    """A, B, ... Z, AA, ..."""
    return ("" if number < 26 else letter(number // 26 - 1)) + chr(ord("A") + number % 26)


def _figures(answer: Answer) -> list[str]:
    """Time, its split, bytes of weights, of caches, and of what else is alive."""
    before, after = answer.before, answer.after
    held = [gigabytes(size) for size in (answer.weights[1], answer.state, answer.live[1])]
    if before is None or after is None:
        return [f"over {gigabytes(answer.target.memory_bytes)}", "does not fit", *held]
    split = " ".join(
        f"{symbol} {100 * after.spent[name] / after.seconds:.0f}"
        for name, symbol in BOUNDS.items()
        if after.spent[name] >= 0.005 * after.seconds
    )
    return [f"{seconds(before.seconds)} -> {seconds(after.seconds)}", split, *held]


def said(name: str, firing: Firing) -> str:
    """A pass with its most frequent form, and its share of the sites."""
    share = "" if firing.made == firing.values else f" {firing.made}/{firing.values}"
    return f"{name}{share}" + (f" ({firing.form})" if firing.form else "")


def refusal_lines(
    rows: Sequence[Row], objective: Objective, passes: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Why passes do not fire: a line per phase, pass and reason, with the first row of each target
    where that is so; then which of the `passes` found nothing, by phase."""
    if lines := list(_refusals(rows, objective, passes)):
        yield (
            "Why passes do not fire, and the figures of these sites together at the first line of a"
            " target where that is so (as they stand -> as the best form of the pass):"
        )
        yield from lines


def _refusals(
    rows: Sequence[Row], objective: Objective, passes: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    for phase, names in passes.items():
        there: dict[tuple[str, str], dict[str, str]] = {}
        seen = set[str]()
        for row in (row for row in rows if row[0] == phase):
            seen.update(row[4].firing)
            for u in row[4].unfired:
                seen.add(u.name)
                there.setdefault((u.name, u.kind), {}).setdefault(
                    row[1], _refused(row, u, objective)
                )
        for (name, kind), wheres in there.items():
            figures: dict[str, list[str]] = {}
            for target, figure in wheres.items():
                figures.setdefault(figure, []).append(target)
            told = "; ".join(f"{listed(t)}: {figure}" for figure, t in figures.items())
            yield f"  {phase}: {name}: {kind}: {told}"
        if rest := [name for name in names if name not in seen]:
            yield f"  {phase}: no site of {', '.join(rest)}"


def _refused(row: Row, unfired: Unfired, objective: Objective) -> str:
    sites = f"{unfired.sites} site{'s' * (unfired.sites > 1)}"
    if unfired.before is None or unfired.after is None:
        return sites
    before, after = (figure(value, objective) for value in (unfired.before, unfired.after))
    _, _, batch, context, _ = row
    at = f"batch {batch}" + ("" if context is None else f", {length(context)}")
    doubt = f", doubt {figure(unfired.doubt, objective)}" if unfired.doubt else ""
    form = f" as {unfired.form}" if unfired.form else ""
    return f"{before} -> {after}{form}{doubt} ({sites}, {at})"


def flip_lines(
    found: Mapping[tuple[str, str, int | None], Mapping[str, Ranges] | None], largest: int
) -> Iterator[str]:
    """A sentence per phase, context and pass, over the targets, and one about what fits; nothing
    where no pass finds a site."""
    if lines := list(_flips(found)):
        yield f"Where passes fire at most of their sites, by batch (searched to {largest}):"
        yield from lines


def _flips(
    found: Mapping[tuple[str, str, int | None], Mapping[str, Ranges] | None],
) -> Iterator[str]:
    groups = dict.fromkeys((phase, context) for phase, _, context in found)
    for phase, context in groups:
        there = {t: r for (p, t, c), r in found.items() if (p, c) == (phase, context)}
        at = phase if context is None else f"{phase}, context {length(context)}"
        ends = {t: next(iter(r.values()), None) if r else None for t, r in there.items()}
        fits: dict[tuple[str, str], list[str]] = {}
        for target, end in ends.items():
            if there[target] is None:
                fits.setdefault(("none", ""), []).append(target)
            elif end is not None and end.capped:
                fits.setdefault((str(end.largest), ""), []).append(target)
        if fits:
            yield f"  {at}: the largest batch that fits: {_by_target(fits)}"
        names = dict.fromkeys(name for ranges in there.values() for name in ranges or ())
        for name in names:
            wheres: dict[tuple[str, str], list[str]] = {}
            for target, ranges in there.items():
                if ranges is not None:
                    words = ranges[name].words if name in ranges else ("never", "")
                    wheres.setdefault(words, []).append(target)
            forms = {r[name].form for r in there.values() if r and name in r}
            yield f"  {at}: {_wins(name, forms)} {_by_target(wheres)}"


def _wins(name: str, forms: set[str]) -> str:
    """4-bit wins (quantized_linear), or the pass by its name alone where its forms differ."""
    widths = {form.partition(" ")[0] for form in forms}
    width = widths.pop() if len(widths) == 1 else ""
    return f"{width} wins ({name})" if width.endswith("-bit") else f"{name} fires"


def _by_target(wheres: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """below batch 52 on a100, 31 on h100 and l4, always on cpu."""
    said, last = [], ""
    for (start, rest), targets in wheres.items():
        words = rest if rest and start == last else " ".join(filter(None, (start, rest)))
        said.append(f"{words} on {listed(targets)}")
        last = start
    return ", ".join(said)


def host_lines(
    found: Mapping[tuple[str, str, int | None], int | None], largest: int
) -> Iterable[str]:
    """A sentence per phase and context about where the host bounds kernels launched one by one."""
    known = {key: batch for key, batch in found.items() if batch is not None}
    if known:
        yield "Without CUDA or HIP graphs, launched one by one, what is left is bound by the host:"
    for phase, context in dict.fromkeys((phase, context) for phase, _, context in known):
        at = phase if context is None else f"{phase}, context {length(context)}"
        wheres: dict[tuple[str, str], list[str]] = {}
        for (p, target, c), batch in known.items():
            if (p, c) == (phase, context):
                where = ("always", "") if batch > largest else ("below batch", str(batch))
                wheres.setdefault(("never", "") if batch == 1 else where, []).append(target)
        yield f"  {at}: {_by_target(wheres)}"


def listed(names: Sequence[str]) -> str:
    """a100, h100 and l4."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def length(tokens: int) -> str:
    """1024 -> 1k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def seconds(value: float) -> str:
    """Three digits, in the unit that fits."""
    if value >= 1000:
        return f"{value:.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def figure(value: float, objective: Objective) -> str:
    """What an objective makes small, in its unit."""
    if objective == "memory":
        return gigabytes(value)
    if objective == "latency":
        return seconds(value)
    return f"{value * 1e3:.3g} mJ" if objective == "energy" else f"{value / 1e9:.3g} eGFLOPs"


def gigabytes(size: float) -> str:
    """Bytes in GB, or MB below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
