"""The norm kernel for GPUs that are not here, and on one where there is one."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

import ridgeline.ir.layer_norm
import ridgeline.ir.rms_norm  # noqa: F401 - registers the operations
from ridgeline.codegen.errors import UnknownArchitecture, UnsupportedProblem
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.norm_ops import MAX_SIZE, candidates, compile_norm

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
BARS = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 5e-7}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    compile_norm.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_code_is_accepted(arch: str) -> None:
    for size, dtype, form in (
        (128, torch.bfloat16, {}),
        (4096, torch.bfloat16, {"residual": True}),
        (MAX_SIZE, torch.float32, {"residual": True, "center": True, "bias": torch.float32}),
        (768, torch.bfloat16, {"center": True, "numerator": (8, 6), "denominator": (8, 4)}),
        (768, torch.float32, {"center": True, "numerator": (1, 6), "denominator": (8, 4)}),
    ):
        compiled = compile_norm(size, dtype=dtype, arch=arch, weight=dtype, **form)
        assert compiled.audit.faults(architecture(arch), matrix=False) == []
        assert compiled.audit.vector_loads >= 2, compiled
        assert len(compiled.binary) > 1000


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 64, 576, 5000, MAX_SIZE])
def test_a_block_holds_whole_rows(arch: str, size: int) -> None:
    machine = architecture(arch)
    for config in candidates(machine, size):
        sizes = config.constexprs()
        assert size <= sizes["BLOCK_N"] < 2 * size
        assert config.num_warps * machine.warp_size <= 1024
    assert sizes["BLOCK_M"] == 1 or sizes["BLOCK_M"] * sizes["BLOCK_N"] <= 2048


def test_unsupported_problems_are_refused() -> None:
    with pytest.raises(UnsupportedProblem, match="rows of 1 to 16384"):
        compile_norm(MAX_SIZE + 1, dtype=torch.float16, arch="sm_80")
    with pytest.raises(UnsupportedProblem, match=r"torch\.float64"):
        compile_norm(64, dtype=torch.float64, arch="sm_80")
    with pytest.raises(UnknownArchitecture, match="sm_70"):
        compile_norm(64, dtype=torch.float16, arch="sm_70")


def test_other_devices_are_refused() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(UnsupportedProblem, match=r"CUDA or ROCm tensors, found cpu"):
        torch.ops.ridgeline.triton_norm(x, None, None, 1e-6, 0.0, False)


def test_shapes_without_a_device() -> None:
    x = torch.empty(2, 3, 16, device="meta", dtype=torch.float16)
    y, total = torch.ops.ridgeline.triton_add_norm(x, x, None, None, 1e-6, 0.0, True)
    assert y.shape == total.shape == x.shape
    assert y.dtype == total.dtype == torch.float16


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("size", [1, 64, 100, 576, 4096, MAX_SIZE])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_on_a_gpu(dtype: torch.dtype, size: int, rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, residual, weight, bias = normal(rows, size), normal(rows, size), normal(size), normal(size)
    ops = torch.ops.ridgeline
    for center in (False, True):
        parameters = (weight, bias if center else None)
        y, total = ops.triton_add_norm(x, residual, *parameters, 1e-5, 0.0, center)
        assert torch.equal(total, x + residual)
        wide = [None if p is None else p.double() for p in parameters]
        if center:
            expected = ops.layer_norm(total.double(), *wide, eps=1e-5)
        else:
            expected = ops.rms_norm(total.double(), wide[0], eps=1e-5)
        assert (y.double() - expected).norm() <= BARS[dtype] * expected.norm()
        assert torch.equal(ops.triton_norm(total, *parameters, 1e-5, 0.0, center), y)
