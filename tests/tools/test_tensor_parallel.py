"""The commands that print predicted against published times, and a plan without weights."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline.tools.tensor_parallel import PROMPTS, app, llama_70b, plan_prefill

DATA = Path(__file__).parents[1] / "cost_model" / "data"
GAINS = {1024: 1.16, 4096: 1.26, 8192: 1.27, 65536: 1.19}  # published, over multimem all-reduce


def test_published_prints_every_row() -> None:
    done = CliRunner().invoke(app, ["published", str(DATA)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert done.output.count("Llama-3.3") == 14
    assert "fused: 5 rows left out: mean" in done.output
    assert done.output.count("measured: not") == 1  # of 42


@pytest.mark.slow
def test_a_70b_llama_is_planned_on_the_meta_device() -> None:
    pytest.importorskip("transformers")
    model = llama_70b()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    plan = plan_prefill(model, 8, "h100", launch="eager")  # as published
    assert plan.parallel.bytes_whole > 140e9
    assert max(plan.parallel.bytes_per_rank) < 18e9
    for tokens, gain in GAINS.items():
        found = plan.choices[tokens].gain("multimem_all_reduce")
        assert found == pytest.approx(gain, abs=0.02)


@pytest.mark.slow
def test_planning_holds_little_memory() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "ridgeline.tools.tensor_parallel", "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held = re.search(r"the process held ([\d.]+) GiB", done.stdout)
    assert held is not None
    assert float(held[1]) < 4
    assert all(f"{tokens} tokens, " in done.stdout for tokens in PROMPTS)


def test_the_peak_is_not_that_of_the_process_it_was_started_from() -> None:
    """A process that holds 2 GiB starts one that has imported torch alone."""
    inner = "from ridgeline.tools.tensor_parallel import peak_bytes; print(peak_bytes())"
    outer = (
        "import subprocess, sys; held = bytearray(b'1' * 2**31);"
        f" print(subprocess.run([sys.executable, '-c', {inner!r}], check=True))"
    )
    done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout.split()[0]) < 2**31
