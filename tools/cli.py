"""The command line: optimize, verify, dump, explain, targets, whatif, calibrate, bench, sweep,
accuracy, demo.

MODEL is ``file.py:function``, which returns (module, args) or (module, args, kwargs), a ``.pt2``
exported program, or ``smollm2``. Heavy imports happen inside the commands, so that --help is quick.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ridgeline.tools.cli_options import (
    Batch,
    Bench,
    Context,
    FileOrFolder,
    Format,
    Goal,
    Ignore,
    Model,
    Objective,
    Output,
    Phase,
    Stage,
    Target,
    Tolerance,
    Trace,
    between,
    clear_errors,
    errors,
    out,
    status,
    writable,
    writable_file,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from ridgeline.codegen.kernel import KernelReport
    from ridgeline.ir.program import Program
    from ridgeline.passes.compiler import Compiler
    from ridgeline.passes.workload import Workload

LARGEST = 2**20
"""Batches at most, as `ridgeline.passes.workload` has it, whose import takes seconds."""
DAY = 86_400.0

app = typer.Typer(
    help="Rewrite a PyTorch model for one machine, and see every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def optimize(
    model: Model,
    target: Target = "native",
    tolerance: Tolerance = 0.0,
    objective: Goal = Objective.latency,
    phase: Phase = "",
    batch: Batch = "",
    context: Context = "",
    ignore: Ignore = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8 for every linear layer.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="2 to 4, mixed by need.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text (.txt), or token ids of torch.save (.pt).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer's folder, for a text.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Keep the model of --bits in this folder."),
    ] = None,
    output: Output = None,
    traceback: Trace = False,
) -> None:
    """Rewrite and compile MODEL, run it once, and print the plan (-o: save it as json)."""
    with clear_errors(traceback):
        from ridgeline.tools.optimize_command import Request, run
        from ridgeline.tools.workload_options import workload

        request = Request(
            model,
            target,
            tolerance,
            objective.value,
            tuple(ignore or ()),
            bits,
            average_bits,
            calibration,
            tokenizer,
            save,
            workload(phase, batch, context),
        )
        saved = run(request, out, errors, status)
        if output is not None:
            write(output, json.dumps(saved, indent=2))


@app.command()
def verify(
    plan: Annotated[Path, typer.Argument(help="What `ridgeline optimize MODEL -o` saved.")],
    traceback: Trace = False,
) -> None:
    """Check a saved PLAN again: each rewrite is found, certified and measured anew."""
    with clear_errors(traceback):
        from ridgeline.tools.verify import run

        with status("verifying"):
            holds = run(plan, out)
        if not holds:
            raise typer.Exit(1)


@app.command()
def explain(
    model: Model,
    target: Target = "native",
    tolerance: Tolerance = 0.0,
    objective: Goal = Objective.latency,
    phase: Phase = "",
    batch: Batch = "",
    context: Context = "",
    ignore: Ignore = None,
    detail: Annotated[bool, typer.Option(help="A line per site, with all evidence.")] = False,
    traceback: Trace = False,
) -> None:
    """Which rewrites fire for MODEL on a target, which do not, and why. Compiles nothing."""
    with clear_errors(traceback):
        from ridgeline.tools.workload_options import check_phase, workload

        asked = workload(phase, batch, context)
        compiler, program = _capture(model, target, tolerance, objective, ignore, asked)
        check_phase(asked, program.phase)
        with status("rewriting and certifying"):
            compiler.rewrite(program)
        compiler.plan.print(detail=detail)


@app.command()
def dump(
    model: Model,
    target: Target = "native",
    stage: Annotated[Stage, typer.Option(help="How far along.")] = Stage.rewritten,
    form: Annotated[Format, typer.Option("--format", help="text, json or dot.")] = Format.text,
    tolerance: Tolerance = 0.0,
    objective: Goal = Objective.latency,
    ignore: Ignore = None,
    output: FileOrFolder = None,
    traceback: Trace = False,
) -> None:
    """Print MODEL's graph at a stage; --stage kernels gives the kernels' sources to take away."""
    folder = stage is Stage.kernels
    if output is not None and output.exists() and output.is_dir() != folder:
        raise typer.BadParameter(f"-o {output}: expected a {'folder' if folder else 'file'}")
    with clear_errors(traceback):
        from ridgeline.tools.dump import render_graph

        compiler, program = _capture(model, target, tolerance, objective, ignore)
        module: fx.GraphModule = program.module
        if stage in (Stage.rewritten, Stage.kernels):
            with status("rewriting and certifying"):
                module = compiler.rewrite(program)
        elif stage is Stage.normalized:
            from ridgeline.ir.normalize import normalize

            module = normalize(module)
        if stage is Stage.kernels:
            from ridgeline.codegen.lower import compiled

            with status(f"compiling for {compiler.target.name}"):
                _, reports, notes = compiled(module, compiler.target)
            for note in notes:
                errors.print(f"note: {note}", markup=False)
            _write_sources(reports, output)
            return
        title = f"{stage.value} for {compiler.target.name}"
        content = render_graph(module, form.value, title, compiler.plan.to_dict())
        if output is None:
            typer.echo(content)
        else:
            write(output, content + "\n")


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="One target, with its sources.")] = None,
    traceback: Trace = False,
) -> None:
    """The machines that ridgeline knows, as numbers; with NAME, each number's source."""
    with clear_errors(traceback):
        from ridgeline.tools.target_table import all_targets, one_target

        out.print(all_targets() if name is None else one_target(name))


