"""The fused AllReduce + residual + RMSNorm kernels for GPUs that are not here."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import UnknownArchitecture, UnsupportedProblem
from ridgeline.codegen.triton.all_reduce_norm_launch import (
    VARIANTS,
    compile_all_reduce_norm,
    grid,
    workspace,
)
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.audit import nvidia_tool
from ridgeline.cost_model.all_reduce import MOST_ELEMENTS
from tests.codegen.triton.test_interpreted import run

BARRIERS, CAS_OF_A_BARRIER = 2, 2


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    compile_all_reduce_norm.cache_clear()


def problems() -> list[tuple[str, str, torch.dtype, int, int]]:
    out = []
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100"):
        for variant in VARIANTS:
            if variant == "multimem" and arch in ("sm_80", "sm_89"):
                continue
            for dtype, size, world in (
                (torch.bfloat16, 8192, 8),
                (torch.bfloat16, MOST_ELEMENTS, 8),
                (torch.float16, 5120, 4),
                (torch.float32, MOST_ELEMENTS, 8),
                (torch.bfloat16, 576, 2),
            ):
                out.append((arch, variant, dtype, size, world))
    return out


@pytest.mark.parametrize(("arch", "variant", "dtype", "size", "world"), problems())
def test_the_code_is_accepted(
    arch: str, variant: str, dtype: torch.dtype, size: int, world: int
) -> None:
    compiled = compile_all_reduce_norm(
        size, dtype=dtype, arch=arch, world=world, variant=variant, weight=dtype
    )
    audit = compiled.audit
    # No spill, no atomic beside the signals; a put and a wait in each of the two barriers.
    assert audit.faults(architecture(arch), matrix=False) == []
    assert audit.signals == BARRIERS * CAS_OF_A_BARRIER
    multimem = variant == "multimem"
    # Partial sums of each rank, residual and weight, all 16 bytes at a time.
    assert audit.vector_loads >= (0 if multimem else world) + 2
    assert (audit.multicast > 0) == multimem
    assert compiled.config.num_warps * 32 >= world


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("variant", ["one_shot", "two_shot"])
def test_rows_stay_between_the_barriers(arch: str, variant: str, tmp_path: Path) -> None:
    """No compiler moved a load before the acquire, nor a store behind the release."""
    compiled = compile_all_reduce_norm(
        4096, dtype=torch.bfloat16, arch=arch, world=4, variant=variant
    )
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.binary)
    command = [nvidia_tool("nvdisasm"), "-c", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"\b(?:MEMBAR|CAS|CCTL|BAR|LDG\S*128|STG\S*128)", text)
    rows = [i for i, name in enumerate(code) if "128" in name]
    barriers = [i for i, name in enumerate(code) if name == "CAS"]
    assert len(rows) >= 4 + 1 + 2  # the ranks' partial sums, the residual; residual and y
    assert len(barriers) == BARRIERS * CAS_OF_A_BARRIER
    assert barriers[1] < rows[0] < rows[-1] < barriers[2]
    # After the wait caches are invalidated and the block meets; before the put the block meets,
    # and its stores reach the system.
    assert code[barriers[1] : rows[0]][:3] == ["CAS", "CCTL", "BAR"]
    assert code[rows[-1] + 1 : barriers[2]] == ["BAR", "MEMBAR"]


def test_every_rank_runs_the_same_code() -> None:
    from ridgeline.codegen.triton import all_reduce_norm as kernels

    for kernel in (kernels.one_shot_norm, kernels.two_shot_norm):
        alike = {p.name for p in kernel.params if p.do_not_specialize}
        assert alike == set(kernels.ALIKE) & set(kernel.arg_names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_grid_follows_from_what_all_ranks_know(variant: str) -> None:
    for rows in (1, 7, 8, 9, 63, 64, 1000):
        for world in (2, 4, 8):
            blocks = grid(rows, world, variant, 16)
            assert 1 <= blocks <= 16
            owned = rows if variant == "one_shot" else -(-rows // world)
            assert blocks == min(16, owned)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"size": 8190}, UnsupportedProblem, r"a multiple of 8 \(16 bytes\).*found 8190"),
        (
            {"size": MOST_ELEMENTS + 8},
            UnsupportedProblem,
            "reduce and normalise in two kernels",
        ),
        ({"world": 1}, UnsupportedProblem, "2 to 16 ranks, found 1"),
        ({"dtype": torch.float64}, UnsupportedProblem, "found torch.float64"),
        ({"variant": "ring"}, UnsupportedProblem, "one_shot, two_shot, multimem, found 'ring'"),
        ({"variant": "multimem"}, UnsupportedProblem, "sm_90 or later, found sm_80; use two_shot"),
        ({"arch": "gfx942"}, UnsupportedProblem, "found gfx942: use collectives"),
        ({"arch": "sm_70"}, UnknownArchitecture, "sm_70"),
        ({"weight": torch.int8}, UnsupportedProblem, "floating-point weight"),
    ],
)
def test_unsupported_problems_are_refused(change, error, match: str) -> None:
    options = {
        "size": 8192, "dtype": torch.bfloat16, "arch": "sm_80", "world": 8, "variant": "two_shot",
    } | change  # fmt: skip
    with pytest.raises(error, match=match):
        compile_all_reduce_norm(options.pop("size"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices here")
def test_symmetric_memory_needs_devices() -> None:
    with pytest.raises(UnsupportedProblem, match="CUDA devices joined by NVLink, found none"):
        workspace(16, 64, torch.bfloat16, None)


def test_the_interpreted_kernels_agree_with_the_emulator() -> None:
    errors = json.loads(run(Path(__file__).with_name("interpreted_all_reduce_norm.py")))
    assert len(errors) == 13
    # The same fp32 sums in the same order; the norm's sum of squares is added up in another.
    assert {name: error for name, error in errors.items() if not error < 1e-6} == {}
