"""What is given back when the measured error goes too far, and which reasons a plan then states."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import Work
from ridgeline.ir.match import Site
from ridgeline.passes.base import Candidate, Pass
from ridgeline.passes.certify import CertificateError, relative_error
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.settle import back_off


def _candidates(errors: Sequence[float], *, lossy: bool) -> list[Candidate]:
    rewrite = QUANTIZED if lossy else FLASH_ATTENTION
    site = Site({}, {}, (), (), "none")
    return [Candidate(rewrite, site, None, Work(), Work(), error=e) for e in errors]


def _added(moved: dict[Candidate, float]):
    return lambda candidates: sum(moved[c] for c in candidates)


def test_the_worst_are_given_back_first():
    chosen = _candidates([0.3, 0.1, 0.2, 0.05], lossy=True)
    moved = {c: c.error for c in chosen}
    kept, back, error = back_off(chosen, 0.2, 1e-3, _added(moved))
    assert [c.error for c in kept] == [0.1, 0.05]
    assert sorted(c.error for c in back) == [0.2, 0.3]
    assert error == pytest.approx(0.15)


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.35, 0.36, 1.0])
def test_what_is_kept_holds_the_tolerance(tolerance: float):
    chosen = _candidates([0.01 * i for i in range(1, 9)], lossy=True)
    kept, back, error = back_off(chosen, tolerance, 1e-3, _added({c: c.error for c in chosen}))
    assert error == pytest.approx(sum(c.error for c in kept))
    assert error <= tolerance
    assert len(kept) + len(back) == len(chosen)
    following = min((c.error for c in back), default=1.0)
    assert error + following > tolerance


def test_an_exact_rewrite_that_moves_the_outputs_is_given_back_at_any_tolerance():
    exact, lossy = _candidates([0, 0, 0], lossy=False), _candidates([0.1], lossy=True)
    moved = dict(zip([*exact, *lossy], [1e-6, 0.177, 1e-6, 0.1], strict=True))
    kept, back, error = back_off([*exact, *lossy], 0.5, 1e-3, _added(moved))
    assert kept == [exact[0], exact[2], lossy[0]]
    assert "moves the outputs by 1.8e-01" in back[exact[1]]
    assert error == pytest.approx(0.1 + 2e-6)


def test_exact_rewrites_that_go_too_far_together_are_all_given_back():
    exact = _candidates([0, 0], lossy=False)
    kept, back, error = back_off(exact, 0.0, 1e-3, _added(dict.fromkeys(exact, 9e-4)))
    assert (kept, len(back), error) == ([], 2, 0.0)


def test_errors_are_the_largest_of_any_output():
    big, small = torch.full((1000,), 100.0), torch.ones(2)
    assert relative_error([big, 2 * small], [big, small]) == 1.0
    assert relative_error([torch.tensor([1.0, float("nan")])], [small]) == float("inf")
    assert relative_error([None], [small]) == float("inf")
    assert relative_error([torch.tensor([3])], [torch.tensor([4])]) == 0.0


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _with_apply(apply) -> Pass:
    """flash_attention with another rewrite."""

    def accepts(site, setting):
        found = FLASH_ATTENTION.accepts(site, setting)
        return [dataclasses.replace(c, rewrite=broken) for c in found]

    broken = dataclasses.replace(FLASH_ATTENTION, apply=apply, accepts=accepts)
    return broken


def _wrong(candidate, copied, module):
    """As flash_attention, with the triangle one place to the right: a deliberately wrong rule."""
    new = FLASH_ATTENTION.apply(candidate, copied, module)
    new.update_kwarg("diagonal", 1)
    return new


def test_a_wrong_rule_is_caught_by_its_certificate(tmp_path, monkeypatch):
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    broken = _with_apply(_wrong)
    model, x = _Attention().eval(), torch.randn(2, 8, 256, 64)
    fast = ridgeline.optimize(model, (x,), target="cpu", passes=(broken,), lowering="eager")
    assert fast.plan.applied == []
    (refused,) = fast.plan.refused
    assert refused.refused_by == "certificate"
    assert "differs from what it replaces" in refused.reason
    torch.testing.assert_close(fast(x), model(x))
    (reproducer,) = (tmp_path / "reproducers").iterdir()
    assert str(reproducer) in refused.reason
    root = Path(ridgeline.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, str(reproducer)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert float(ran.stdout.removeprefix("relative error")) > 1e-3


def _unusable(candidate, copied, module):
    raise CertificateError("no evidence")


def test_a_site_without_evidence_is_refused():
    broken = _with_apply(_unusable)
    model, x = _Attention().eval(), torch.randn(2, 8, 256, 64)
    fast = ridgeline.optimize(model, (x,), target="cpu", passes=(broken,), lowering="eager")
    assert [d.refused_by for d in fast.plan.refused] == ["certificate"]


def test_certificates_name_odd_sizes_masked_rows_and_strides():
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, mask)

    x, mask = torch.randn(2, 8, 256, 64), torch.rand(2, 1, 256, 256) < 0.5
    fast = ridgeline.optimize(Masked().eval(), (x, mask), target="cpu", lowering="eager")
    cases = "; ".join(fast.plan.applied[0].certificate.cases)
    for said in ("rows fully masked", "memory in reverse order", "=3", "equal rows"):
        assert said in cases


@pytest.mark.parametrize("tolerance", [0.001, 0.5])
@pytest.mark.parametrize("objective", ["memory", "energy", "eflops", "latency"])
def test_every_objective_settles(objective, tolerance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(1, 512)
    options = {"target": "a100", "tolerance": tolerance, "lowering": "eager"}
    fast = ridgeline.optimize(model, (x,), objective=objective, **options)
    with torch.no_grad():
        assert relative_error([fast(x)], [model(x)]) <= tolerance
    assert {d.at.partition(":")[0] for d in fast.plan.applied + fast.plan.refused} == {"0", "2"}
    assert len(fast.plan.applied) <= 2
    if objective == "memory" and tolerance == 0.5:
        assert len(fast.plan.applied) == 2


def test_graphs_of_one_phase_have_their_own_lines():
    model = _Attention().eval()
    fast = ridgeline.optimize(model, target="cpu", lowering="eager", max_graphs=2)
    for heads in (4, 8):
        fast(torch.randn(2, heads, 256, 64))
    assert list(fast.plan.predicted) == ["forward", "forward 2"]
    assert {d.phase for d in fast.plan.applied} == {"forward", "forward 2"}
    fast(torch.randn(2, 16, 256, 64))  # the first graph is given up, its lines with it
    assert len(fast.plan.applied) == len(fast.plan.predicted) == 2
