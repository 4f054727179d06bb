"""`python -m ridgeline.tools.accuracy FOLDER`: the cost model's own error on measured kernels.

Nothing is scored by constants that saw it: held-out shapes (30 % by CRC of the layer's sizes) and
whole machines are predicted by fits on the rest, which `fit_cost_model` makes afresh.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ridgeline.tools.fit_cost_model import held_out_shapes, left_out_machines
from ridgeline.tools.kernel_times import Times, read


def score(t: Times, errors: np.ndarray) -> str:
    """Median APE / MAPE / right order of pairs 1.05 to 2 times apart; "-" without any error."""
    known = np.isfinite(errors)
    if not known.any():
        return "-"
    relative = np.abs(np.expm1(-errors[known]))
    text = f"{np.median(relative):.1%} / {relative.mean():.1%}"
    right = close = 0
    for harness in np.unique(t.harness[known]):
        rows = np.flatnonzero(known & (t.harness == harness))
        rows = np.random.default_rng(0).permutation(rows)[:600]
        apart = t.log_s[rows][:, None] - t.log_s[rows]
        pairs = (apart > np.log(1.05)) & (apart < np.log(2))
        predicted = t.log_s[rows] - errors[rows]
        right += int((pairs & (predicted[:, None] > predicted)).sum())
        close += int(pairs.sum())
    return f"{text} / {right / close:.2f}" if close else f"{text} / -"


def main(folder: Annotated[Path, typer.Argument(help="A folder of measured kernel times.")]):
    """Print the error table by group of operators."""
    table = Table(title="median APE / MAPE / pairs 1.05-2x apart", title_justify="left")
    for column in ("operators", "rows", "held-out shapes", "machines left out"):
        table.add_column(column, justify="right" if column == "rows" else "left")
    for key, t in read(folder).items():
        held, apart = score(t, held_out_shapes(t)), score(t, left_out_machines(t))
        table.add_row(key, str(len(t)), held, apart)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
