"""Where the all-reduces of a graph should be done on GPUs: the cost model's answer, for a plan.

For a GPU target every all-reduce of [tokens, hidden] before a norm is priced by every way that
`ridgeline.cost_model.choose_site` knows; the fastest decides whether norms move to a shard of the
tokens, and all ways' times stand in the plan. The graph itself sends by its transport; where a
kernel on symmetric memory is the fastest, it is compiled and listed, and not called: that takes the
device. Law and sources: `ridgeline.cost_model.all_reduce`.
"""

import dataclasses
from math import prod
from pathlib import Path

import torch
from torch import fx

from ridgeline.codegen.kernel import KernelReport
from ridgeline.cost_model import InvalidSite, InvalidTarget, Target, choose_site
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.sizes import numbers

ON_A_SHARD = ("two_shot", "multimem", "sequence_parallel")
"""Ways in which a rank normalises its share of the tokens alone."""
OP = "all_reduce_norm"


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """shard: whether norms should move to a shard; said: with every way's time, or why there is
    no answer; kernel: the fused one, where that is the fastest and could be compiled."""

    shard: bool
    said: str
    kernel: KernelReport | None


def predicted(graph: fx.Graph, world: int, target: Target) -> Answer:
    """The answer for the all-reduce of most elements in `graph`, whose norms are on all tokens."""
    sums = graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.all_reduce.default
    )
    values = [n.meta["val"] for n in sums]
    if not values:
        return Answer(False, "nothing is summed over the ranks", None)
    value = max(values, key=lambda v: prod(numbers(v.shape)))
    *tokens, hidden = numbers(value.shape)
    site = f"{prod(tokens)} x {hidden} {str(value.dtype).removeprefix('torch.')} on {world} ranks"
    try:
        choice = choose_site(prod(tokens), hidden, world, target, itemsize=value.dtype.itemsize)
    except (InvalidSite, InvalidTarget) as error:
        return Answer(False, f"{site}: not predicted: {error}", None)
    kernel, lack = _kernel(choice.chosen, hidden, value.dtype, world, target)
    said = f"{site}, predicted for {target.name}: {choice}{lack}"
    return Answer(choice.chosen in ON_A_SHARD, said, kernel)


def _kernel(
    way: str, hidden: int, dtype: torch.dtype, world: int, target: Target
) -> tuple[KernelReport | None, str]:
    """The fused kernel compiled for the target, or why there is none."""
    if way not in ("one_shot", "two_shot", "multimem"):
        return None, ""
    from ridgeline.codegen.triton import all_reduce_norm_launch as launch

    try:
        compiled = launch.compile_all_reduce_norm(
            hidden, dtype=dtype, arch=target.arch, world=world, variant=way, weight=dtype
        )
    except RidgelineError as error:
        return None, f"; no kernel could be compiled: {error}"
    report = KernelReport(
        f"ridgeline::{OP}",
        "triton",
        target.name,
        f"{compiled.kernel} {way}, rows of {hidden}, {world} ranks, {compiled.config}",
        Path(launch.__file__).with_name("all_reduce_norm.py").read_text,
        dataclasses.asdict(compiled.audit),
    )
    return report, "; its kernel is compiled and listed, and not called here"
