"""`ridgeline whatif MODEL`: what would fire, and what it would cost, on machines not at hand.

For every target, phase, batch and context one decision of `ridgeline.passes.what_if`: the time
before and after with what bounds it, the bytes of weights and caches, the passes that fire. Then,
for each pass, the batches at which it starts or ceases to (`ridgeline.tools.whatif_flips`).
Nothing is run; a model that is given by its config has no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ridgeline.cost_model import Target, load_target
from ridgeline.passes import PASSES
from ridgeline.passes.decide import Objective
from ridgeline.passes.quantized_model import Progress as Report
from ridgeline.passes.what_if import Answer, WhatIf
from ridgeline.passes.workload import check_number
from ridgeline.tools.progress import stage_bars
from ridgeline.tools.whatif_flips import Ranges, flips, host_bound_below
from ridgeline.tools.whatif_model import QuestionError, positions_of, spans
from ridgeline.tools.whatif_table import (
    Row,
    answer_tables,
    flip_lines,
    host_lines,
    length,
    listed,
    refusal_lines,
)

LARGEST_BATCH = 512
PIPE_WIDTH = 100
DTYPES = ("bfloat16", "float16", "float32")
Key = tuple[str, str, int | None]
"""Phase, target, context."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command's options; phases: all of the model's where empty; largest: batch up to which
    flips are looked for."""

    model: str
    targets: tuple[str, ...]
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024,)
    phases: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    objective: Objective = "latency"
    plot: Path | None = None
    largest: int = LARGEST_BATCH

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise QuestionError(f"--dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if not self.targets or not self.batches or not self.contexts:
            raise QuestionError("name at least one target, one batch and one context")
        check_number("batch", self.largest, "--largest-batch")
        for name, values in (("batch", self.batches), ("context", self.contexts)):
            for value in values:
                check_number(name, value, f"--{name}")


class Questions:
    """The captured programs of a model, and every answer given so far."""

    def __init__(self, request: Request) -> None:
        dtype = getattr(torch, request.dtype)
        found = spans(request.model, request.phases, dtype, request.contexts)
        self._spans = [
            (s, {name: WhatIf(p, PASSES, request.objective) for name, p in s.programs.items()})
            for s in found
        ]
        self.phases = list(self._spans[0][0].programs)
        self.targets: dict[str, Target] = {name: load_target(name) for name in request.targets}
        self._answers: dict[tuple[str, str, int, int | None], Answer] = {}

    def ask(self, phase: str, target: str, batch: int, context: int | None) -> Answer:
        """One decision, made once."""
        key = phase, target, batch, context
        if key not in self._answers:
            what_if, beyond = self.what_if(phase, context)
            # Beyond its windows a model that has nothing else takes every context alike.
            length = None if beyond and what_if.fixed_context else context
            self._answers[key] = what_if.at(self.targets[target], batch, length)
        return self._answers[key]

    def what_if(self, phase: str, context: int | None = None) -> tuple[WhatIf, bool]:
        """The program to ask of a context; is that beyond the model's sliding windows?"""
        holding = (s for s in self._spans if context is None or context <= s[0].end)
        span, of = next(holding, self._spans[-1])
        return of[phase], span.beyond

    def contexts(self, phase: str, asked: Sequence[int]) -> Sequence[int | None]:
        """Those asked for, or (None,) for a program without a length."""
        has = self.what_if(phase)[0].has_context
        return asked if has else (None,)

    def known(self, phase: str, target: str, context: int | None) -> dict[int, Answer]:
        """Batch -> answer, in order, of what was asked so far."""
        found = {
            b: a
            for (p, t, b, c), a in self._answers.items()
            if (p, t, c) == (phase, target, context)
        }
        return dict(sorted(found.items()))


def run(
    request: Request, console: Console, progress: Console
) -> dict[Key, dict[str, Ranges] | None]:
    """Answer, print, and draw where asked; returns the flips. progress: where bars are drawn.

    Raises QuestionError, UnknownTarget, ModelError, WorkloadError, and CaptureError.
    """
    if request.plot is not None:
        from ridgeline.tools.whatif_plot import check_plot

        check_plot(request.plot)
    with stage_bars(progress) as report:
        report("capturing", request.model, 0, 1)
        questions = Questions(request)
        report("capturing", request.model, 1, 1)
        rows, found, host = _answers(request, questions, report)
    if not console.is_terminal:  # nothing has to wrap there
        console = Console(file=console.file, width=max(console.width, PIPE_WIDTH), highlight=False)
    for part in answer_tables(request.model, rows):
        console.print(part)
    beyond = [c for c in request.contexts if c > (positions_of(request.model) or c)]
    if beyond:
        shown = listed([length(c) for c in beyond])
        had = length(positions_of(request.model) or 0)
        console.print(Text(f"note: the model has {had} positions; {shown} is beyond them"))
    passes = {phase: [p.name for p in PASSES] for phase in questions.phases}
    for line in (
        *refusal_lines(rows, request.objective, passes),
        *flip_lines(found, request.largest),
        *host_lines(host, request.largest),
    ):
        console.print(Text(line), soft_wrap=True)
    if request.plot is not None:
        from ridgeline.tools.whatif_plot import draw

        draw(request, questions)
        console.print(Text(f"wrote {request.plot}"))
    return found


def _answers(
    request: Request, questions: Questions, report: Report
) -> tuple[list[Row], dict[Key, dict[str, Ranges] | None], dict[Key, int | None]]:
    """(a line per decision, flips, where the host bounds)."""
    where = [
        (phase, target, context)
        for phase in questions.phases
        for target in questions.targets
        for context in questions.contexts(phase, request.contexts)
    ]
    rows: list[Row] = []
    found: dict[Key, dict[str, Ranges] | None] = {}
    host: dict[Key, int | None] = {}
    for done, (phase, target, context) in enumerate(where):
        at = f"{phase} on {target}" + ("" if context is None else f" at {length(context)}")
        report("asking", at, done, len(where))

        def ask(batch: int, at: Key = (phase, target, context)) -> Answer:
            return questions.ask(at[0], at[1], batch, at[2])

        rows += [(phase, target, batch, context, ask(batch)) for batch in request.batches]
        found[phase, target, context] = flips(ask, request.largest)
        host[phase, target, context] = host_bound_below(ask, request.largest)
    report("asking", "done", len(where), len(where))
    return rows, found, host
