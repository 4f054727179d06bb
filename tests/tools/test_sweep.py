"""Families that nobody tuned for come through and are equal; a bad name is one clear line."""

import pytest
import torch
from typer.testing import CliRunner

from ridgeline.tools.cli import app
from ridgeline.tools.sweep import sweep_one
from ridgeline.tools.sweep_families import families

pytest.importorskip("transformers")
FAMILIES = {f.name: f for f in families()}


@pytest.mark.parametrize(
    ("name", "attention", "sites"),
    [
        ("qwen3", "sdpa", 8),
        ("mistral", "eager", 10),
        ("bart", "eager", 6),
        ("whisper", "sdpa", 6),
        ("vit", "eager", 2),
    ],
)
@pytest.mark.slow
def test_a_family_is_captured_rewritten_and_equal(name, attention, sites):
    row = sweep_one(FAMILIES[name], attention, torch.float32)
    assert row.problem == ""
    assert row.applied["flash_attention"] >= sites
    assert row.error <= 1e-5


@pytest.mark.slow
def test_a_cache_that_keeps_its_state_in_a_dict_is_named():
    """Tokens are compared all the same: such calls run the original code."""
    row = sweep_one(FAMILIES["mamba"], "eager", torch.float32)
    assert "keeps its state in a dict ('conv_states')" in row.problem
    layers, graphs = 2, 2  # a batch of one has a graph of its own
    assert row.applied["gated_activation"] == layers * graphs


def test_a_name_that_is_none_is_answered_with_near_ones():
    result = CliRunner().invoke(app, ["sweep", "lama"])
    assert result.exit_code == 1
    assert "llama" in result.output
