"""Attention over binary codes for GPUs: compiled, refused, and run where a device is.

Against float64 in Triton's interpreter: `interpreted_coded.py`, by test_coded_linear.py."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import binary_attention_launch
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.binary_attention_launch import compile_binary_attention


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    binary_attention_launch._kernels.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_compiled_code_keeps_its_promises(arch: str, dtype: torch.dtype) -> None:
    shape = (1, 2, 784, 64)
    first = compile_binary_attention(shape, shape, dtype=dtype, arch=arch)
    total = first.then
    assert total is not None
    assert total.then is not None
    names = [kernel.kernel for kernel in (first, total, total.then)]
    assert names == [
        *("binary_attention_keys", "quantized_linear_reduce", "binary_attention_queries"),
    ]
    assert first.config.splits > 1
    for kernel in (first, total, total.then):
        # fp32 values go through the matrix unit too; only the newest families' own mnemonic may
        # be missing, where a tile has fewer rows than it takes.
        audit = kernel.audit
        assert audit.faults(architecture(arch), matrix=False) == []
        assert bool(audit.matrix) == (kernel is not total)
        assert (audit.stack_bytes, audit.atomics) == (0, 0)


def test_many_heads_need_no_chunks() -> None:
    shape = (64, 12, 196, 32)
    first = compile_binary_attention(shape, shape, dtype=torch.bfloat16, arch="sm_80")
    assert first.config.splits == 1
    assert first.then is not None
    assert first.then.kernel == "binary_attention_queries"


def test_unsupported_problems_are_refused() -> None:
    shape = (1, 2, 784, 192)
    with pytest.raises(UnsupportedProblem, match="up to 128 channels, found 192 and 192"):
        compile_binary_attention(shape, shape, dtype=torch.float16, arch="sm_80")
    x, limits = torch.zeros(1, 2, 4, 8), torch.zeros(2, 8)
    with pytest.raises(UnsupportedProblem, match=r"CUDA or ROCm tensors, found cpu"):
        torch.ops.ridgeline.triton_binary_attention(x, x, x, limits, limits)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 777), (196, 196), (3000, 4096)])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (24, 40), (128, 16)])
def test_on_the_device(dtype: torch.dtype, queries: int, keys: int, d: int, e: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    query, key = normal(2, queries, 3, d).transpose(1, 2), normal(2, 3, d, keys).transpose(2, 3)
    value, limits = normal(2, 3, keys, e), normal(2, 3, d).float()
    operands = (query, key, value, *limits)
    found = torch.ops.ridgeline.triton_binary_attention(*operands)
    codes = [
        (x > limit.unsqueeze(-2)).double() * 2 - 1
        for x, limit in zip((query, key), limits, strict=True)
    ]
    scores = d + 1 + codes[0] @ codes[1].transpose(-1, -2)
    expected = scores @ value.double() / scores.sum(-1, keepdim=True)
    bar = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}[dtype]
    assert float((found.double() - expected).norm() / expected.norm()) < bar
    assert torch.equal(found, torch.ops.ridgeline.triton_binary_attention(*operands))
