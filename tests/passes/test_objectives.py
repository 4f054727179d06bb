"""The joint decision against brute force, for every objective, on candidates of real passes."""

import itertools

import pytest
import torch
from torch import nn

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Setting
from ridgeline.passes.decide import choose
from ridgeline.passes.merged_linear import MERGED_LINEAR
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import propose
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.weights import WeightStore

OBJECTIVES = "latency", "memory", "energy", "eflops"


class Model(nn.Module):
    """Two layers of one input, and one after them: 4 codecs for each of 3 layers, and for two side
    by side, and a merger."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(1024, 512, bias=False) for _ in range(2))
        self.c = nn.Linear(512, 4096, bias=False)

    def forward(self, x):
        return self.c(self.a(x) * self.b(x))


@pytest.fixture(scope="module")
def candidates():
    """Worked out once; the error of a form depends on values, its work doesn't."""
    torch.manual_seed(0)
    model, x = Model().bfloat16().eval(), torch.randn(2, 1024).bfloat16()
    with torch.no_grad():
        program = capture(model, (x,)).program
        module = normalize(program.module)
        observed = Observation(module, program)
        setting = Setting(load_target("a100"), False, 0.5, observed, WeightStore())
        found, _ = propose((QUANTIZED, MERGED_LINEAR), module, setting)
    return found


def worth(candidate, answer, objective):
    """The gain as the objective defines it, stated anew."""
    before, after = answer.costs[candidate]
    if objective == "memory":
        return before.seconds - after.seconds - candidate.memory_bytes
    field = {"latency": "seconds", "energy": "energy_joules"}.get(objective, objective)
    return getattr(before, field) - getattr(after, field)


@pytest.mark.parametrize("target", ["a100", "l4"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tolerance", [0.05, 0.12, 0.4])
def test_no_other_set_of_candidates_is_better(candidates, target, objective, tolerance):
    machine = load_target(target)
    held = 3 * 1024 * 1024 * 2
    answer = choose(
        candidates, machine, tolerance=tolerance, objective=objective, sensitivity=1.0,
        weight_bytes=held,
    )  # fmt: skip
    gain = {c: worth(c, answer, objective) for c in candidates}
    assert gain == pytest.approx(answer.worth)
    whole = 0.05 * sum_of_best(candidates, gain)
    price = {c: whole * min(c.error / tolerance, 1) ** 2 for c in candidates}
    if objective == "latency":
        for c in candidates:
            price[c] += 0.05 * answer.costs[c][0].seconds * (c.memory_bytes > 0)
    sure = [c for c in candidates if gain[c] > max(price[c], answer.doubt[c])]
    best = max(
        sum(gain[c] - price[c] for c in taken)
        for size in range(4)  # three outputs: no more fit beside each other
        for taken in itertools.combinations(sure, size)
        if fits(taken, tolerance)
    )
    got = sum(gain[c] - price[c] for c in answer.chosen)
    assert fits(answer.chosen, tolerance)
    assert got == pytest.approx(
        best, rel=1e-3
    )  # forms that are equal but for their error count once
    assert all(gain[c] > answer.doubt[c] for c in answer.chosen)
    assert all(answer.doubt[c] == 0 for c in candidates) == (objective != "latency")


def fits(taken, tolerance):
    nodes = [n for c in taken for n in c.site.nodes]
    spent = sum(c.error**2 for c in taken)
    return len(nodes) == len(set(nodes)) and spent <= tolerance**2 * (1 + 1e-9)


def sum_of_best(candidates, gain):
    """What there is to win: the best form of each pass for each of the values made."""
    best = {}
    for c in candidates:
        alone = len(c.site.outs) == 1
        layered = c.rewrite is QUANTIZED or alone
        key = c.rewrite.name, c.site.outs if layered else c.site.outs[:1]
        best[key] = max(best.get(key, 0.0), gain[c])
    return sum(best.values())


def test_the_objectives_differ(candidates):
    chosen = {
        objective: frozenset(
            choose(
                candidates, load_target("a100"), tolerance=0.4, objective=objective,
                sensitivity=1.0, weight_bytes=2**23,
            ).chosen
        )
        for objective in OBJECTIVES
    }  # fmt: skip
    assert len(set(chosen.values())) > 1
    assert all(c.memory_bytes < 0 for c in chosen["memory"])
