"""A saved plan is checked against the model, and a model that changed is noticed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline.cost_model import record
from ridgeline.tools.cli import app

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal={causal})


def build():
    torch.manual_seed(0)
    return Model(), (torch.randn(2, 8, 128, 64),)
"""


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL.format(causal=True))
    plan = tmp_path / "plan.json"
    arguments = ["optimize", "model.py:build", "--target", "cpu", "-o", str(plan)]
    with monkeypatch.context() as there:  # the plan is verified from elsewhere
        there.chdir(tmp_path)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(json.loads(plan.read_text())["applied"]) == 1
    return plan


def test_a_plan_holds_for_the_model_it_was_made_for(saved: Path):
    result = CliRunner().invoke(app, ["verify", str(saved)])
    assert result.exit_code == 0, result.output
    assert "the plan holds" in result.output
    assert "flash_attention" in result.output


def test_what_is_predicted_and_measured_is_logged(saved: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(record.SWITCH)
    result = CliRunner().invoke(app, ["verify", str(saved)])
    logged = {e.what: e for e in record.entries()}
    assert logged.keys() == {"verify Model: as captured", "verify Model: as planned"}
    for entry in logged.values():
        assert entry.predicted > 0
        said = f"{entry.measured * 1e3:.3g} ms, predicted {entry.predicted * 1e3:.3g} ms"
        assert said in " ".join(result.output.split())
    before, after = logged.values()
    assert before.predicted > after.predicted


def test_a_site_that_is_gone_is_named(saved: Path):
    text = MODEL.format(causal=True).replace("x, x, x,", "x, x, x, dropout_p=0.5,")
    (saved.parent / "model.py").write_text(text)
    result = CliRunner().invoke(app, ["verify", str(saved)])
    assert result.exit_code == 1
    assert "the plan does not hold" in result.output


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is not json"), ("[]", "has no model"), (None, "cannot be read")]
)
def test_files_that_are_no_plans(tmp_path: Path, content: str | None, said: str):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    result = CliRunner().invoke(app, ["verify", str(file)])
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
