"""The contenders of the training benchmark take the same step."""

import functools

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmark trains a Llama of transformers")

import ridgeline
from ridgeline.tools import bench_training as bench

pytestmark = pytest.mark.filterwarnings("default")  # Inductor warns of its own parts


def test_every_contender_takes_the_step_of_eager(monkeypatch):
    monkeypatch.setattr(bench, "LAYERS", 1)
    monkeypatch.setattr(bench, "LENGTH", 16)
    # what Inductor makes of a step is tested with the models that train; here, that steps are alike
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    uncompiled = functools.partial(ridgeline.optimize, lowering="eager")
    monkeypatch.setattr(ridgeline, "optimize", uncompiled)
    steps = bench.steps(bench.llama())
    assert set(steps) == {
        "eager", "torch.compile", "torch.compile, ridgeline", "ridgeline.optimize"
    }  # fmt: skip
    losses = {name: [step() for _ in range(2)] for name, step in steps.items()}
    for name, found in losses.items():
        assert found == pytest.approx(losses["eager"], rel=1e-5), name
    assert losses["eager"][1] < losses["eager"][0]