@app.command()
def whatif(
    model: Annotated[
        str,
        typer.Argument(help="smollm2, file.py:function, program.pt2, a config's .json or name"),
    ],
    targets: Annotated[str, typer.Option(help="Names or TOML files, by commas.")] = "native",
    batch: Annotated[str, typer.Option(help="Batches, as 1,8,64.")] = "1,8,64",
    context: Annotated[str, typer.Option(help="Tokens, as 1k,32k.")] = "1k",
    phase: Annotated[str, typer.Option(help="prefill, decode, forward; all if none.")] = "",
    dtype: Annotated[str, typer.Option(help="Of a model built from a config.")] = "bfloat16",
    objective: Goal = Objective.latency,
    largest_batch: Annotated[
        int, typer.Option(help="Where the search for flips ends.", callback=between(1, LARGEST))
    ] = 512,
    plot: Annotated[
        Path | None, typer.Option(callback=writable_file, help="Draw rooflines and times here.")
    ] = None,
    traceback: Trace = False,
) -> None:
    """What would fire for MODEL on machines that are not here, at which batch that changes."""
    with clear_errors(traceback):
        from ridgeline.tools import whatif as questions
        from ridgeline.tools.workload_options import whole_numbers

        request = questions.Request(
            model,
            tuple(filter(None, targets.split(","))),
            whole_numbers(batch, "--batch"),
            whole_numbers(context, "--context"),
            tuple(filter(None, phase.split(","))),
            dtype,
            objective.value,
            plot,
            largest_batch,
        )
        questions.run(request, out, errors)


@app.command()
def calibrate(
    show: Annotated[bool, typer.Option("--show", help="Only the log of past runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and store nothing.")] = False,
    patience: Annotated[
        float,
        typer.Option(
            help="Seconds to try again while other work disturbs.",
            callback=between(0, DAY),
        ),
    ] = 60.0,
    traceback: Trace = False,
) -> None:
    """Time ridgeline's kernels on this CPU and refine what is predicted for it."""
    with clear_errors(traceback):
        from ridgeline.tools import calibrate as calibration

        if show:
            calibration.show(out)
        else:
            calibration.run(out, status, dry=dry_run, patience=patience)


@app.command()
def bench(
    what: Annotated[Bench, typer.Argument(help="What to measure.")],
    rounds: Annotated[
        int, typer.Option(help="Interleaved rounds.", callback=between(1, 10_000))
    ] = 11,
    traceback: Trace = False,
) -> None:
    """Interleaved timings against named baselines on this machine, as ratios with their spread."""
    with clear_errors(traceback):
        from ridgeline.tools import bench as benches

        getattr(benches, what.name)(rounds, out)


@app.command()
def sweep(
    families: Annotated[list[str] | None, typer.Argument(help="Family names; all if none.")] = None,
    bf16: Annotated[bool, typer.Option(help="Sweep in bfloat16 too.")] = False,
    output: Output = None,
    traceback: Trace = False,
) -> None:
    """Tiny models of many families: what is captured and rewritten, refused with which reason."""
    with clear_errors(traceback):
        import torch

        from ridgeline.tools.sweep import run

        dtypes = (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)
        rows = run(families or (), dtypes, out)
        if output is not None:
            write(output, json.dumps([r.to_dict() for r in rows], indent=2))


@app.command()
def accuracy(
    folder: Annotated[Path, typer.Argument(help="Measured kernel times: gemm.csv and so on.")],
    few_shot: Annotated[
        Path | None, typer.Option(help="A few rows of other machines, in the same form.")
    ] = None,
    output: Output = None,
    traceback: Trace = False,
) -> None:
    """The cost model's own error on kernels and machines it has not seen, beside the goals.

    Its laws are fitted anew to FOLDER's rows but for those that are scored: the laws are tested,
    not the constants that are shipped.
    """
    with clear_errors(traceback):
        from ridgeline.tools.accuracy import run
        from ridgeline.tools.accuracy_table import markdown, tables

        with status("fitting without what is scored"):
            found = run(folder, few_shot)
        for table in tables(found):
            out.print(table)
        if output is not None:
            write(output, markdown(found))


@app.command()
def demo(traceback: Trace = False) -> None:
    """SmolLM2-135M from end to end on this CPU, and its plan for an A100."""
    with clear_errors(traceback):
        from ridgeline.tools.demo import run

        run(out)


def _capture(
    model: str,
    target: str,
    tolerance: float,
    objective: Objective,
    ignore: list[str] | None,
    asked: "Workload | None" = None,
) -> "tuple[Compiler, Program]":
    from ridgeline.ir.capture import capture
    from ridgeline.passes import PASSES
    from ridgeline.passes.compiler import Compiler
    from ridgeline.passes.workload import CAPTURED
    from ridgeline.tools.model_file import load_model_file

    with status(f"loading {model}"):
        example = load_model_file(model)
    with status("reading the target"):
        compiler = Compiler(
            target,
            tolerance=tolerance,
            objective=objective.value,
            passes=PASSES,
            ignore=ignore or (),
            workload=asked or CAPTURED,
        )
    with status("capturing"):
        import torch

        with torch.no_grad():
            captured = capture(example.model, example.args, example.kwargs)
    return compiler, captured.program


def _write_sources(reports: "Sequence[KernelReport]", output: Path | None) -> None:
    """Each kernel's source on the screen, or as a file in the folder `output`."""
    if not reports:
        errors.print("no rewrite fired, so there are no kernels; `ridgeline explain` says why")
        raise typer.Exit(1)
    for i, report in enumerate(reports):
        suffix = "cu" if report.backend == "tvm-cuda" else "py"
        if output is not None:
            output.mkdir(exist_ok=True)
        name = f"{report.op.partition('::')[2]}_{report.backend}_{i}.{suffix}"
        if output is None:
            typer.echo(f"# ==== {name}: {report.configuration}\n{report.source()}")
            continue
        write(output / name, report.source())
        out.print(f"wrote {output / name}: {report.configuration}")


def main() -> None:
    """The `ridgeline` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
