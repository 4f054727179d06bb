"""What `ridgeline accuracy` found, as tables for the screen or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ridgeline.tools.accuracy import CHOICE_GOALS, CLASSES, Score

Grid = tuple[str, Sequence[str], list[list[str]]]  # title, columns, rows
_SCORED = "median APE / mean APE / pairs / covered"


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """The tables as texts: classes beside goals, groups, the choice of dtypes, few rows."""
    columns = ("operators", "rows", "held-out shapes", "goal", "machines left out", "goal")
    rows = []
    for name, (unseen, apart) in found["classes"].items():
        _, goal_unseen, goal_apart = CLASSES[name]
        scored = [_text(unseen), _goal(goal_unseen), _text(apart), _goal(goal_apart)]
        rows.append([name, " / ".join(str(s.rows if s else 0) for s in (unseen, apart)), *scored])
    out: list[Grid] = [(f"By class: {_SCORED}", columns, rows)]
    rows = [[key, _text(unseen), _text(apart)] for key, (unseen, apart) in found["groups"].items()]
    by_group = ("group", "held-out shapes", "machines left out")
    out.append((f"By group of operators with shared constants: {_SCORED}", by_group, rows))
    if "choice" in found:
        rows = []
        kinds = ("held-out shapes", "machines left out")
        for kind, (n, top, regret), goal in zip(kinds, found["choice"], CHOICE_GOALS, strict=True):
            reached = f"{top:.2f} / {regret:.1%}" if n else "-"
            rows.append([kind, str(n), reached, f"{goal[0]:.2f} / {goal[1]:.0%}"])
        columns = ("products", "rows", "top-1 / mean regret", "goal")
        out.append(("Choice of the fastest dtype", columns, rows))
    if "few" in found:
        rows = []
        for name, (before, after) in found["few"].items():
            rows.append([name, str(before.rows if before else 0), _text(before), _text(after)])
            rows[-1].append(_goal(CLASSES[name][2]))
        columns = ("operators", "rows", "without", "with half of the rows", "goal without")
        out.append(("Other machines, without and with a few rows of theirs", columns, rows))
    return out


def tables(found: Mapping[str, Any]) -> list[Table]:
    """For a rich console."""
    out = []
    for title, columns, rows in grids(found):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right" if column == "rows" else "left")
        for row in rows:
            table.add_row(*row)
        out.append(table)
    return out


def markdown(found: Mapping[str, Any]) -> str:
    """For a page of the documentation."""
    parts = []
    for title, columns, rows in grids(found):
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(row) for row in rows]
        parts.append(f"{title}\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _text(score: Score | None) -> str:
    if score is None:
        return "-"
    pairs = "-" if np.isnan(score.pairs) else f"{score.pairs:.2f}"
    covered = "-" if np.isnan(score.covered) else f"{score.covered:.0%}"
    return f"{score.median:.1%} / {score.mean:.1%} / {pairs} / {covered}"


def _goal(goal: tuple[float, ...]) -> str:
    return f"{goal[0]:.0%} / {goal[1]:.0%} / {goal[2]:.2f} / 90%"
