"""What `ridgeline whatif` prints: tables of decisions, and sentences about where they flip."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ridgeline.passes.what_if import Answer, Firing
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
        for heading in ("target", "batch", "context", "time", "bound by", "weights", "caches", ""):
            left = heading in ("target", "bound by", "")
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
    " l launch, x links). weights, caches: after. The last column, what fires, with a share where"
    " it is not every site:"
)


def letter(number: int) -> str:
    """A, B, ... Z, AA, ..."""
    return ("" if number < 26 else letter(number // 26 - 1)) + chr(ord("A") + number % 26)


def _figures(answer: Answer) -> list[str]:
    """Time, its split, bytes of weights and caches."""
    before, after = answer.before, answer.after
    held = [gigabytes(answer.weights[1]), gigabytes(answer.state)]
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


def host_lines(
    found: Mapping[tuple[str, str, int | None], int | None], largest: int
) -> Iterable[str]:
    """A sentence per phase and context about where the host bounds kernels launched one by one."""
    known = {key: batch for key, batch in found.items() if batch is not None}
    if known:
        yield "Without CUDA or HIP graphs, launched one by one, what is left is bound by the host:"
    for phase, context in dict.fromkeys((phase, context) for phase, _, context in known):
        at = phase if context is None else f"{phase}, context {length(context)}"
        said = []
        for (p, target, c), batch in known.items():
            if (p, c) == (phase, context):
                where = "always" if batch > largest else f"below batch {batch}"
                said.append(f"{'never' if batch == 1 else where} on {target}")
        yield f"  {at}: {'; '.join(said)}"


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


def gigabytes(size: float) -> str:
    """Bytes in GB, or MB below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
