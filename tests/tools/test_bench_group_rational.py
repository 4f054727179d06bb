"""What the benchmark of the rational function compares is one function."""

import torch

from ridgeline.ir.group_rational import reference
from ridgeline.tools import bench_group_rational as bench


def test_the_contenders_compute_the_law():
    x = torch.randn(7, 5, 24, dtype=torch.float64)
    a, b = torch.randn(2, 3, 6, dtype=torch.float64)
    b = b[:, :4]
    for function in (bench.horner, bench.powers):
        torch.testing.assert_close(function(x, a, b), reference(x, a, b))


def test_a_round_of_each_case(monkeypatch):
    monkeypatch.setattr(bench, "ROWS", 16)
    monkeypatch.setattr(bench, "NORMS", ((4, 24),))
    monkeypatch.setattr(bench, "ACTIVATION_ROWS", 2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cases = [*bench.cases(1), *bench.norms(1), *bench.activations(1)]
    assert [timings.speedup("ridgeline").median > 0 for _, timings in cases] == [True] * 15
    assert max(max(errors) for errors in bench.errors().values()) < 1e-5
