"""The kernels in Triton's interpreter agree with the laws in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.triton.emit import standalone_source

# fp16 is rounded once at the end, fp32 is IEEE throughout.
TOLERANCE = 1e-3


def run(script: Path) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with NumPy 2.4 or newer")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_case_agrees_with_float64() -> None:
    errors = json.loads(run(Path(__file__).with_name("interpreted.py")))
    assert len(errors) > 50
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize(
    "kernel",
    [
        *("attention", "attention_decode", "quantized_linear", "norm", "gated", "rotary"),
        *("group_rational", "coded_linear", "binary_attention", "attention_backward"),
        "linear_rational",
    ],
)
def test_emitted_file_checks_itself(kernel: str, tmp_path: Path) -> None:
    source = standalone_source(kernel)
    assert "import ridgeline" not in source
    assert "from ridgeline" not in source
    script = tmp_path / f"{kernel}.py"
    script.write_text(source)
    assert "relative error against float64" in run(script)
