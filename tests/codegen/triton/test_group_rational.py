"""The rational function for GPUs: interpreted against float64, compiled, and run where one is."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.group_rational_launch import block_columns, compile_group_rational
from ridgeline.ir.group_rational import GROUP_RATIONAL_BACKWARD, backward_reference
from tests.codegen.triton.test_interpreted import run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_every_case_agrees_with_float64() -> None:
    errors = json.loads(run(Path(__file__).with_name("interpreted_group_rational.py")))
    assert len(errors) == 81
    bars = {name: 1e-3 if "shared-numerator" in name else 5e-6 for name in errors}
    assert {name: error for name, error in errors.items() if not error < bars[name]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled_code_keeps_its_promises(arch: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    compile_group_rational.cache_clear()
    for width, dtype in ((96, torch.bfloat16), (24, torch.float32)):
        for backward in (False, True):
            compiled = compile_group_rational(
                width, groups=8, m=5, n=4, dtype=dtype, arch=arch, backward=backward
            )
            kernels = [compiled] if compiled.then is None else [compiled, compiled.then]
            for kernel in kernels:
                assert kernel.audit.faults(architecture(arch), matrix=False) == []
                assert (kernel.audit.stack_bytes, kernel.audit.atomics) == (0, 0)
            assert compiled.audit.vector_loads > 0
    compile_group_rational.cache_clear()


@pytest.mark.parametrize(
    ("width", "dtype", "columns"),
    [
        (96, torch.float32, 32),
        (24, torch.bfloat16, 8),
        (384, torch.float16, 64),
        (12, torch.float32, 4),
        (12, torch.bfloat16, 16),
        (17, torch.float32, 32),
        (1, torch.float32, 1),
    ],
)
def test_columns_of_a_tile(width, dtype, columns) -> None:
    assert block_columns(width, dtype) == columns


def test_unsupported_problems_are_refused() -> None:
    for change in ({"dtype": torch.float64}, {"n": 0}):
        options = {"groups": 2, "m": 5, "n": 4, "dtype": torch.float32, "arch": "sm_80", **change}
        with pytest.raises(UnsupportedProblem, match="found torch"):
            compile_group_rational(8, **options)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(768, 8), (192, 8), (100, 4)])
def test_on_the_device(dtype: torch.dtype, channels: int, groups: int) -> None:
    import ridgeline.nn  # noqa: F401 - registers the kernels

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x, grad = normal(1999, channels).to(dtype), normal(1999, channels).to(dtype)
    a, b = normal(groups, 6), 0.3 * normal(groups, 4)
    found = GROUP_RATIONAL_BACKWARD.overload(grad, x, a, b)
    expected = backward_reference(*(t.double() for t in (grad, x, a, b)))
    unit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for own, law, bar in zip(found, expected, (unit, 3e-6, 3e-6), strict=True):
        assert float((own.double() - law).norm() / law.norm()) < bar
    again = GROUP_RATIONAL_BACKWARD.overload(grad, x, a, b)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
