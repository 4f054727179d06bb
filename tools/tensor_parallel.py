"""`python -m ridgeline.tools.tensor_parallel published FOLDER`: the tensor-parallel cost model
against TokenWeave's published times on eight H100; `... plan`: a 70B Llama planned without weights.

A star marks rows that the constants were fitted on (`fit_tensor_parallel`); the errors printed last
leave them out.
"""

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cost_model import all_reduce
from ridgeline.cost_model.all_reduce import links_of
from ridgeline.cost_model.tensor_parallel import ScheduleChoice, choose_schedule, stack_of
from ridgeline.passes.parallel.plan import ParallelPlan, plan_parallel
from ridgeline.tools.fit_tensor_parallel import (
    FEWEST,
    MODELS,
    PREFILL,
    ROW,
    TOKENS,
    WORLD,
    published,
    read,
)

PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
app = typer.Typer(help=__doc__, no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class Compared:
    """predicted and measured in one unit; fitted: whether the constants saw the row."""

    what: str
    case: str
    predicted: float
    measured: float
    fitted: bool

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def kernels(rows: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Microseconds of each kernel at each number of tokens; the fused one at its best grid."""
    links, out = links_of("h100", WORLD), []
    by_tokens: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_tokens.setdefault(int(row["tokens"]), {})[int(row["ctas"])] = row
    for tokens, grids in by_tokens.items():
        size, plain, whole = tokens * ROW, grids[FEWEST], grids[0]
        law = all_reduce
        pairs = {
            "fused": (
                law.best_blocks("multimem", tokens, ROW, links)[1],
                min(row["fused"] for row in grids.values()),
            ),
            "norm": (law.norm_seconds(size, links.target), whole["full_rms_norm"]),
            "multimem all-reduce": (
                law.multimem_seconds(size, links),
                plain["multimem_all_reduce"],
            ),
            "NCCL all-reduce": (law.nccl_seconds(size, links), plain["nccl_all_reduce"]),
            "reduce-scatter": (law.reduce_scatter_seconds(size, links), plain["multimem_rs"]),
            "all-gather": (law.all_gather_seconds(size, links), plain["multimem_ag"]),
        }
        out += [
            Compared(what, f"{tokens}", seconds * 1e6, us, tokens in TOKENS)
            for what, (seconds, us) in pairs.items()
        ]
    return out


def grids(rows: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Microseconds of the fused kernel by number of thread blocks, up to `MOST_BLOCKS`."""
    links = links_of("h100", WORLD)
    return [
        Compared(
            f"fused, {int(row['ctas'])} blocks",
            f"{int(row['tokens'])}",
            1e6
            * all_reduce.fused_seconds(
                "multimem", int(row["tokens"]), ROW, links, int(row["ctas"])
            ),
            row["fused"],
            int(row["tokens"]) in TOKENS,
        )
        for row in rows
        if 0 < row["ctas"] <= all_reduce.MOST_BLOCKS
    ]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One published prefill: the model's choice, and both gains of the weave over the unfused."""

    model: str
    world: int
    tokens: int
    choice: ScheduleChoice
    times: tuple[Compared, ...]
    gain: Compared
    measured_fused: float | None

    @property
    def better_woven(self) -> bool:
        """Whether the weave was measured to win over what else was measured."""
        unfused, woven = (t.measured for t in self.times if t.what != "no_ar")
        return woven < min(unfused, self.measured_fused or unfused)


def prefills(rows: Iterable[Mapping[str, Any]]) -> list[Prefill]:
    """Every published prefill beside its prediction (eager mode, as measured)."""
    out = []
    for row in rows:
        model, world, tokens = str(row["model"]), int(row["world"]), int(row["tokens"])
        choice = choose_schedule(MODELS[model], tokens, world, "h100", launch="eager")
        fitted = world == WORLD and tokens in PREFILL.get(model, ())
        case = f"{model}, {world} ranks, {tokens}"
        times = tuple(
            Compared(column, case, seconds * 1e3, row[column], fitted)
            for column, seconds in published(choice).items()
        )
        _, unfused, woven = times
        gain = Compared(
            "gain",
            case,
            unfused.predicted / woven.predicted,
            unfused.measured / woven.measured,
            fitted,
        )
        fused = row["baseline_fused"] or None
        out.append(Prefill(model, world, tokens, choice, times, gain, fused))
    return out


def summary(found: Sequence[Compared]) -> str:
    """Mean and greatest relative error of the rows that weren't fitted."""
    errors = [abs(c.error) for c in found if not c.fitted]
    return f"{len(errors)} rows left out: mean {np.mean(errors):.1%}, at most {max(errors):.1%}"


@app.command(name="published")
def print_published(
    folder: Annotated[Path, typer.Argument(help="tokenweave_kernels.csv, tokenweave_prefill.csv")],
) -> None:
    """Predicted against published: kernels, grids, prefills, and who chose what."""
    console = Console()
    rows = read(folder / "tokenweave_kernels.csv")
    found = kernels(rows)
    names = list(dict.fromkeys(c.what for c in found))
    table = Table(title="us, predicted / measured: hidden 8192, bf16, 8 H100", title_justify="left")
    for name in ("tokens", *names):
        table.add_column(name, justify="right")
    for case in dict.fromkeys(c.case for c in found):
        cells = [c for c in found if c.case == case]
        shown = [f"{c.predicted:.1f} / {c.measured:.1f}" for c in cells]
        table.add_row(case + ("*" if cells[0].fitted else ""), *shown)
    console.print(table)
    for name in names:
        console.print(f"{name}: {summary([c for c in found if c.what == name])}")
    console.print(f"fused by grid: {summary(grids(rows))}\n")

    table = Table(title="ms, predicted / measured; gain: unfused / woven", title_justify="left")
    for name in ("model", "ranks", "tokens", "no all-reduce", "unfused", "woven", "gain", "chosen"):
        table.add_column(name, justify="left" if name in ("model", "chosen") else "right")
    runs = prefills(read(folder / "tokenweave_prefill.csv"))
    for run in runs:
        star = "*" if run.gain.fitted else ""
        shown = [f"{t.predicted:.1f} / {t.measured:.1f}" for t in run.times]
        gain = f"{run.gain.predicted:.3f} / {run.gain.measured:.3f}"
        wrong = "" if (run.choice.chosen == "weave") == run.better_woven else " (measured: not)"
        table.add_row(
            run.model.split("-")[0] + "-" + run.model.split("-")[1], str(run.world),
            f"{run.tokens}{star}", *shown, gain, run.choice.chosen + wrong,
        )  # fmt: skip
    console.print(table)
    for column in ("no_ar", "baseline_multimem", "overlap_fused"):
        times = [t for run in runs for t in run.times if t.what == column]
        console.print(f"{column}: {summary(times)}")


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How a model is split over ranks, and the schedule of each length of prompt."""

    parallel: ParallelPlan
    choices: Mapping[int, ScheduleChoice]


def plan_prefill(
    model: torch.nn.Module,
    world: int,
    target: str,
    prompts: Sequence[int] = PROMPTS,
    launch: str = "graph",
) -> PrefillPlan:
    """A plan for a causal language model of transformers, on any device, also meta.

    Raises Unparallel, InvalidStack, InvalidSite, UnknownTarget, InvalidTarget.
    """
    stack = stack_of(model.config)
    choices = {
        tokens: choose_schedule(stack, tokens, world, target, launch=launch) for tokens in prompts
    }
    return PrefillPlan(plan_parallel(model, world), choices)


def llama_70b() -> torch.nn.Module:
    """Llama-3.3-70B's shape in bf16 on the meta device: no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


@app.command(name="plan")
def print_plan(
    target: Annotated[str, typer.Option(help="A GPU's name.")] = "h100",
    world: Annotated[int, typer.Option(help="Ranks.")] = WORLD,
    launch: Annotated[str, typer.Option(help="graph, or eager as published.")] = "graph",
) -> None:
    """Plan a 70B-class Llama for `world` GPUs, and say what planning took."""
    console, start = Console(), time.perf_counter()
    plan = plan_prefill(llama_70b(), world, target, launch=launch)
    seconds = time.perf_counter() - start
    console.print(f"Llama-3.3-70B on {world} {target}, launch {launch}; {plan.parallel}")
    for tokens, choice in plan.choices.items():
        possible = choice["multimem_all_reduce"].seconds is not None
        over = "multimem_all_reduce" if possible else "nccl"
        console.print(f"{tokens} tokens, {choice.gain(over):.2f}x over {over}: {choice}")
    peak = peak_bytes() / 2**30
    console.print(f"planned in {seconds:.1f} s; the process held {peak:.2f} GiB at most")


def peak_bytes() -> int:
    """The most memory that this process has held. On Linux not ru_maxrss, which a process takes
    over from the one that it was forked from (getrusage(2)), but VmHWM, its own (proc(5))."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    app()
