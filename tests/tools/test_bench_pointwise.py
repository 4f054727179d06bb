"""What the benches of gates and rotations compare is one function, and a wrong one is not timed."""

import pytest
import torch

from ridgeline.cost_model import load_target
from ridgeline.passes.norms import NORMS
from ridgeline.tools import bench_pointwise as bench
from ridgeline.tools.bench_site import compare
from ridgeline.tools.timing import TimingError


@torch.no_grad()
def test_a_round_of_each_case(monkeypatch):
    monkeypatch.setattr(bench, "GATES", ((3, 40),))
    monkeypatch.setattr(bench, "ROTATIONS", ((4, 2, 5, 32),))
    monkeypatch.setattr(bench, "DTYPES", (torch.float32,))
    target = load_target("cpu")
    timed = [*bench.gates(1, target), *bench.rotations(1, target)]
    assert all(timings.speedup("ridgeline").median > 0 for _, timings in timed)
    assert [set(t.samples) for _, t in timed] == [{"eager", "inductor", "ridgeline"}] * 2


@torch.no_grad()
def test_what_computes_something_else_is_not_timed():
    inputs = [torch.randn(3, 40) for _ in range(2)]
    with pytest.raises(TimingError, match="ridgeline differs from eager torch"):
        compare(bench.Gate(), inputs, lambda gate, up: gate * up, 1, load_target("cpu"))
    with pytest.raises(TimingError, match="norm does not fit Gate"):
        compare(bench.Gate(), inputs, NORMS, 1, load_target("cpu"))
