"""The linear layer with a rational function for GPUs: against float64, compiled, and run there."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.choose import rational_candidates
from ridgeline.codegen.triton.linear_rational_launch import compile_linear_rational
from ridgeline.cost_model.gpu_time import OWN_TILES
from ridgeline.ir.linear_rational import LINEAR_RATIONAL, SIDES, reference
from tests.codegen.triton.test_interpreted import run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
KAT = {"numerator": (8, 6), "denominator": (8, 4)}


def test_every_case_agrees_with_float64() -> None:
    errors = json.loads(run(Path(__file__).with_name("interpreted_linear_rational.py")))
    assert len(errors) == 36
    unit = {"groups-of-whole-tiles": 1e-3, "shared-denominator": 8e-3}
    bars = {name: unit.get(name.rsplit("-abs_")[0], 5e-6) for name in errors}
    assert {name: error for name, error in errors.items() if not error < bars[name]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "side", "dtype"),
    [
        (12608, 768, 192, "output", torch.bfloat16),
        (12608, 3072, 768, "output", torch.float16),
        (12608, 16, 768, "input", torch.bfloat16),
        (3, 768, 208, "output", torch.bfloat16),
        (12608, 64, 192, "input", torch.float32),
    ],
)
def test_compiled_code_keeps_its_promises(
    arch: str, tokens: int, n: int, k: int, side: str, dtype, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    compiled = compile_linear_rational(
        tokens, n, k, dtype=dtype, arch=arch, side=side, bias=dtype, **KAT
    )
    audit = compiled.audit
    assert (audit.stack_bytes, audit.atomics) == (0, 0)
    assert audit.vector_loads > 0
    assert audit.shared_bytes <= architecture(arch).shared_bytes
    assert audit.matrix or dtype == torch.float32


def sizes(tokens: int, n: int, width: int = 0, item: int = 2) -> list[tuple[int, int, int]]:
    found = rational_candidates(
        architecture("sm_80"), tokens=tokens, n=n, width=width, item=item, multiprocessors=108
    )
    return [tuple(config.constexprs().values()) for config in found]


def test_tiles_fill_the_device_and_are_those_of_the_cost_model() -> None:
    assert sizes(12608, 3072)[0] == (128, 128, 64)
    assert sizes(1576, 768)[0] == (128, 64, 64)
    assert sizes(197, 768)[0][:2] == (16, 64)
    assert sizes(1, 3072)[0] == (16, 64, 64)
    assert sizes(100_000, 16)[0] == (128, 64, 64)
    assert sizes(12608, 3072, item=4)[0] == (128, 128, 32)
    assert sizes(12608, 3072, width=96)[0] == (128, 128, 32)
    found = {tile[:2] for tokens in (1, 40, 12608) for tile in sizes(tokens, 3072)}
    assert found == set(OWN_TILES)


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float64}, {"denominator": (8, 0)}, {"side": "both"}, {"k": 0}]
)
def test_unsupported_problems_are_refused(change) -> None:
    given = {"n": 64, "k": 64, "dtype": torch.float32, "arch": "sm_80", **KAT, **change}
    with pytest.raises(UnsupportedProblem, match="found torch"):
        compile_linear_rational(8, **given)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_device(dtype: torch.dtype, side: str) -> None:
    import ridgeline.nn  # noqa: F401 - registers the kernels

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x, weight, bias = normal(1999, 192).to(dtype), normal(768, 192).to(dtype) / 14, normal(768)
    given = (x, weight, bias.to(dtype), normal(8, 6), 0.3 * normal(8, 4))
    y = LINEAR_RATIONAL.overload(*given, side=side)
    expected = reference(*(t.double() for t in given), side=side)
    unit = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert float((y.double() - expected).norm() / expected.norm()) < unit
    assert torch.equal(y, LINEAR_RATIONAL.overload(*given, side=side))
