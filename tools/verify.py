"""`ridgeline verify PLAN`: what `ridgeline optimize -o` saved, against the model as it is now."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Target, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.program import Program
from ridgeline.passes import PASSES
from ridgeline.passes.compiler import graph_figures
from ridgeline.passes.observe import rehearsal
from ridgeline.passes.quantization import load_quantized
from ridgeline.passes.verify import Verdict, Verified, verify
from ridgeline.tools.model_file import SMOLLM2, load_model_file
from ridgeline.tools.predicted import time_programs

FIELDS = ("model", "target", "tolerance", "applied")


class PlanFileError(RidgelineError):
    """A file that is no plan of `ridgeline optimize -o`."""


def read_plan(file: Path) -> dict[str, Any]:
    """The plan in `file`. Raises PlanFileError saying what was expected and found."""
    try:
        plan = json.loads(file.read_text())
    except OSError as error:
        raise PlanFileError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanFileError(f"{file} is not json: {error}") from error
    missing = [f for f in FIELDS if not isinstance(plan, dict) or f not in plan]
    if missing:
        raise PlanFileError(
            f"{file} has no {', '.join(missing)}; save a plan with `ridgeline optimize MODEL -o`"
        )
    return plan


def run(file: Path, console: Console) -> bool:
    """Verify the plan in `file`, print a line per kind of rewrite; does everything hold?"""
    plan = read_plan(file)
    example = load_model_file(plan["model"])
    model = _as_planned(example.model, plan, file)
    with torch.no_grad():
        program = capture(model, example.args, example.kwargs).program
    target = load_target(plan["target"])
    found = verify(program, plan["applied"], PASSES, target, plan["tolerance"])
    console.print(_table(found.verdicts))
    holds = found.measured <= found.allowed and not any(v.problem for v in found.verdicts)
    console.print(f"output error {found.measured:.1e}, allowed {found.allowed:.0e}")
    if target.name == "cpu":
        console.print(Text(_timed(found, program, target, type(model).__name__)))
    console.print("the plan holds" if holds else "the plan does not hold")
    return holds


def _timed(found: Verified, program: Program, target: Target, name: str) -> str:
    """Run the program with and without the rewrites; predicted against measured, which is
    logged."""
    runs: dict[str, tuple[Callable[..., Any], float]] = {}
    for side, module in (("as captured", found.before), ("as planned", found.after)):
        predicted = graph_figures(module, target)["seconds"]
        run = lower(module, program.inputs, target, "inductor", program.training).run
        runs[side] = run, predicted
    with torch.no_grad(), rehearsal(program) as inputs:
        timings = time_programs(f"verify {name}", runs, inputs, target)
    said = (
        f"{side} {timings.seconds(side).median * 1e3:.3g} ms, predicted {predicted * 1e3:.3g} ms"
        for side, (_, predicted) in runs.items()
    )
    return f"measured here, compiled: {'; '.join(said)}"


def _as_planned(model: nn.Module, plan: dict[str, Any], file: Path) -> nn.Module:
    """The model that the plan is of: the saved one, where it was reparameterised."""
    if plan["model"] == SMOLLM2:
        raise PlanFileError(f"{file} is of prefill and decode of smollm2; verify checks one graph")
    if not plan.get("few_bits"):
        return model
    if plan.get("quantized") is None:
        raise PlanFileError(
            f"{file} is of a reparameterised model that was not kept; run optimize with --save"
        )
    return load_quantized(model, plan["quantized"])


def _table(verdicts: list[Verdict]) -> Table:
    table = Table("rewrite", "sites", "worst error", "allowed", "problem", box=None)
    kinds: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for v in verdicts:
        kinds[v.rewrite, v.problem].append(v)
    for (rewrite, problem), members in kinds.items():
        errors = [v.error for v in members if v.error is not None]
        where = f"{members[0].at}: {problem}" if problem else ""
        worst = f"{max(errors):.1e}" if errors else "-"
        table.add_row(rewrite, str(len(members)), worst, f"{members[0].allowed:.0e}", where)
    return table
