"""The command line: what it prints, and one clear line with a status for bad input."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ridgeline.passes import workload
from ridgeline.tools import cli
from ridgeline.tools.cli import app

MODEL = """
import torch
from torch import nn


def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU()).eval(), (torch.randn(3, 8),)


def wrong():
    return 7


def raises():
    raise ValueError("no weights here")


class Bad(nn.Module):
    def forward(self, x):
        raise RuntimeError("shapes of a user")


def bad_forward():
    return Bad(), (torch.zeros(2),)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "small.py"
    file.write_text(MODEL)
    return str(file)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("optimize", "dump", "explain", "targets", "bench", "demo"):
        assert command in result.output


def test_targets_lists_machines_and_one_shows_sources():
    assert "a100" in invoke("targets").output
    one = invoke("targets", "a100")
    assert one.exit_code == 0
    assert "a100" in one.output


def test_explain_prints_the_plan(model: str):
    result = invoke("explain", f"{model}:good", "--target", "a100")
    assert result.exit_code == 0, result.output
    assert "plan for a100" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "64"), "for batch 64"),
        (("--batch", "forward=64,prefill=1"), "for batch 64"),
        (("--phase", "forward", "--batch", "4k"), "for batch 4096"),
        (("--context", "16"), "context=16 says nothing"),
        ((), "plan for a100"),
    ],
)
def test_rewrites_are_explained_for_the_workload_asked(model: str, options, said: str):
    result = invoke("explain", f"{model}:good", "--target", "a100", *options)
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.output.split())
    assert ("rewrites are chosen" in result.output) == ("batch" in said)


@pytest.mark.parametrize("command", ["explain", "optimize"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "0"), "--batch is '0'; expected one positive number, as 8 or 4k"),
        (("--batch", "1,8"), "--batch is '1,8'; expected one positive number"),
        (("--context", "1m"), "--context is '1m'"),
        (("--batch", "decoding=8"), "by phase, give some of prefill, decode, forward"),
        (("--phase", "forward"), "neither batch nor context is given"),
        (("--phase", "training", "--batch", "8"), "phase is 'training'; choose one of"),
        (("--phase", "decode", "--batch", "forward=8"), "leave phase= out"),
        (("--phase", "decode", "--batch", "8"), "captured as forward"),
        (("--batch", "prefill=8"), "captured as forward"),
    ],
)
def test_a_workload_without_sense_is_refused(model: str, command: str, options, said: str):
    result = invoke(command, f"{model}:good", "--target", "a100", *options)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("stage", ["captured", "normalized", "rewritten"])
def test_dump_text_is_typed(model: str, stage: str):
    result = invoke("dump", f"{model}:good", "--target", "a100", "--stage", stage)
    assert result.exit_code == 0, result.output
    assert "f32[" in result.output
    assert "return" in result.output


def test_dump_json_holds_plan_and_nodes(model: str, tmp_path: Path):
    output = tmp_path / "graph.json"
    arguments = ("--target", "a100", "--format", "json", "-o", str(output))
    result = invoke("dump", f"{model}:good", *arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert {"applied", "refused", "predicted"} <= set(content["plan"])
    assert any("linear" in node["target"] for node in content["nodes"])


def test_exported_program_is_a_model(tmp_path: Path):
    file = tmp_path / "linear.pt2"
    program = torch.export.export(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),))
    torch.export.save(program, file)
    result = invoke("explain", str(file), "--target", "a100")
    assert result.exit_code == 0, result.output
    assert "plan for a100" in result.output


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("missing", "a100", "missing"),
        ("wrong", "a100", "int"),
        ("raises", "a100", "no weights here"),
        ("bad_forward", "a100", "shapes of a user"),
        ("good", "a10O", "a100"),
    ],
)
def test_bad_input_is_one_line_and_status_one(model: str, name: str, target: str, said: str):
    result = invoke("explain", f"{model}:{name}", "--target", target)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_such_file_is_one_line():
    result = invoke("explain", "nowhere.py:f")
    assert result.exit_code == 1
    assert "no such file: nowhere.py" in result.stderr


def test_usage_errors_exit_with_two(model: str):
    assert invoke("dump", f"{model}:good", "--stage", "nonsense").exit_code == 2
    assert invoke("explain").exit_code == 2


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "plan.json")
    result = invoke("optimize", "no_such.py:build", "-o", output)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())  # boxed, and broken anywhere
    assert "is no folder that can be written to" in said


