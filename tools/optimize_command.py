"""`ridgeline optimize MODEL`: rewrite and compile it, in few bits where that is asked for.

MODEL is what `ridgeline.tools.model_file` loads. With --bits or --average-bits its linear layers
are reparameterised first, calibrated on --calibration. Of ``smollm2`` prefill and decode are both
compiled, and the result is timed against fp32 and against the lossless 4-bit form.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

import ridgeline
from ridgeline.ir.capture import capture
from ridgeline.ir.errors import RidgelineError
from ridgeline.passes import PASSES
from ridgeline.passes.compiler import Compiler, Objective
from ridgeline.passes.drop_in import OptimizedModule, optimized_copy
from ridgeline.passes.forced_bits import WIDTHS, forced
from ridgeline.passes.observe import rehearsal
from ridgeline.passes.optimize import hessians_of
from ridgeline.passes.quantization.calibrate import Batch
from ridgeline.passes.quantization.data import calibration_batches
from ridgeline.passes.shift_add_vit import freeze
from ridgeline.passes.workload import CAPTURED, Workload
from ridgeline.tools import bench_decode, smollm2
from ridgeline.tools.calibration_file import read_calibration, read_tokenizer
from ridgeline.tools.demo import generate
from ridgeline.tools.model_file import SMOLLM2, Example, load_model_file
from ridgeline.tools.predicted import time_programs
from ridgeline.tools.progress import stage_bars
from ridgeline.tools.workload_options import check_phase

Status = Callable[[str], AbstractContextManager[None]]
"""What shows a line while something lasts."""

TOLERANCE = 0.02
"""Of the lossless 4-bit contender: SmolLM2 is published in 4 bits."""
PROMPT, NEW, ROUNDS = 64, 32, 3
SAMPLE_TOKENS = 32


class OptionError(RidgelineError, ValueError):
    """Options of the command that do not go together, or a value out of range."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command's options."""

    model: str
    target: str = "native"
    tolerance: float = 0.0
    objective: Objective = "latency"
    ignore: tuple[str, ...] = ()
    bits: int | None = None
    average_bits: float | None = None
    calibration: Path | None = None
    tokenizer: Path | None = None
    save: Path | None = None
    workload: Workload = CAPTURED

    @property
    def few_bits(self) -> bool:
        """Is a width asked for?"""
        return self.bits is not None or self.average_bits is not None

    def check(self) -> None:
        """Before any work. Raises OptionError."""
        if self.bits is not None and self.average_bits is not None:
            raise OptionError("pass --bits or --average-bits, not both")
        if self.bits is not None and self.bits not in WIDTHS:
            raise OptionError(f"--bits is {self.bits}; choose one of {WIDTHS}")
        if self.average_bits is not None and not 2 <= self.average_bits <= 4:
            raise OptionError(f"--average-bits is {self.average_bits}; choose 2 to 4, as 3.0")
        if self.few_bits and self.calibration is None and self.model != SMOLLM2:
            raise OptionError(
                "--bits and --average-bits need --calibration FILE: a text (.txt, with --tokenizer"
                " FOLDER) or token ids (.pt) of the kind that the model will see"
            )
        if self.tokenizer is not None and getattr(self.calibration, "suffix", "") != ".txt":
            raise OptionError("--tokenizer goes with a --calibration of text (.txt)")
        if self.save is not None and not self.few_bits:
            raise OptionError("--save keeps what --bits or --average-bits made; pass one of them")


def run(request: Request, console: Console, progress: Console, status: Status) -> dict[str, Any]:
    """Optimize, print the plan, and return it as plain data, with the model's name.

    Raises OptionError, CalibrationError, and what the stages raise.
    """
    request.check()
    with status("reading the calibration data"):
        batches = _calibration(request)
    with status(f"loading {request.model}"):
        example = load_model_file(request.model)
    hessians = {}
    if batches is not None and not request.few_bits:
        with status("calibrating"):
            hessians = hessians_of(example.model, batches)
    with status("reading the target"):
        compiler = Compiler(
            request.target,
            tolerance=request.tolerance,
            objective=request.objective,
            passes=PASSES,
            ignore=request.ignore,
            hessians=hessians,
            workload=request.workload,
        )
    model = example.model
    if request.few_bits:
        model = _in_few_bits(request, model, batches, compiler, progress)
        if request.save is not None:
            ridgeline.save_quantized(
                model, request.save, original=example.model, calibrated_on=_said(request)
            )
    if request.model == SMOLLM2:
        _with_speed(model, compiler, console, status)
    else:
        _once(Example(model, example.args, example.kwargs), compiler, status)
        compiler.plan.print()
    if request.save is not None:
        console.print(Text(f"saved the quantised model in {request.save}"))
    named = SMOLLM2 if request.model == SMOLLM2 else str(Path(request.model).absolute())
    folder = None if request.save is None else str(request.save.absolute())
    beside = {"few_bits": request.few_bits, "quantized": folder}
    return {"model": named, **beside, **compiler.plan.to_dict()}


