"""The plot of `ridgeline whatif --plot`: a roofline with the model's kernels, and time by batch.

Left, for the first target: every distinct kernel at (FLOPs / bytes, FLOPs / seconds), hollow before
and filled after the rewrites, as large as its share of the time; the roofs are the bandwidth and
the dense peaks of the target. Right, for every target: seconds by batch, dashed before and solid
after, over the batches that the search for flips asked about. One row per phase, at the first
context.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.cost_model import Target, Work, estimate
from ridgeline.ir.errors import RidgelineError
from ridgeline.tools.whatif_table import length

if TYPE_CHECKING:
    from ridgeline.tools.whatif import Questions, Request

ROOFS = ("float32", "bfloat16", "float8_e4m3fn", "int8")
SMALLEST_DOT, LARGEST_DOT = 12.0, 320.0
Point = tuple[float, float, float]


class PlotError(RidgelineError):
    """A plot that cannot be drawn."""


def check_plot(file: Path) -> None:
    """Before any work: matplotlib is there, and draws files of this kind. Raises PlotError."""
    figure = _figure(1)
    kinds = figure.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise PlotError(f"--plot is {file}; end it in one of {', '.join(sorted(kinds))}")
    if not file.absolute().parent.is_dir():
        raise PlotError(f"--plot is {file}; the folder {file.absolute().parent} is not there")


def draw(request: "Request", questions: "Questions") -> None:
    """Write `request.plot` from the answers that are known."""
    assert request.plot is not None
    phases = questions.phases
    figure = _figure(len(phases))
    axes = figure.subplots(len(phases), 2, squeeze=False)
    for (left, right), phase in zip(axes, phases, strict=True):
        context = questions.contexts(phase, request.contexts)[0]
        at = "" if context is None else f", context {length(context)}"
        _roofline(left, request, questions, phase, context)
        for number, target in enumerate(questions.targets):
            known = questions.known(phase, target, context)
            fitting = {b: a for b, a in known.items() if a.before and a.after}
            for side, style in (("before", "--"), ("after", "-")):
                label = f"{target}" if side == "after" else None
                values = [getattr(a, side).seconds * 1e3 for a in fitting.values()]
                right.plot(list(fitting), values, style, color=f"C{number}", label=label)
        right.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms",
                  title=f"{phase}{at}: before (dashed), after")  # fmt: skip
        right.legend(fontsize="small")
        right.grid(alpha=0.3)
    figure.suptitle(f"what if {request.model}")
    figure.savefig(request.plot)


def points(work: Work, target: Target) -> list[Point]:
    """(FLOPs per byte, FLOP/s, share of the time) of each distinct kernel that computes."""
    costs = [(estimate(Work((k,)), target), n) for k, n in Counter(work.kernels).items()]
    total = sum(c.seconds * n for c, n in costs) or 1.0
    return [
        (c.flops / c.bytes, c.flops / c.seconds, c.seconds * n / total)
        for c, n in costs
        if c.flops and c.bytes
    ]


def _roofline(
    axis: Any, request: "Request", questions: "Questions", phase: str, context: int | None
) -> None:
    name = request.targets[0]
    batch = request.batches[0]
    answer, target = questions.ask(phase, name, batch, context), questions.targets[name]
    title = f"{phase}, batch {batch}" + ("" if context is None else f", context {length(context)}")
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s",
             title=f"{title} on {name}")  # fmt: skip
    intensities = [0.05, 1e4]
    for work, filled in ((answer.work_before, False), (answer.work_after, True)):
        dots = points(work, target) if work else []
        intensities += [x for x, _, _ in dots]
        sizes = [SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * share for _, _, share in dots]
        axis.scatter(
            [x for x, _, _ in dots],
            [y for _, y, _ in dots],
            s=sizes,
            facecolors="C0" if filled else "none",
            edgecolors="C0" if filled else "C1",
            alpha=0.6,
            label="after" if filled else "before",
        )
    low, high = min(intensities), max(intensities)
    for dtype in (d for d in ROOFS if d in target.peaks):
        peak = target.peaks[dtype]
        knee = peak / target.bandwidth_bytes_per_s
        axis.plot([low, knee, max(high, knee)], [low / knee * peak, peak, peak], color="0.5", lw=1)
        axis.annotate(dtype, (max(high, knee), peak), ha="right", va="bottom", fontsize="x-small")
    if not answer.fits:
        axis.text(0.5, 0.5, "does not fit the memory", transform=axis.transAxes, ha="center")
    axis.legend(loc="lower right", fontsize="small")
    axis.grid(alpha=0.3)


def _figure(rows: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "--plot needs matplotlib, which is not installed; install it with:"
            " pip install 'ridgeline[plot]'"
        ) from error
    return Figure(figsize=(12, 4.5 * rows), layout="constrained")
