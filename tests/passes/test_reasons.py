"""Every near miss is refused with the line that blocks it, in the user's words, and a way out."""

import importlib.util
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ridgeline.ir.capture import CaptureError, capture
from ridgeline.ir.capture_errors import explain
from ridgeline.passes import PASSES
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.plan_text import sentence, summaries

FILE = Path(__file__).with_name("near_misses.py")
_spec = importlib.util.spec_from_file_location("near_misses", FILE)
assert _spec is not None
assert _spec.loader is not None
near_misses = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(near_misses)


def refused(model: nn.Module, *inputs: torch.Tensor) -> Compiler:
    compiler = Compiler("a100", tolerance=0.0, objective="latency", passes=PASSES, ignore=())
    with torch.no_grad():
        compiler.rewrite(capture(model.eval(), inputs, {}).program)
    return compiler


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 16, 16, generator=generator) for _ in range(3)]


def blocking_line(module: type[nn.Module]) -> int:
    lines = FILE.read_text().splitlines()
    start = lines.index(f"class {module.__name__}(nn.Module):")
    return next(i for i, line in enumerate(lines, 1) if i > start and "# blocks" in line)


@pytest.mark.parametrize(
    ("module", "rewrite", "named", "way"),
    near_misses.NEAR_MISSES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_blocking_line_is_named(module, rewrite, named, way):
    plan = refused(module(), *operands()).plan
    told = [d for d in plan.refused if d.rewrite == rewrite]
    assert [d.source for d in told] == [f"{FILE}:{blocking_line(module)}"]
    assert named in told[0].reason
    assert way in told[0].needed
    assert "aten" not in told[0].reason


class Stack(nn.Module):
    """Equal attentions in a row, with a soft-cap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(near_misses.SoftCapped() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x)
        return x


def test_equal_sites_of_all_layers_are_one_line_without_this_machines_paths(golden):
    plan = refused(Stack(), operands()[0]).plan
    lines = [sentence(heading, members) for heading, members in summaries(plan.refused)]
    assert len(lines) == 1
    text = lines[0].replace(f"{FILE.parent}/", "").replace("tests/passes/", "")
    golden("reasons_soft_cap", text + "\n")


def test_log_and_trace_carry_the_account(caplog, monkeypatch):
    from ridgeline.passes import record

    artifacts = []

    def keep(kind, *, metadata_fn, payload_fn):
        artifacts.append((kind, metadata_fn(), json.loads(payload_fn())))

    monkeypatch.setattr(record, "trace_structured", keep)
    with caplog.at_level(logging.DEBUG, logger="ridgeline"):
        refused(near_misses.SoftCapped(), *operands())
    assert any("'tanh' at" in r.getMessage() for r in caplog.records if r.levelno == logging.INFO)
    ((kind, metadata, payload),) = artifacts
    assert (kind, metadata["encoding"]) == ("artifact", "json")
    assert any("'tanh' at" in d["reason"] for d in payload["refused"])


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_branch_on_values_prints_one_error_and_no_graph(capfd):
    with pytest.raises(CaptureError, match=r"test_reasons\.py:\d+.*\n  Way out: .*\.$"):
        capture(Branching(), (torch.ones(3),), {})
    assert "def forward" not in capfd.readouterr().err


def test_gpt2_with_eager_attention_reads_well(golden):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0,
        eos_token_id=0, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2Model(config).eval()
    plan = refused(model, torch.arange(32)[None]).plan
    assert {d.rewrite for d in plan.applied} >= {"flash_attention"}
    lines = [sentence(heading, members) for heading, members in summaries(plan.refused)]
    golden("reasons_gpt2", re.sub(r"[\d.]+ µs", "# µs", "\n".join(lines)) + "\n")


@pytest.mark.parametrize(
    ("said", "way"),
    [
        ("Can't remap async version of inplace op to functional collective.", "leave async_op out"),
        ("Node.meta broadcast_ has invalid val field ([...], <torch.ScriptObject>).", "y = broadc"),
    ],
)
def test_collectives_without_a_form_in_a_graph(said: str, way: str) -> None:
    """What torch says of `dist.all_reduce(async_op=True)` and of `dist.broadcast`."""
    assert way in str(explain(RuntimeError(said), nn.Linear(1, 1)))
