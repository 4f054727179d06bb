"""A plan says where Kinetics' eFLOPs rank a rewrite the other way round than time does."""

import io

import pytest
import torch
from rich.console import Console

from ridgeline.cost_model import Gemm, Work, estimate, load_target
from ridgeline.passes.plan import Decision, Plan, cost_to_dict
from ridgeline.passes.plan_text import render


def decision(layer: int, rows: int) -> Decision:
    """4-bit codes of a layer's weight, for so many rows."""
    options = [{}, {"weight_bits": 4, "group_size": 128}]
    before, after = (
        estimate(
            Work((Gemm(rows, 4096, 4096, dtype=torch.bfloat16, **o),)),
            load_target("a100"),
            resident_bytes=1e9,
        )
        for o in options
    )
    refused = "cost" if after.seconds > before.seconds else None
    at = f"layers.{layer}.up:linear"
    return Decision("quantized_linear", at, "approximate", refused, "", before=before, after=after)


@pytest.mark.parametrize(("rows", "otherwise"), [(1, False), (512, True)])
def test_fewer_bytes_are_fewer_eflops_whatever_they_cost(rows, otherwise):
    found = [decision(layer, rows) for layer in range(3)]
    assert [d.otherwise_by_eflops for d in found] == [otherwise] * 3
    assert found[0].after.eflops < found[0].before.eflops
    figures = {**cost_to_dict(found[0].before), "held_bytes": 1}
    plan = Plan("a100", 0.1, predicted={"forward": {"before": figures, "after": figures}})
    (plan.refused if otherwise else plan.applied).extend(found)
    console = Console(file=io.StringIO(), width=200)
    render(plan, console=console)
    line = "eFLOPs rank these the other way round than time: quantized_linear layers.{0-2}.up"
    assert (line in console.file.getvalue()) == otherwise


def test_without_costs_nothing_is_ranked():
    assert not Decision("norm", "a:b", "exact", "pattern", "no mean").otherwise_by_eflops