def _unboxed(result) -> str:
    """Usage errors come in a box, and are broken anywhere."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("optimize", "no_such.py:build"), "-o"),
        (("optimize", "no_such.py:build"), "--save"),
        (("dump", "no_such.py:build"), "-o"),
        (("dump", "no_such.py:build", "--stage", "kernels"), "-o"),
        (("whatif", "smollm2"), "--plot"),
        (("sweep",), "-o"),
        (("accuracy", "no_such"), "-o"),
    ],
)
def test_no_folder_is_made_for_an_output(command, option, tmp_path):
    """A slip of the hand in a path: named before any work."""
    result = invoke(*command, option, str(tmp_path / "no" / "such" / "out"))
    assert result.exit_code == 2
    said = "".join(_unboxed(result).split())  # a long path is broken too
    assert "does not exist; make it first".replace(" ", "") in said
    assert not list(tmp_path.iterdir())


def test_an_output_is_a_file_and_of_kernels_a_folder(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for command, output, kind in (
        (("optimize", f"{model}:good"), tmp_path, "is a folder"),
        (("dump", f"{model}:good"), tmp_path, "expected a file"),
        (("dump", f"{model}:good", "--stage", "kernels"), file, "expected a folder"),
    ):
        result = invoke(*command, "-o", str(output))
        assert result.exit_code == 2
        assert kind in _unboxed(result)
    assert file.read_text() == "kept"
    with pytest.MonkeyPatch.context() as patch:  # who is root may write everywhere
        patch.setattr(os, "access", lambda *_, **__: False)
        result = invoke("optimize", f"{model}:good", "-o", str(tmp_path / "plan.json"))
    assert result.exit_code == 2
    assert "is no folder that can be written to" in " ".join(_unboxed(result).split())


HUGE = "1" + 30 * "0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "{}", "--tolerance", "-0.1"), "choose 0 <= tolerance < 1"),
        (("explain", "{}", "--tolerance", "nan"), "choose 0 <= tolerance < 1"),
        (("explain", "{}", "--tolerance", "1e30"), "choose 0 <= tolerance < 1"),
        (("explain", "{}", "--tolerance", "inf"), "choose 0 <= tolerance < 1"),
        (("dump", "{}", "--tolerance", "1"), "choose 0 <= tolerance < 1"),
        (("optimize", "{}", "--tolerance", "2"), "choose 0 <= tolerance < 1"),
        (("explain", "{}", "--batch", "-1"), "expected one positive number"),
        (("explain", "{}", "--batch", "0"), "expected one positive number"),
        (("explain", "{}", "--batch", "1,2"), "expected one positive number"),
        (("explain", "{}", "--batch", HUGE), "--batch is 1e+30; expected 1 to 1048576"),
        (("optimize", "{}", "--batch", "prefill=" + HUGE), "expected 1 to 1048576"),
        (("optimize", "{}", "--context", "9999999k"), "expected 1 to 1073741824 (tokens)"),
        (("optimize", "{}", "--bits", "0"), "--bits is 0; choose one of"),
        (("optimize", "{}", "--bits", HUGE), "choose one of"),
        (("optimize", "{}", "--average-bits", "nan"), "choose 2 to 4"),
        (("optimize", "{}", "--average-bits", "-3"), "choose 2 to 4"),
        (("whatif", "smollm2", "--largest-batch", "0"), "expected 1 to 1048576, found"),
        (("whatif", "smollm2", "--largest-batch", HUGE), "expected 1 to 1048576, found"),
        (("bench", "choose", "--rounds", "0"), "expected 1 to 10000, found"),
        (("bench", "choose", "--rounds", "-3"), "expected 1 to 10000, found"),
        (("bench", "choose", "--rounds", HUGE), "expected 1 to 10000, found"),
        (("calibrate", "--patience", "-1"), "expected 0 to 86400, found"),
        (("calibrate", "--patience", "nan"), "expected 0 to 86400, found nan"),
        (("calibrate", "--patience", "inf"), "expected 0 to 86400, found"),
    ],
)
def test_numbers_out_of_range_name_the_range(arguments, said, model):
    result = invoke(*(a.replace("{}", f"{model}:good") for a in arguments))
    assert result.exit_code in (1, 2)
    assert said.replace(" ", "") in "".join(_unboxed(result).split())


def test_a_missing_model_is_said_before_the_cpu_is_probed(monkeypatch):
    monkeypatch.setattr("ridgeline.cost_model.probe.probe_host", lambda *_: pytest.fail("probed"))
    result = invoke("explain", "no_such.py:build")
    assert result.exit_code == 1
    assert "no such file: no_such.py" in result.output


def test_the_most_batches_are_those_of_a_workload():
    """A copy, since its module takes seconds to import."""
    assert workload.LARGEST["batch"] == cli.LARGEST


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ridgeline", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("ridgeline", run_name="__main__")
    assert left.value.code == 0
    assert "whatif" in capsys.readouterr().out
