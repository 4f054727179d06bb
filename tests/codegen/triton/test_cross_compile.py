"""Code for GPUs that are not here: accepted by the audit, rejected where it must be, cached."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import KernelRejected, UnknownArchitecture, UnsupportedProblem
from ridgeline.codegen.triton import problems
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.attention_training import compile_attention_backward
from ridgeline.codegen.triton.audit import Audit
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import first_accepted

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    problems.compile_prefill.cache_clear()
    problems._decode.cache_clear()
    problems._linear.cache_clear()
    return tmp_path


def check(compiled, arch: str) -> None:
    assert compiled.arch == arch
    assert compiled.audit.faults(architecture(arch), matrix=True) == []
    assert any(name.startswith(MATRIX[arch]) for name, _ in compiled.audit.matrix)
    assert compiled.audit.vector_loads > 0
    assert len(compiled.binary) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", MATRIX)
def test_causal_attention(arch: str, head_dim: int) -> None:
    shape = (2, 8, 512, head_dim)
    check(
        problems.compile_attention(shape, shape, dtype=torch.bfloat16, arch=arch, causal=True),
        arch,
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX)
def test_attention_backward(arch: str) -> None:
    options = {"dtype": torch.bfloat16, "arch": arch, "mask": "boolean", "causal": True}
    compiled = compile_attention_backward(64, 64, **options)
    check(compiled, arch)  # no atomics: what is summed has one order
    check(compiled.then, arch)


@pytest.mark.parametrize("queries", [1, 512])
def test_attention_with_sinks_and_a_cap(queries: int) -> None:
    options = {"dtype": torch.bfloat16, "arch": "sm_80", "causal": True, "capped": True}
    shapes = (2, 64, queries, 64), (2, 8, 512, 64)
    check(problems.compile_attention(*shapes, sinks_dtype=torch.bfloat16, **options), "sm_80")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("arch", MATRIX)
def test_quantized_linear(arch: str, scheme: str) -> None:
    compiled = problems.compile_quantized_linear(
        1, 4096, 4096, bits=4, group_size=128, scheme=scheme, dtype=torch.float16, arch=arch
    )
    check(compiled, arch)
    assert compiled.config.splits > 1
    assert compiled.then is not None
    assert compiled.then.audit.atomics == 0


def test_decode_is_split_along_the_keys() -> None:
    compiled = problems.compile_attention(
        (1, 32, 1, 64), (1, 8, 4096, 64), dtype=torch.float16, arch="sm_80", multiprocessors=108
    )
    assert compiled.kernel == "attention_decode_part"
    assert compiled.config.splits == 16
    assert compiled.then is not None
    assert compiled.then.kernel == "attention_decode_combine"


def test_a_spilling_configuration_is_rejected() -> None:
    from ridgeline.codegen.triton.attention import attention_forward

    greedy = Config((("BLOCK_M", 128), ("BLOCK_N", 64)), num_warps=4, num_stages=2)
    bf16 = torch.bfloat16
    pointers = {"sinks_ptr": "*bf16", "out_ptr": "*bf16", "stats_ptr": "*fp32"}

    def build(config: Config):
        return problems.attention_kernel(
            *(attention_forward, pointers, config, "sm_80", 128, 128, bf16, True, "none", bf16),
            sinks=False,
            capped=False,
        )

    with pytest.raises(KernelRejected, match=r"expected no spilled registers, found \d+ B"):
        first_accepted(build, [greedy])
    frugal = Config((("BLOCK_M", 128), ("BLOCK_N", 64)), num_warps=8, num_stages=2)
    assert first_accepted(build, [greedy, frugal]).config == frugal


def test_faults_name_what_was_expected_and_found() -> None:
    audit = Audit(255, 16, 200 * 1024, (("HMMA", 4),), 0, 2)
    faults = audit.faults(architecture("sm_90"), matrix=True)
    assert faults == [
        "expected no spilled registers, found 16 B of stack",
        "expected no atomics (determinism), found 2",
        "expected HGMMA instructions, found HMMA",
    ]
    assert "expected at most 101376 B" in audit.faults(architecture("sm_89"), matrix=True)[1]


def test_the_second_compilation_comes_from_disk(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_once():
        problems._linear.cache_clear()
        return problems.compile_quantized_linear(
            64, 8192, 256, bits=4, group_size=64, scheme="symmetric", dtype=torch.float16,
            arch="sm_80",
        )  # fmt: skip

    first = compile_once()
    assert list(cache_folder.rglob("*.bin"))
    monkeypatch.setattr(
        "ridgeline.codegen.triton.cross_compile._compile",
        lambda *_: pytest.fail("compiled a second time"),
    )
    assert compile_once() == first


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"arch": "sm_70"}, UnknownArchitecture, "sm_70.*expected one of sm_80"),
        ({"dtype": torch.float64}, UnsupportedProblem, "found torch.float64"),
        ({"value_dim": 320}, UnsupportedProblem, "up to 256"),
        ({"mask": "causal"}, UnsupportedProblem, "found 'causal'"),
    ],
)
def test_unsupported_problems_are_refused(change, error, match: str) -> None:
    options = {"dtype": torch.float16, "arch": "sm_80", **change}
    with pytest.raises(error, match=match):
        problems.compile_attention((1, 8, 128, 64), (1, 8, 128, 64), **options)
