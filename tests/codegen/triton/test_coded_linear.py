"""Binary-coded and shift layers for GPUs: interpreted against float64, compiled, and refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.lower import compiled
from ridgeline.codegen.triton import coded_linear_launch
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.coded_linear_launch import compile_coded_linear
from ridgeline.codegen.triton.coded_storage import lift_of, pack, packing_tile, unpack
from ridgeline.cost_model import load_target
from ridgeline.ir import quantized_linear as law
from ridgeline.ir.capture import capture
from tests.codegen.triton.test_interpreted import run

HALF, BFLOAT = torch.float16, torch.bfloat16
# Relative Frobenius errors: the rounding of y, and of ŵ with many rows.
BARS = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    coded_linear_launch._kernel.cache_clear()


@pytest.mark.slow
def test_every_case_agrees_with_float64() -> None:
    errors = json.loads(run(Path(__file__).with_name("interpreted_coded.py")))
    assert len(errors) == 31
    exact = ("fp32", "placed", "shift-eight-bits", "attention-one", "attention-large")
    bars = dict.fromkeys(errors, 0.0004)
    bars |= {name: 2e-6 for name in errors if any(part in name for part in exact)}
    bars |= {name: 4e-4 for name in errors if name.endswith(("fp16", "eight-bits-two-terms"))}
    assert {name: error for name, error in errors.items() if not error < bars[name]} == {}


@pytest.mark.parametrize("k", [1, 75, 128, 256, 300, 576, 2100])
@pytest.mark.parametrize(
    ("codec", "bits"),
    [*(("binary", bits) for bits in (1, 2, 3, 4)), *(("shift", bits) for bits in (4, 5, 6, 8))],
)
def test_storage_is_a_bijection(codec: str, bits: int, k: int) -> None:
    codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
    words = pack(codes, codec=codec, bits=bits)
    assert words.dtype == torch.int32
    tile = packing_tile(k)
    assert words.shape == (-(-k // tile), bits, 5, tile // 32)
    assert torch.equal(unpack(words, codec=codec, bits=bits, in_features=k), codes)


@pytest.mark.parametrize(("top", "lift"), [(0.0, 1.0), (0.75, 1.0), (1.0, 0.5), (2**-30, 2**29)])
def test_the_largest_weight_is_lifted_below_one(top: float, lift: float) -> None:
    assert lift_of(torch.tensor([[[top / 2, -top / 2]]]), None) == lift
    assert lift_of(torch.zeros(1, 1, 2), torch.tensor([[-top]])) == lift


CASES = {
    "few rows": {"codec": "binary", "bits": 3, "group_size": 128, "terms": 0, "dtype": HALF},
    "few rows, powers": {
        "codec": "binary", "bits": 2, "group_size": 64, "terms": 3, "dtype": BFLOAT,
        "offset_dtype": HALF, "row_scale_dtype": HALF, "bias_dtype": BFLOAT,
    },
    "many rows": {
        "tokens": 1024, "codec": "binary", "bits": 3, "group_size": 128, "terms": 0, "dtype": HALF
    },
    "columns": {
        "codec": "binary", "bits": 3, "group_size": 1, "group_rows": 4096, "terms": 3,
        "dtype": HALF, "row_scale_dtype": HALF,
    },
    "blocks, many rows": {
        "tokens": 1024, "codec": "binary", "bits": 3, "group_size": 8, "group_rows": 512,
        "terms": 3, "dtype": BFLOAT, "row_scale_dtype": HALF,
    },
    "shift": {"codec": "shift", "bits": 5, "group_size": 128, "terms": 1, "dtype": HALF},
    "shift, many rows": {
        "tokens": 1024, "codec": "shift", "bits": 4, "group_size": 128, "terms": 1, "dtype": BFLOAT
    },
}  # fmt: skip


def check(case: str, arch: str) -> None:
    compiled = compile_coded_linear(**{"tokens": 1, "n": 4096, "k": 4096, **CASES[case]}, arch=arch)
    audit = compiled.audit
    assert audit.faults(architecture(arch), matrix=True) == []
    assert (audit.stack_bytes, audit.atomics) == (0, 0)
    assert compiled.then is not None or "many" in case
    assert compiled.then is None or (compiled.config.splits > 1 and not compiled.then.audit.atomics)


@pytest.mark.slow  # Triton takes minutes for the others on Blackwell
@pytest.mark.parametrize("case", ["few rows", "many rows", "shift"])
@pytest.mark.parametrize("arch", ["sm_89", "sm_100"])
def test_compiled_code_keeps_its_promises_elsewhere(arch: str, case: str) -> None:
    check(case, arch)


def test_compiled_code_keeps_its_promises_on_ampere() -> None:
    check("few rows", "sm_80")


EVERY = [(arch, case) for arch in ("sm_80", "sm_90", "gfx942") for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), [e for e in EVERY if e != ("sm_80", "few rows")])
def test_compiled_code_keeps_its_promises(arch: str, case: str) -> None:
    check(case, arch)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codec": "uniform"}, "found 'uniform'"),
        ({"bits": 5}, "found 'binary' with 5 bits"),
        ({"group_size": 8}, "16 rows or more share; found 8 columns and 1 rows"),
        ({"codec": "shift", "bits": 4, "terms": 1, "group_size": 8}, "multiple of 32"),
        ({"codec": "shift", "bits": 5, "terms": 2}, "5 bits of 2 terms"),
        ({"dtype": torch.float64}, "found torch.float64"),
    ],
)
def test_unsupported_problems_are_refused(change: dict, match: str) -> None:
    options = {**CASES["few rows"], "arch": "sm_80", **change}
    with pytest.raises(UnsupportedProblem, match=match):
        compile_coded_linear(1, 64, 256, **options)


def test_other_devices_are_refused() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(UnsupportedProblem, match=r"CUDA or ROCm tensors, found cpu"):
        torch.ops.ridgeline.triton_coded_linear(x, x, x, codec="shift", bits=4, group_size=32)


def test_a_plan_lists_kernels_and_the_cuda_source() -> None:
    n, k, x = 32, 64, torch.randn(3, 64)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed, scale = law.pack_codes(codes, 4), torch.rand(n, 2).half()

    class Layers(torch.nn.Module):
        def forward(self, x, packed, scale):
            shift = {"bits": 4, "group_size": 32, "codec": "shift"}
            op = law.QUANTIZED_LINEAR.overload
            return op(x, packed, scale, **shift), op(
                x, packed, scale, multiply=torch.int16, **shift
            )

    module = capture(Layers(), (x.half(), packed, scale)).program.module
    nodes, reports, notes = compiled(module, load_target("a100"))
    assert [node.kwargs.get("multiply") for node, _ in nodes] == [None]
    assert reports[0].configuration.startswith("coded_linear_forward")
    assert "int32 [tiles, bits, N, J/4]" in reports[0].source()
    assert ["fixed-point products" in note for note in notes] == [True]
    if importlib.util.find_spec("tvm"):
        assert [report.backend for report in reports] == ["triton", "tvm-cuda"]
        assert "also" not in reports[0].to_dict()
        assert "shift_linear_kernel" in reports[1].source()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 65, 300])
@pytest.mark.parametrize(
    ("codec", "bits", "terms", "group", "rows", "k"),
    [
        *(("binary", bits, 3, 128, 1, 576) for bits in (1, 2, 3, 4)),
        ("binary", 3, 0, 32, 7, 1000),
        ("binary", 3, 3, 1, 272, 576),
        ("binary", 2, 2, 8, 34, 600),
        *(("shift", bits, 1, 64, 1, 1000) for bits in (4, 5, 6, 8)),
        ("shift", 8, 2, 128, 1, 2100),
    ],
)
def test_on_the_device(dtype, tokens, codec, bits, terms, group, rows, k) -> None:
    torch.manual_seed(0)
    n, shape = 272, (-(-272 // rows), -(-k // group))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale, offset, lift = torch.rand(shape).half(), None, 1.0
    if codec == "binary":
        scale = 0.05 * torch.rand(*shape, bits).half()
        if terms:
            scale = (torch.randint(50, 60, (*shape, bits, terms))).to(torch.int8)
        offset = 0.01 * torch.randn(shape).half()
        lift = lift_of(scale, offset)
    row_scale, bias = torch.rand(n).half(), torch.randn(n).to(dtype)
    x = torch.randn(tokens, k).to(dtype)
    settings = {"codec": codec, "bits": bits, "group_size": group, "group_rows": rows}
    settings["terms"] = terms if codec == "shift" else 1
    weight = law.dequantize(law.pack_codes(codes, bits), scale, offset, in_features=k, **settings)
    expected = x.double() @ weight.double().T * row_scale.double() + bias.double()
    operands = (x, pack(codes, codec=codec, bits=bits), scale, offset, bias, row_scale)
    operands = [None if t is None else t.cuda() for t in operands]
    found = torch.ops.ridgeline.triton_coded_linear(*operands, **settings, lift=lift)
    assert float((found.cpu().double() - expected).norm() / expected.norm()) < BARS[dtype]
    again = torch.ops.ridgeline.triton_coded_linear(*operands, **settings, lift=lift)
    assert torch.equal(found, again)
