"""Options that commands share, where they print, and how their errors end."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Stage(StrEnum):
    captured = "captured"
    normalized = "normalized"
    rewritten = "rewritten"
    kernels = "kernels"


class Format(StrEnum):
    text = "text"
    json = "json"
    dot = "dot"


class Objective(StrEnum):
    latency = "latency"
    memory = "memory"
    energy = "energy"
    eflops = "eflops"


class Bench(StrEnum):
    choose = "choose"
    linear = "linear"
    lookup = "lookup"
    attention = "attention"
    training = "training"
    group_rational = "group-rational"
    norm = "norm"
    gated = "gated"
    rotary = "rotary"
    decode = "decode"
    perplexity = "perplexity"
    predict = "predict"
    shift_add = "shift-add"
    shift_add_decode = "shift-add-decode"
    tensor_parallel = "tensor-parallel"


Model = Annotated[str, typer.Argument(help="file.py:function, program.pt2, or smollm2")]
Target = Annotated[str, typer.Option(help="A name of `ridgeline targets`, or a TOML file.")]
Tolerance = Annotated[float, typer.Option(help="Output error that approximate rewrites may spend.")]
Goal = Annotated[Objective, typer.Option(help="What to make small.")]
Phase = Annotated[str, typer.Option(help="What --batch and --context are meant for; all if none.")]
Batch = Annotated[str, typer.Option(help="Sequences at once to choose the rewrites for, as 8.")]
Context = Annotated[str, typer.Option(help="Tokens, of a decode step those before, as 4k.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Module paths to leave alone, as lm_head.")]


def writable(path: Path | None) -> Path | None:
    """Before any work: its folder is there and takes files. None is made: a slip of the hand in a
    path is no wish for folders."""
    if path is not None:
        folder = path.absolute().parent
        if not folder.exists():
            raise typer.BadParameter(f"the folder {folder} does not exist; make it first")
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise typer.BadParameter(f"{folder} is no folder that can be written to")
        if path.exists() and not os.access(path, os.W_OK):
            raise typer.BadParameter(f"{path} is there and cannot be written to")
    return path


def writable_file(path: Path | None) -> Path | None:
    """The same of a file that is to be written, over another perhaps."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file in it")
    return writable(path)


def between(low: float, high: float) -> Callable[[Any], Any]:
    """A number within bounds, which the error names; NaN is within none."""

    def check(value: Any) -> Any:
        if not low <= value <= high:
            shown = f"{value:.3g}" if abs(value) > 1e12 else f"{value:g}"
            raise typer.BadParameter(f"expected {low:.12g} to {high:.12g}, found {shown}")
        return value

    return check


def _output(check: Callable[[Path | None], Path | None], help: str) -> Any:
    return typer.Option("--output", "-o", callback=check, help=help)


Output = Annotated[Path | None, _output(writable_file, "Write here, not to the screen.")]
FileOrFolder = Annotated[
    Path | None,
    _output(writable, "Write here; of --stage kernels a folder, made where its parent is there."),
]
Trace = Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of an error.")]


def write(file: Path, text: str) -> None:
    """Raises OSError where the folder is gone since it was checked."""
    file.write_text(text)


@contextmanager
def clear_errors(traceback: bool) -> Iterator[None]:
    """One line on stderr and exit status 1, unless the whole traceback was asked for."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, KeyboardInterrupt):
        raise
    except Exception as error:  # a user's model may raise anything
        if traceback:
            raise
        from ridgeline.ir.errors import RidgelineError

        kind = "" if isinstance(error, RidgelineError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        errors.print(f"error: {kind}{message}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    if not errors.is_terminal:
        yield
        return
    with errors.status(f"{what} ..."):
        yield
