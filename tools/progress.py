"""A bar per stage of a long computation, as `ridgeline.reparameterize(progress=)` reports it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ridgeline.passes.quantized_model import Progress as Report


@contextmanager
def stage_bars(console: Console) -> Iterator[Report]:
    """What takes (stage, what was done last, steps done, steps in all) and draws it on a terminal;
    the bars are gone when the computation is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, what: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, description=f"{stage}: {what}")

        yield report
