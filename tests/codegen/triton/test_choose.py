"""The rules that choose configurations and splits, and what can be used without triton."""

import subprocess
import sys

import pytest
import torch

from ridgeline.codegen.triton import choose
from ridgeline.codegen.triton.arch import ARCHITECTURES, architecture


@pytest.mark.parametrize(
    ("programs", "steps", "multiprocessors", "parts"),
    # FlashAttention-2's heuristic on its own examples (two slots per multiprocessor).
    [(8, 32, 108, 16), (8, 256, 108, 24), (64, 64, 132, 4), (1, 1024, 132, 114), (300, 8, 108, 1)],
)
def test_splits(programs: int, steps: int, multiprocessors: int, parts: int) -> None:
    assert choose.splits(programs, steps, multiprocessors) == parts


def test_splits_leave_enough_steps() -> None:
    assert choose.splits(1, 9, 108, least_steps=4) <= 2
    assert choose.splits(1, 0, 108) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_every_problem_has_candidates(arch: str, head_dim: int, dtype, masked: bool) -> None:
    assert choose.attention_candidates(
        architecture(arch), head_dim=head_dim, value_dim=head_dim, dtype=dtype, masked=masked
    )


def test_decode_is_for_few_rows_per_key_head() -> None:
    assert choose.is_decode(1, 32, 8)
    assert not choose.is_decode(128, 8, 8)


def test_importing_the_back_end_imports_no_triton() -> None:
    code = (
        "import sys, ridgeline.codegen.triton.ops, ridgeline.codegen.triton.emit;"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_triton_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ridgeline.codegen.errors import BackendMissing
    from ridgeline.codegen.triton import require_triton

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendMissing, match="pip install triton"):
        require_triton()