def _calibration(request: Request) -> list[Batch] | None:
    """The batches to calibrate on; None where there are none."""
    if request.calibration is not None:
        tokenizer = None
        if request.tokenizer is not None:
            tokenizer = read_tokenizer(request.tokenizer)
        elif request.model == SMOLLM2:
            tokenizer = smollm2.load_tokenizer()
        return read_calibration(request.calibration, tokenizer)
    if request.few_bits:  # of SmolLM2, or `check` would have complained
        return calibration_batches(smollm2.calibration_text(), smollm2.load_tokenizer())
    return None


def _said(request: Request) -> str:
    return smollm2.CALIBRATED_ON if request.calibration is None else request.calibration.name


def _in_few_bits(
    request: Request,
    model: nn.Module,
    batches: list[Batch] | None,
    compiler: Compiler,
    progress: Console,
) -> nn.Module:
    """The reparameterised model; the plan says what it holds."""
    with stage_bars(progress) as report:
        new, said = forced(
            model,
            compiler.target,
            request.bits,
            request.average_bits,
            batches,
            None,
            request.ignore,
            report,
        )
    compiler.plan.note(said)
    return new


def _once(example: Example, compiler: Compiler, status: Status) -> None:
    """Capture one call, compile it, and run it."""
    with status("capturing"), torch.no_grad():
        program = capture(example.model, example.args, example.kwargs).program
    check_phase(compiler.workload, program.phase)
    with status("rewriting and certifying"):
        rewritten = compiler.rewrite(program)
    with status(f"compiling for {compiler.target.name}"):
        compiled = compiler.lower(rewritten, program)
    with status("running once"), rehearsal(program) as inputs:
        compiled(*inputs)
        _log(compiled, inputs, compiler, example)


def _log(
    compiled: Callable[..., Any], inputs: list[Any], compiler: Compiler, example: Example
) -> None:
    """Predicted against measured, of a program that runs on the machine it was compiled for."""
    if compiler.target.name != "cpu":
        return
    (predicted,) = (sides["after"]["seconds"] for sides in compiler.plan.predicted.values())
    name = type(example.model).__name__
    time_programs(name, {"optimized": (compiled, predicted)}, inputs, compiler.target)


def _with_speed(model: nn.Module, compiler: Compiler, console: Console, status: Status) -> None:
    """SmolLM2: plan of prefill and decode, a line of text, and tokens per second."""
    fast = optimized_copy(freeze(model), compiler, strict=False, max_graphs=16)
    with status(f"rewriting and compiling for {compiler.target.name}"):
        reply = generate(fast, smollm2.load_tokenizer(), SAMPLE_TOKENS)
    compiler.plan.print()
    console.print(Text(f"\nsample text: {' '.join(reply.split())}"))
    if compiler.target.kind != "cpu":
        console.print("no speed is measured: the target is not this CPU")
        return
    with status("compiling the contenders, and decoding"):
        rates = decode_rates(fast)
    from ridgeline.tools.bench import print_rates

    print_rates(rates, "decode", console)


def decode_rates(fast: OptimizedModule) -> Any:
    """Tokens per second of decoding at batch 1: `fast`, fp32, and the lossless 4-bit form."""
    ids = bench_decode.prompt_ids(PROMPT)
    sessions = {
        name: bench_decode.build(name, ids, NEW, "static", tolerance=TOLERANCE)
        for name in ("compile-fp32", "ridgeline-fp32")
    }
    sessions["ridgeline 4 bit"] = sessions.pop("ridgeline-fp32")
    sessions["this"] = bench_decode.TorchSession(fast, fast.config, ids, NEW)
    _, decode = bench_decode.compare(sessions, baseline="compile-fp32", rounds=ROUNDS)
    return bench_decode.rates(decode, NEW)
